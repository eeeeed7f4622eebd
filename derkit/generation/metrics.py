"""Metrics of generated images, the table that they must not be shown without, and their records.

torch-fidelity computes IS, FID and KID with Inception. Offline, the same formulas on a separate
small classifier are called CIS, CFD and CKD: they are not comparable with any published FID."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from derkit.data import Dataset, Split, to_float
from derkit.generation.extractor import Extractor, package
from derkit.generation.generate import Samples, saturated
from derkit.records import records_folder
from derkit.util import DerkitError, pick, progress, read_json

FLOOR, CEILING, X0 = "floor: real images", "ceiling: noise", ": x0 only"
PUBLISHED = Path(__file__).resolve().parents[1] / "assets" / "published_generation.csv"
Features = Sequence[Tensor]  # what an extractor says of images: (n, F) features, (n, K) logits


def protocol(n: int, n_reference: int) -> dict[str, int]:
    """The sizes that enter the formulas, as torch-fidelity calls them, for n images."""
    few = n < 5000
    return dict(isc_splits=1 if few else 10, kid_subsets=20 if few else 100,
                kid_subset_size=min(1000, n, n_reference), prc_neighborhood=3)


def distances(found: Features, real: Features, columns: Sequence[str]) -> dict[str, float]:
    """Of generated and real images as a judge sees them, under its names: CIS, CFD, CKD (IS, FID,
    KID) by torch-fidelity's formulas; precision (share of images inside the real manifold) and
    recall (the reverse) with k = 3, arXiv 1904.06991. NaN where one set is a single image.

    What real images need, a covariance and distances among themselves, is computed once."""
    if min(len(found[0]), len(real[0])) < 2:
        return dict.fromkeys(columns, float("nan"))
    isc, fid, kid = (package(f"torch_fidelity.metric_{name}") for name in ("isc", "fid", "kid"))
    options = protocol(len(found[0]), len(real[0])) | dict(verbose=False)
    (mine, near), (theirs, known) = of_set(found[0]), _of_reference(real[0])
    precise, covered = [], torch.zeros(len(real[0]), dtype=torch.bool)
    for part, radius in zip(found[0].split(1000), near.split(1000), strict=True):
        apart = torch.cdist(part, real[0])
        precise.append((apart <= known).any(1))
        covered |= (apart <= radius[:, None]).any(0)
    values = (isc.isc_features_to_metric(found[1], options["isc_splits"])[isc.KEY_METRIC_ISC_MEAN],
              fid.fid_statistics_to_metric(mine, theirs, verbose=False)[fid.KEY_METRIC_FID],
              kid.kid_features_to_metric(found[0], real[0], **options)[kid.KEY_METRIC_KID_MEAN],
              torch.cat(precise).double().mean(), covered.double().mean())
    return dict(zip(columns, map(float, values), strict=True))


def of_set(features: Tensor, k: int = 3) -> tuple[dict[str, Any], Tensor]:
    """Of features (n, F): mean and covariance, and (n,) distances to the k-th nearest neighbour."""
    parts = [torch.cdist(part, features) for part in features.split(1000)]
    near = [part.topk(min(k + 1, len(features)), largest=False).values[:, -1] for part in parts]
    stats = package("torch_fidelity.metric_fid").fid_features_to_statistics(features)
    return stats, torch.cat(near)


_of_reference = lru_cache(maxsize=4)(of_set)  # of the real images, once for all sets


def nearest_train(images: Tensor, train: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """(L2 distance in [0, 1] pixels, index), each (n,), of the nearest training image; uint8 in."""
    known, parts = to_float(train.flatten(1)), images.to(train.device).flatten(1).split(chunk)
    best = [torch.cdist(to_float(part), known).min(1) for part in parts]
    return torch.cat([b.values for b in best]).cpu(), torch.cat([b.indices for b in best]).cpu()


def pairwise(images: Tensor, labels: Tensor, most: int = 1000) -> dict[int, float]:
    """Mean L2 distance of two images of a class ([0, 1] pixels, its first ``most``), by class."""
    parts = {c: to_float(images[labels == c][:most].flatten(1)) for c in labels.unique().tolist()}
    return {c: torch.pdist(x).mean().item() for c, x in parts.items()}  # NaN for a single image


class MetricsTable(NamedTuple):
    """overall: a row per set of images. per_class: rows (set, class). protocol: how measured."""

    overall: pd.DataFrame
    per_class: pd.DataFrame
    protocol: dict[str, Any]


def _balanced(split: Split, n: int, classes: list[int]) -> Split:
    """The first images of each of the classes, n in all or as many as there are; on the CPU."""
    each = -(-n // len(classes))
    index = torch.cat([(split.labels == c).nonzero().squeeze(1)[:each] for c in classes])
    return Split(split.images[index].cpu(), split.labels[index].cpu())


def metrics_table(samples: dict[str, Samples], dataset: Dataset,
                  judges: Extractor | Sequence[Extractor] | None,
                  reference: str = "test") -> MetricsTable:
    """All metrics of one or more sets of samples, with the rows that make them readable.

    Floor: as many real images that are not in the reference ('test' or 'train'), with the
    nearest-train distance of test images. Ceiling: uniform noise. Of each set its starts stand
    first. Columns: `distances` by every judge (None: no judge); agreement (share that
    a network trained on the data puts in their class); pairwise L2 in a class; nearest-train L2;
    near copies (share nearer to a training image than all but 1 % of the test images); saturated
    pixels; steps; s / 1000 images.
    Raises DerkitError for sets of other sizes or data."""
    if not samples:
        raise DerkitError("metrics_table needs at least one set of samples.")
    judges = [judges] if isinstance(judges, Extractor) else [*(judges or ())]
    first, train, test = next(iter(samples.values())), dataset.train, dataset.test
    chosen, other = pick("reference", reference, dict(test=(test, train), train=(train, test)))
    classes = first.labels.unique().tolist()
    real, floor = _balanced(chosen, len(chosen), classes), _balanced(other, len(first), classes)
    noise = torch.randint(0, 256, first.images.shape, generator=torch.Generator().manual_seed(0))
    sets = [(FLOOR, floor, {}), (CEILING, Split(noise.to(torch.uint8), first.labels), {})]
    for name, s in samples.items():
        if not torch.equal(s.labels.bincount(), first.labels.bincount()):
            found = f"{name!r} has {len(s)} images, another set {len(first)} (or other classes)"
            raise DerkitError(f"{found}: distances of different sizes are not comparable.")
        if s.record.get("data_sha256", dataset.sha256) != dataset.sha256:
            raise DerkitError(f"{name!r} was generated from other data than {dataset.name}.")
        steps, seconds = s.steps.double().mean().item(), s.record.get("seconds_per_1000")
        sets.append((f"{name}{X0}", Split(s.x0, s.labels), {"steps": 0.0}))
        sets.append((name, Split(s.images, s.labels), {"steps": steps, "s / 1000": seconds}))
    unseen, known, rows, class_rows = nearest_train(test.images, train.images)[0], {}, {}, {}
    theirs = [judge(real.images) for judge in judges]
    for name, part, cost in progress(sets, desc="metrics"):
        key = name == FLOOR, hash(part.images.numpy().tobytes() + part.labels.numpy().tobytes())
        if key not in known:  # the same starts are judged once
            near = nearest_train(part.images, train.images)[0], part.labels
            distance, owner = (unseen, test.labels.cpu()) if name == FLOOR else near
            row, right = {"n": len(part)}, torch.full((len(part),), float("nan"))
            for judge, real_ones in zip(judges, theirs, strict=True):
                found = judge(part.images)
                if judge.own:
                    right = (found[1].argmax(1) == part.labels).double()
                    row["agreement"] = right.mean().item()
                row |= distances(found, real_ones, judge.columns)
            apart = pairwise(part.images, part.labels)
            row["pairwise L2"] = pd.Series(apart).mean()
            row["nearest-train L2"] = distance.mean().item()
            row["near copies"] = (distance < unseen.quantile(0.01)).double().mean().item()
            row["saturated"] = saturated(part.images)
            known[key] = row, {c: {
                "agreement": right[part.labels == c].mean().item(), "pairwise L2": apart[c],
                "nearest-train L2": distance[owner == c].mean().item()} for c in classes}
        rows[name] = known[key][0] | cost
        class_rows |= {(name, dataset.classes[c]): known[key][1][c] for c in classes}
    who = [dict(name=j.name, sha256=j.sha256, info=j.info) for j in judges]
    info = protocol(len(first), len(real)) | dict(
        n=len(first), n_reference=len(real), reference=reference, dataset=dataset.name,
        source=dataset.source, data_sha256=dataset.sha256, judges=who, selection="none",
        quantised="uint8, rounded", samples={name: s.record for name, s in samples.items()})
    overall, per_class = (pd.DataFrame.from_dict(d, orient="index") for d in (rows, class_rows))
    overall.index.name, per_class.index.names = "images", ["images", "class"]
    return MetricsTable(overall, per_class, info)


def load_generation(part: str, name: str = "generation_fashion_mini",
                    root: Path | None = None) -> dict[str, Any]:
    """One record of scripts/generation_ablation.py ('recipe', 'grid', ...), or DerkitError."""
    files = {path.stem: path for path in sorted(((root or records_folder()) / name).glob("*.json"))}
    return read_json(pick(f"record of {name}", part, files))


def generation_summary(record: dict[str, Any]) -> pd.DataFrame:
    """Mean over seeds by (model, images), the number of seeds, and the range of CFD."""
    groups = pd.DataFrame(record["rows"]).groupby(["model", "images"], sort=False)
    means = groups.mean(numeric_only=True).drop(columns="seed")
    if "CFD" in means:  # not where others judged alone
        means = means.join(groups["CFD"].agg(["min", "max"]).add_prefix("CFD "))
    return means.assign(seeds=groups["seed"].nunique())


def init_by_stop(record: dict[str, Any], model: str, column: str = "CFD") -> pd.DataFrame:
    """The grid, mean over seeds: a row per init, its starts alone first, then a stop per column."""
    values, rows = generation_summary(record).loc[model][column], {}
    for key in record["settings"]:
        start, stop = key.split(" | ")
        rows.setdefault(start, {"x0 only": values[key + X0]})[stop] = values[key]
    return pd.DataFrame.from_dict(rows, orient="index")


def published_generation() -> pd.DataFrame:
    """Published CIFAR-10 figures (IS, FID, source), to stand beside our tables, never in them: the
    protocols differ, no row is comparable. Those of arXiv 2505.22486 are not known."""
    return pd.read_csv(PUBLISHED, index_col="model")
