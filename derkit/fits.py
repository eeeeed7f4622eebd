"""What the starts need to know of the training images: class PCA and neighbours inside a class, cached by the data's
hash."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from derkit.augment import to_float
from derkit.data import Dataset
from derkit.data_sources import home
from derkit.errors import DerkitError
from derkit.progress import progress
from derkit.records import atomic_write


@dataclass(frozen=True)
class ClassPCA:
    """PCA of one class: ``mean`` (D,), ``directions`` (R, D) orthonormal rows, ``std`` (R,) standard deviations along
    them (singular value / sqrt(n_c - 1), so that they do not depend on the number of images), ``share`` (R,) of the
    variance."""

    mean: Tensor
    directions: Tensor
    std: Tensor
    share: Tensor

    def components(self, retained: float, exclude_last: bool = False) -> int:
        """How many components reach a share of variance; the published code leaves out the one that reaches it."""
        below = int((self.share.double().cumsum(0) < retained - 1e-9).sum())
        return below if exclude_last else min(below + 1, len(self.std))


def class_pca(x: Tensor, retained: float = 1.0, at_least: int = 1) -> ClassPCA:
    """PCA of images x (n, D) in float64 through the smaller of the two Gram matrices.

    Keeps the components that reach ``retained`` of the variance, and not fewer than ``at_least``. Signs are fixed
    (largest coordinate positive), so that another LAPACK gives the same directions.
    """
    x = x.double()
    n, d = x.shape
    mean = x.mean(0)
    centred = x - mean
    wide = n <= d
    values, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values.flip(0).clamp_min(0)[: n - 1], vectors.flip(1)[:, : n - 1]
    share = values / values.sum().clamp_min(1e-30)
    used = values > values[0].clamp_min(1e-30) * 1e-10  # directions without variance are rounding
    keep = min(max(int((share.cumsum(0) < retained - 1e-9).sum()) + 1, at_least), int(used.sum()))
    values, vectors, share = values[:keep], vectors[:, :keep], share[:keep]
    rows = (centred.T @ vectors / values.sqrt()).T if wide else vectors.T
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return ClassPCA(mean.float(), (rows * sign).float(), (values / (n - 1)).sqrt().float(), share.float())


def neighbours(z: Tensor, k: int, chunk: int = 2048) -> Tensor:
    """(n, k) indices of the k nearest rows of z (n, R) for every row, itself left out, nearest first."""
    out = []
    for i, part in enumerate(z.split(chunk)):
        distance = torch.cdist(part, z, compute_mode="donot_use_mm_for_euclid_dist")
        mine = torch.arange(len(part), device=z.device)
        distance[mine, mine + i * chunk] = torch.inf
        out.append(distance.topk(k, largest=False).indices)
    return torch.cat(out)


@dataclass(frozen=True)
class Pool:
    """Training images by class, and the fits that an init asked for. ``rows[c]``: the images of class c, as indices."""

    images: Tensor  # (N, C, H, W) uint8
    rows: list[Tensor]
    pca: dict[int, ClassPCA]
    near: dict[int, Tensor]  # class -> (n_c, k), positions inside the class
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def flat(self, index: Tensor) -> Tensor:
        """Images by index, of any shape (...), as floats (..., D) in [0, 1]."""
        return to_float(self.images[index].flatten(index.ndim), self.dtype)


# -------------------------------------------------------------------------------------------------------- caching
def cached(kind: str, key: Sequence[Any], make: Callable[[], dict[str, Tensor]],
           device: torch.device) -> dict[str, Tensor]:
    """Tensors from DERKIT_HOME/cache, or made and kept there. A damaged file is made anew, an unwritable cache is
    skipped."""
    name = hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]
    path = home() / "cache" / f"{kind}-{name}.pt"
    try:
        found = torch.load(path, map_location=device, weights_only=True)
        if found.pop("key", None) == repr(tuple(key)):
            return found
    except Exception:  # missing, truncated or foreign
        pass
    made = make()
    buffer = io.BytesIO()
    torch.save({k: v.cpu() for k, v in made.items()} | {"key": repr(tuple(key))}, buffer)
    with contextlib.suppress(OSError):
        atomic_write(path, buffer.getvalue())
    return made


def class_rows(dataset: Dataset, classes: Sequence[int], least: int, why: str) -> list[Tensor]:
    """Indices of the training images by class (all classes). Raises DerkitError for a chosen class below ``least``."""
    rows = [(dataset.train.labels == c).nonzero().squeeze(1) for c in range(len(dataset.classes))]
    for c in classes:
        if len(rows[c]) < least:
            raise DerkitError(f"{why}, but class {dataset.classes[c]!r} has {len(rows[c])} training images.")
    return rows


def fit_pool(dataset: Dataset, classes: Sequence[int], *, pca: float | None = None, k: int = 0, rank: int = 128,
             dtype: torch.dtype = torch.float32) -> Pool:
    """Class PCA to a share ``pca`` of the variance, and/or k neighbours in ``rank`` class-PCA coordinates, of the
    training split.

    Both are cached under DERKIT_HOME/cache, keyed by the data's sha256. Raises DerkitError where k is larger than a
    class.
    """
    least = k + 1 if k else 2
    why = f"k={k} neighbours beside the anchor need {least} images" if k else "an init needs 2 images"
    rows = class_rows(dataset, classes, least, why)
    images, device = dataset.train.images, dataset.train.images.device
    pool = Pool(images, rows, {}, {}, dtype)
    if not (k or pca):
        return pool
    for c in progress(classes, desc="class PCA"):
        mine = images[rows[c]]
        if pca:
            fit = cached("pca", (dataset.sha256, c, round(pca, 6)), partial(_pca, mine, pca), device)
            pool.pca[c] = ClassPCA(**{name: t.to(dtype) for name, t in fit.items()})
        if k:
            pool.near[c] = cached("near", (dataset.sha256, c, k, rank), partial(_near, mine, k, rank), device)["index"]
    return pool


def _pca(images: Tensor, retained: float) -> dict[str, Tensor]:
    return vars(class_pca(to_float(images.flatten(1)), retained))


def _near(images: Tensor, k: int, rank: int) -> dict[str, Tensor]:
    x = to_float(images.flatten(1))
    fit = class_pca(x, retained=1e-9, at_least=rank)
    return dict(index=neighbours((x - fit.mean) @ fit.directions.T, k))
