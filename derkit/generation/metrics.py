"""Metrics of generated images, the table that they must not be shown without, and their records.

torch-fidelity computes IS, FID and KID with Inception. Offline, the same formulas on a separate
small classifier are called CIS, CFD and CKD: they are not comparable with any published FID."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from derkit.data import Dataset, Split, to_float
from derkit.generation.extractor import Extractor, torch_fidelity
from derkit.generation.generate import Samples, saturated
from derkit.records import records_folder
from derkit.util import DerkitError, pick, progress, read_json

FLOOR, CEILING, X0 = "floor: real images", "ceiling: noise", ": x0 only"
PUBLISHED = Path(__file__).resolve().parents[1] / "assets" / "published_generation.csv"


def protocol(n: int, n_reference: int) -> dict[str, int]:
    """The sizes that enter the formulas, as torch-fidelity calls them, for n images."""
    size, k = min(1000, n, n_reference), min(3, n - 1, n_reference - 1)
    return dict(isc_splits=10 if n >= 5000 else 1, kid_subsets=100 if size == 1000 else 20,
                kid_subset_size=size, prc_neighborhood=k)


def fidelity(images: Tensor, real: Tensor, extractor: Extractor, *, only: str = "all",
             cuda: bool = True, batch_size: int = 250) -> dict[str, float]:
    """Distances of uint8 images (n, C, H, W) from real ones, under the extractor's names.

    CIS, CFD, CKD (or IS, FID, KID); precision (share of images inside the real manifold), recall
    (the reverse) with k = 3, arXiv 1904.06991. only: 'all', or 'kernel' for the kernel distance
    alone (unbiased: usable on few images). Raises DerkitError for other types or shapes."""
    alike = images.shape[1:] == real.shape[1:] and images.dtype == real.dtype == torch.uint8
    if not alike or images.ndim != 4 or min(len(images), len(real)) < 2:
        found = " and ".join(f"{x.dtype} {tuple(x.shape)}" for x in (images, real))
        raise DerkitError(f"distances are of two sets, 2 or more uint8 (C, H, W), found {found}.")
    package, every, options = torch_fidelity(), only == "all", protocol(len(images), len(real))
    if extractor.net is None:  # Inception, which takes RGB
        images, real = images.expand(-1, 3, -1, -1), real.expand(-1, 3, -1, -1)
        options["feature_extractor_weights_path"] = str(extractor.path)
    sets = [torch.utils.data.Subset(x.cpu(), range(len(x))) for x in (images, real)]
    with torch.random.fork_rng(devices=[]):
        found = package.calculate_metrics(
            input1=sets[0], input2=sets[1], feature_extractor=extractor.name, isc=every, fid=every,
            kid=True, prc=every, cuda=cuda and torch.cuda.is_available(), batch_size=batch_size,
            save_cpu_ram=True, cache=False, verbose=False, **options)
    keys = (package.KEY_METRIC_ISC_MEAN, package.KEY_METRIC_FID, package.KEY_METRIC_KID_MEAN)
    names = dict(zip(keys, extractor.columns, strict=True), precision="precision", recall="recall")
    return {name: float(found[key]) for key, name in names.items() if key in found}


def nearest_train(images: Tensor, train: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """(L2 distance in [0, 1] pixels, index), each (n,), of the nearest training image; uint8 in."""
    known, parts = to_float(train.flatten(1)), images.to(train.device).flatten(1).split(chunk)
    best = [torch.cdist(to_float(part), known).min(1) for part in parts]
    return torch.cat([b.values for b in best]).cpu(), torch.cat([b.indices for b in best]).cpu()


def pairwise(images: Tensor, labels: Tensor, most: int = 1000) -> dict[int, float]:
    """Mean L2 distance of two images of a class ([0, 1] pixels, its first ``most``), by class."""
    parts = {c: to_float(images[labels == c][:most].flatten(1)) for c in labels.unique().tolist()}
    return {c: torch.pdist(x).mean().item() for c, x in parts.items()}  # NaN for a single image


def near_copies(distance: Tensor, real: Tensor, share: float = 0.01) -> float:
    """Share of samples nearer to a training image than all but ``share`` of real test images."""
    return (distance < real.quantile(share)).double().mean().item()


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


def _row(part: Split, distance: Tensor, real: Split, extractor: Extractor | None,
         only: str = "all") -> dict[str, float]:
    """The metrics of a set of images, or (only='kernel') of one class of it."""
    row = {"n": len(part), "agreement": float("nan")}
    if extractor and min(len(part), len(real)) > 1:
        row |= fidelity(part.images, real.images, extractor, only=only)
    if extractor and extractor.net:
        right = extractor.logits(part.images).argmax(1) == part.labels
        row["agreement"] = right.double().mean().item()
    row["pairwise L2"] = pd.Series(pairwise(part.images, part.labels)).mean()
    row["nearest-train L2"] = distance.mean().item()
    return row


def metrics_table(samples: dict[str, Samples], dataset: Dataset, extractor: Extractor | None,
                  reference: str = "test") -> MetricsTable:
    """All metrics of one or more sets of samples, with the rows that make them readable.

    Floor: as many real images that are not in the reference ('test' or 'train'), with the
    nearest-train distance of test images. Ceiling: uniform noise. Of each set its starts stand
    first. Columns: `fidelity`; agreement (share that the extractor puts in their class); pairwise
    L2 in a class; nearest-train L2; near copies; saturated pixels; steps; s / 1000 images.
    extractor: None leaves out its columns. Raises DerkitError for sets of other sizes or data."""
    if not samples:
        raise DerkitError("metrics_table needs at least one set of samples.")
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
    unseen, rows, class_rows = nearest_train(test.images, train.images)[0], {}, {}
    for name, part, cost in progress(sets, desc="metrics"):
        near = nearest_train(part.images, train.images)[0], part.labels
        distance, owner = (unseen, test.labels.cpu()) if name == FLOOR else near
        memory = {"near copies": near_copies(distance, unseen), "saturated": saturated(part.images)}
        rows[name] = _row(part, distance, real, extractor) | memory | cost
        for c in classes:
            mine, theirs = part.take(part.labels == c), real.take(real.labels == c)
            row = _row(mine, distance[owner == c], theirs, extractor, "kernel")
            class_rows[name, dataset.classes[c]] = row
    judge = extractor and dict(name=extractor.name, sha256=extractor.sha256, info=extractor.info)
    info = protocol(len(first), len(real)) | dict(
        n=len(first), n_reference=len(real), reference=reference, dataset=dataset.name,
        source=dataset.source, data_sha256=dataset.sha256, extractor=judge, selection="none",
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
    spread = groups["CFD"].agg(["min", "max"]).add_prefix("CFD ")
    return means.join(spread).assign(seeds=groups["seed"].nunique())


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
