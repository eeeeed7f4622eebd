"""Real energies of a classifier, per class: what generated samples should look like to it, and when chains may stop.

Energies have no absolute scale: they belong to one model on one data set, and are kept with both hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from derkit import energy, keyed
from derkit.checkpoint import state_hash
from derkit.data import Dataset
from derkit.errors import DerkitError
from derkit.evaluation import predict
from derkit.fits import cached


@dataclass(frozen=True)
class Reference:
    """Energies of the correctly classified images of a split. ``joint`` (M,): E(x, y), sorted inside each class and
    laid end to end; class c is ``joint[start[c]:start[c + 1]]``. ``marginal`` (M,): E(x) likewise. ``total`` (K,):
    all images."""

    joint: Tensor
    marginal: Tensor
    start: Tensor  # (K + 1,)
    total: Tensor
    split: str
    names: tuple[str, ...]

    @property
    def counts(self) -> Tensor:
        """Correctly classified images of each class, (K,)."""
        return self.start.diff()

    def of(self, c: int, kind: str = "joint") -> Tensor:
        """The sorted energies of class c: kind 'joint' or 'marginal'."""
        return getattr(self, kind)[self.start[c] : self.start[c + 1]]

    def require(self, classes: Sequence[int], why: str) -> None:
        """Raise DerkitError if one of the classes has no correctly classified image."""
        for c in classes:
            if not self.counts[c]:
                images = f"{self.total[c]} {self.split} images of class {self.names[c]!r}"
                raise DerkitError(f"{why} needs real energies, but the model classifies none of the {images} right. "
                                  "Use stop=fixed with best_of=1, another classifier, or classes=... without it.")

    def quantile(self, labels: Tensor, u: Tensor) -> Tensor:
        """q_c(u) per chain, (B,): the u quantile of its class's real E(x, y), linear between order statistics."""
        first, last = self.start[labels], self.start[labels + 1] - 1
        at = first + u.double() * (last - first)
        low = at.floor().long()
        return torch.lerp(self.joint[low], self.joint[torch.minimum(low + 1, last)], at - low)

    def moments(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) of the class's real E(x, y) per chain, (B,) each."""
        parts = [self.of(c) for c in range(len(self.total))]
        mean = torch.stack([p.mean() if len(p) else p.new_full((), torch.nan) for p in parts])
        std = torch.stack([p.std() if len(p) > 1 else p.new_full((), torch.nan) for p in parts])
        return mean[labels], std[labels]


def reference_energies(model: nn.Module, dataset: Dataset, split: str = "train",
                       model_sha256: str | None = None) -> Reference:
    """`Reference` of a model on a split, cached under the hashes of both. One forward pass over the split, in eval
    mode.

    Raises DerkitError where the model's logits are not finite or not one per class.
    """
    sha256 = model_sha256 or state_hash(model.state_dict())
    part = getattr(dataset, split)

    def make() -> dict[str, Tensor]:
        logits = predict(model, part)
        if not torch.isfinite(logits).all():
            raise DerkitError(f"the model's logits on the {split} images are not all finite.")
        if logits.shape[1] != len(dataset.classes):
            raise DerkitError(f"the model has {logits.shape[1]} classes, the data has {len(dataset.classes)}.")
        return _by_class(logits, part.labels, len(dataset.classes))

    found = cached("energies", (sha256, dataset.sha256, split, str(part.images.device.type)), make, part.images.device)
    return Reference(**found, split=split, names=tuple(dataset.classes))


def _by_class(logits: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    right = logits.argmax(1) == labels
    f, y = logits[right].double(), labels[right]
    joint, marginal = energy.joint_energy(f, y), energy.marginal_energy(f)

    def sort(values: Tensor) -> Tensor:
        return torch.cat([values[y == c].sort().values for c in range(classes)])

    start = torch.cat([y.new_zeros(1), torch.bincount(y, minlength=classes).cumsum(0)])
    total = torch.bincount(labels, minlength=classes)
    return dict(joint=sort(joint), marginal=sort(marginal), start=start, total=total)


def energy_targets(reference: Reference, index: Tensor, labels: Tensor, seed: int, low: float, high: float) -> Tensor:
    """e* = q_c(u), u ~ U(low, high) keyed by the sample, (B,) float64: each chain aims at the energy of some real
    image of its class, so that the energies of samples spread as those of the data do (our reading of "adaptive
    stopping")."""
    u = keyed.uniform(index, 1, seed, "target", dtype=torch.float64).squeeze(1)
    return reference.quantile(labels, low + (high - low) * u)
