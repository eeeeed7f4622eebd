"""Metrics of generated images, all through torch-fidelity, and the table that they must not be shown without.

With Inception weights: IS, FID, KID. Offline: the same formulas on a small separately trained extractor, called CIS,
CFD ("classifier Frechet distance") and CKD, because they are not comparable with any published FID. No sample is
selected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from derkit.augment import to_float
from derkit.data import Dataset, Split
from derkit.errors import DerkitError
from derkit.extractor import Extractor, torch_fidelity
from derkit.progress import progress
from derkit.samples import Samples, saturated

FLOOR, CEILING = "floor: real images", "ceiling: noise"


# ---------------------------------------------------------------------------------------- distribution distances
class _Images(torch.utils.data.Dataset):
    """uint8 images as torch-fidelity takes them; grey ones as RGB for Inception."""

    def __init__(self, images: Tensor, rgb: bool) -> None:
        images = images.cpu()
        self.images = images.expand(-1, 3, -1, -1) if rgb and images.shape[1] == 1 else images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def protocol(n: int, n_reference: int) -> dict[str, int]:
    """Sizes that enter the formulas: IS splits (10 from 5,000 images on, else 1), KID subsets and their size, k of
    precision/recall."""
    size = min(1000, n, n_reference)
    return dict(isc_splits=10 if n >= 5000 else 1, kid_subsets=100 if size == 1000 else 20, kid_subset_size=size,
                prc_neighborhood=min(3, n - 1, n_reference - 1))


def fidelity(images: Tensor, real: Tensor, extractor: Extractor, *, only: str = "all", cuda: bool | None = None,
             batch_size: int = 250) -> dict[str, float]:
    """Distances of uint8 images (n, C, H, W) from real ones, under the extractor's names: CIS, CFD, CKD (or IS, FID,
    KID), precision (share of images inside the real manifold) and recall (the reverse; diversity), k = 3 (arXiv
    1904.06991).

    only: 'all', or 'kernel' for the kernel distance alone (unbiased, so usable on few images of one class).
    Raises DerkitError on fewer than 2 images, or other shapes or types.
    """
    for what, x in (("images", images), ("reference", real)):
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise DerkitError(f"{what} must be uint8 (n, C, H, W), found {x.dtype} of shape {tuple(x.shape)}.")
        if len(x) < 2:
            raise DerkitError(f"metrics need at least 2 {what}, found {len(x)}.")
    if images.shape[1:] != real.shape[1:]:
        raise DerkitError(f"images are {tuple(images.shape[1:])}, the reference {tuple(real.shape[1:])}.")
    package, rgb, every = torch_fidelity(), extractor.letter == "I", only == "all"
    options: dict[str, Any] = dict(feature_extractor_weights_path=str(extractor.path)) if rgb else {}
    with torch.random.fork_rng(devices=[]):
        found = package.calculate_metrics(
            input1=_Images(images, rgb), input2=_Images(real, rgb), feature_extractor=extractor.name, isc=every,
            fid=every, prc=every, kid=True, cuda=torch.cuda.is_available() if cuda is None else cuda,
            batch_size=batch_size, save_cpu_ram=True, cache=False, verbose=False,
            **protocol(len(images), len(real)), **options)
    names = dict(zip(("inception_score_mean", "frechet_inception_distance", "kernel_inception_distance_mean"),
                     extractor.columns, strict=True)) | {"precision": "precision", "recall": "recall"}
    return {new: float(found[old]) for old, new in names.items() if old in found}


# ------------------------------------------------------------------------------------- diversity and memorisation
def nearest(images: Tensor, train: Tensor, chunk: int = 500) -> tuple[Tensor, Tensor]:
    """(L2 distance in [0, 1] pixels (n,), index (n,)) of the nearest training image, uint8 in; any class."""
    known = to_float(train.flatten(1))
    best = [torch.cdist(to_float(part.flatten(1)).to(known.device), known).min(1) for part in images.split(chunk)]
    return torch.cat([b.values for b in best]).cpu(), torch.cat([b.indices for b in best]).cpu()


def pairwise(images: Tensor, labels: Tensor, most: int = 1000) -> dict[int, float]:
    """Mean L2 distance of two images of the same class, class -> distance ([0, 1] pixels; the first ``most`` of a
    class)."""
    out = {}
    for c in labels.unique().tolist():
        x = to_float(images[labels == c][:most].flatten(1))
        out[c] = torch.pdist(x).mean().item() if len(x) > 1 else float("nan")
    return out


def near_copies(distance: Tensor, real: Tensor, share: float = 0.01) -> float:
    """Share of samples nearer to a training image than all but ``share`` of real test images are."""
    return (distance < real.quantile(share)).double().mean().item()


# ------------------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class MetricsTable:
    """``overall``: a row per set of images. ``per_class``: rows (set, class). ``protocol``: what a record must hold
    beside them."""

    overall: pd.DataFrame
    per_class: pd.DataFrame
    protocol: dict[str, Any] = field(repr=False)

    def record(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        def plain(value: Any) -> Any:
            value = value.item() if isinstance(value, np.generic) else value
            return None if isinstance(value, float) and np.isnan(value) else value

        def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
            return [{str(k): plain(v) for k, v in row.items()} for row in table.reset_index().to_dict("records")]

        return dict(protocol=self.protocol, overall=rows(self.overall), per_class=rows(self.per_class))


def _cpu(split: Split) -> Split:
    return Split(split.images.cpu(), split.labels.cpu())


def _balanced(split: Split, n: int, classes: list[int]) -> Split:
    """The first images of each of the classes, n in all or as many as there are."""
    index = [(split.labels == c).nonzero().squeeze(1)[: -(-n // len(classes))] for c in classes]
    return split.take(torch.cat(index))


def _measure(images: Tensor, labels: Tensor, real: Split, extractor: Extractor | None, names: list[str],
             near: tuple[Tensor, Tensor], real_distance: Tensor) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(overall row, rows per class) of one set of images."""
    logits, spread = extractor.logits(images) if extractor else None, pairwise(images, labels)
    agree = None if logits is None else (logits.argmax(1) == labels.to(logits.device)).double().cpu()
    per_class = []
    for c in labels.unique().tolist():
        mine, theirs = images[labels == c], real.images[real.labels == c]
        enough = len(mine) > 1 and len(theirs) > 1
        found = fidelity(mine, theirs, extractor, only="kernel") if extractor and enough else {}
        per_class.append({"class": names[c], "n": len(mine)} | found | {
            "agreement": float("nan") if agree is None else agree[labels == c].mean().item(), "pairwise L2": spread[c],
            "nearest-train L2": near[0][near[1] == c].mean().item()})
    row = (fidelity(images, real.images, extractor) if extractor else {}) | {
        "agreement": float("nan") if agree is None else agree.mean().item(),
        "pairwise L2": float(np.nanmean(list(spread.values()))), "nearest-train L2": near[0].mean().item(),
        "near copies": near_copies(near[0], real_distance), "saturated": saturated(images)}
    return {"n": len(images)} | row, per_class


def metrics_table(samples: Mapping[str, Samples], dataset: Dataset, extractor: Extractor | None,
                  reference: str = "test") -> MetricsTable:
    """All metrics of one or more sets of samples, with the rows that make them readable:

    - floor: real images that are not in the reference (train for 'test', test otherwise), as many as there are
      samples; its nearest-train distance is that of real test images;
    - ceiling: uniform noise;
    - for every set, its starts alone ('NAME: x0 only') before the result, with 0 steps.

    Columns: n; CIS, CFD, CKD (Inception: IS, FID, KID); precision, recall; agreement (share of images that the
    extractor assigns to their class); pairwise L2 inside classes; nearest-train L2; near copies (share nearer to a
    training image than 99 % of real test images); saturated pixels; steps; s / 1000 images. Energies and class labels
    of the generating classifier enter nowhere. Class-balanced sets bring the CKD of the floor slightly below 0.

    extractor: None leaves out what needs one. reference: 'test' or 'train', the real images of every row. Raises
    DerkitError for sets of different sizes or data, and where the extractor is the generating classifier.
    """
    if not samples:
        raise DerkitError("metrics_table needs at least one set of samples.")
    if reference not in ("test", "train"):
        raise DerkitError(f"reference must be 'test' or 'train', found {reference!r}.")
    first = next(iter(samples.values()))
    for name, s in samples.items():
        if len(s) != len(first) or set(s.labels.tolist()) != set(first.labels.tolist()):
            raise DerkitError(f"{name!r} has {len(s)} images, another set {len(first)} (or other classes): distances "
                              "of different sizes are not comparable and never stand in one table.")
        if s.record.get("data_sha256", dataset.sha256) != dataset.sha256:
            raise DerkitError(f"{name!r} was generated from other data than {dataset.name}.")
        if extractor and s.record.get("model_sha256") == extractor.sha256:
            raise DerkitError("the extractor is the classifier that generated the samples: it must be another one.")
    classes = sorted(set(first.labels.tolist()))
    cpu = {"train": _cpu(dataset.train), "test": _cpu(dataset.test)}
    real = _balanced(cpu[reference], len(cpu[reference]), classes)
    other = _balanced(cpu["train" if reference == "test" else "test"], len(first), classes)
    train = dataset.train.images
    test_distance = nearest(cpu["test"].images, train)[0]
    noise = torch.randint(0, 256, first.images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    sets: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {}
    sets[FLOOR], sets[CEILING] = (other.images, other.labels, {}), (noise, first.labels, {})
    for name, s in samples.items():
        sets[f"{name}: x0 only"] = (s.x0, s.labels, dict(steps=0.0))
        cost = {"steps": s.steps.double().mean().item(), "s / 1000": s.record.get("seconds_per_1000")}
        sets[name] = (s.images, s.labels, cost)
    overall, per_class, known = [], [], {}
    for name, (images, labels, more) in progress(sets.items(), desc="metrics"):
        key = hashlib.sha256(images.contiguous().numpy()).digest()  # runs that differ in the stop share their starts
        if key not in known:
            real_images = name == FLOOR  # whose nearest-train distance is that of unseen images
            near = (test_distance, cpu["test"].labels) if real_images else (nearest(images, train)[0], labels)
            known[key] = _measure(images, labels, real, extractor, dataset.classes, near, test_distance)
        row, rows = known[key]
        overall.append({"images": name} | row | {"steps": float("nan"), "s / 1000": float("nan")} | more)
        per_class += [{"images": name} | r for r in rows]
    info = dict(reference=reference, n_reference=len(real), n=len(first), classes=[dataset.classes[c] for c in classes],
                **(dict(extractor=extractor.name, extractor_sha256=extractor.sha256, extractor_info=extractor.info)
                   if extractor else dict(extractor=None)),
                dataset=dataset.name, source=dataset.source, data_sha256=dataset.sha256, selection="none",
                quantised="uint8, rounded", **protocol(len(first), len(real)),
                samples={name: {k: v for k, v in s.record.items() if k != "shards"} for name, s in samples.items()})
    classwise = pd.DataFrame(per_class).set_index(["images", "class"])
    return MetricsTable(pd.DataFrame(overall).set_index("images"), classwise, info)
