"""The configuration of a generation: typed, validated, one help text per field, with the ECCV'24 values beside ours."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from typing import Any

from derkit.config import AUTO, _coerce, _opt
from derkit.errors import DerkitError, nearest, unknown

INIT_NAMES = ("uniform", "class_gaussian", "pca_published", "pca", "local_pca", "noisy_images")
STOP_NAMES = ("fixed", "mean_band", "quantile")
RULE_NAMES = ("normalised", "plain")


@dataclass(frozen=True)
class GenerateConfig:
    """Everything that generated images depend on beside the model and the data. ``GenerateConfig.make`` reads text too.

    "published": the code of arXiv 2407.06315 (ECCV'24). Local PCA, the quantile stop and w are our reading of the
    abstract of arXiv 2505.22486, whose body could not be obtained.
    """

    n: int = _opt(64, "images to generate, spread evenly over the classes", paper="10000", low=1)
    seed: int = _opt(0, "seed of everything random", low=0)
    classes: str = _opt("all", "all, or class names or numbers separated by commas", paper="all")
    # start
    init: str = _opt("local_pca", "where chains start", paper="pca_published", choices=INIT_NAMES)
    scale: float = _opt(1.0, "pca, class_gaussian: spread in standard deviations of the class",
                        paper="0.354 at 5,000 images a class", low=0)
    retained: str | float = _opt(AUTO, "share of variance the PCA inits keep, in (0, 1]; auto: 0.95 (local_pca: 1)",
                                 paper="0.80 to 0.99, 0.95 by default", auto="float")
    k: int = _opt(32, "local_pca: nearest neighbours of the anchor inside its class, the anchor left out", low=2)
    tau: float = _opt(1.0, "local_pca: spread in standard deviations of the neighbourhood", low=0)
    rank: int = _opt(128, "local_pca: class-PCA coordinates in which neighbours are searched", low=1)
    best_of: int = _opt(1, "starts drawn per sample; the energy nearest to the target is kept", paper="1", low=1)
    image_noise: float = _opt(0.3, "noisy_images: standard deviation of the noise on a training image",
                              paper="1.57, on test images", low=0)
    # descent on E(x) + w (-log p(y|x))
    w: float = _opt(1.0, "guidance: 0 = E(x), 1 = E(x, y), above 1 = over-emphasised class", paper="1", low=0)
    rule: str = _opt("normalised", "step: -eta g/|g| (compares models fairly), or plain -eta/2 g", paper="plain",
                     choices=RULE_NAMES)
    eta: float = _opt(0.25, "step size", paper="0.025 to 0.8", low=0)
    momentum: float = _opt(0.8, "zeta", paper="0 or 0.8", low=0)
    noise: float = _opt(1e-3, "standard deviation of a step's noise; none on the last", paper="0.3 to 1.4e-3", low=0)
    steps: int = _opt(50, "most steps of a chain (stop=fixed: the number of steps)", paper="20 to 500", low=0)
    # stop
    stop: str = _opt("quantile", "when a chain ends", paper="fixed or mean_band", choices=STOP_NAMES)
    low: float = _opt(0.0, "quantile: lowest quantile of the class's real energies that a chain may aim at", low=0)
    high: float = _opt(0.5, "quantile: highest one", low=0)
    band: float = _opt(0.5, "mean_band: half-width in standard deviations of the class's real energies",
                       paper="not stated", low=0)
    min_steps: int = _opt(0, "steps before a chain may stop", low=0)
    p_min: float = _opt(0.0, "p(y|x) below which a chain may not stop", low=0)
    reference: str = _opt("train", "split whose correctly classified images give the real energies",
                          choices=("train", "valid"))
    # run
    precision: str = _opt(AUTO, "auto: the model's; bf16: autocast on a GPU, energies in float32",
                          choices=(AUTO, "fp32", "fp64", "bf16"))
    batch_size: int = _opt(256, "chains at a time", low=1, identity=False)
    shard_size: int = _opt(1000, "images a file", low=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _coerce(f, getattr(self, f.name)))
        if self.momentum >= 1:
            raise DerkitError(f"momentum must be below 1, found {self.momentum}.")
        if not self.low <= self.high <= 1:
            raise DerkitError(f"low and high are quantiles, 0 <= low <= high <= 1, found {self.low} and {self.high}.")
        if not 0 < self.kept <= 1:
            raise DerkitError(f"retained is a share of variance in (0, 1], found {self.retained}.")
        if self.p_min >= 1:
            raise DerkitError(f"p_min is a probability below 1, found {self.p_min}.")

    @property
    def kept(self) -> float:
        """``retained`` with 'auto' resolved."""
        if self.retained != AUTO:
            return self.retained
        return 1.0 if self.init == "local_pca" else 0.95

    @classmethod
    def make(cls, **overrides: Any) -> GenerateConfig:
        """A config from values or text. Raises DerkitError for unknown names, with the nearest valid one."""
        check_names(overrides)
        return cls(**overrides)

    def change(self, **overrides: Any) -> GenerateConfig:
        """A copy with some fields changed, checked like ``make``."""
        check_names(overrides)
        return replace(self, **overrides)

    def class_numbers(self, names: list[str]) -> list[int]:
        """The chosen classes as numbers. Raises DerkitError for one that the data does not have."""
        if self.classes == "all":
            return list(range(len(names)))
        numbers = []
        for word in (w.strip() for w in self.classes.split(",")):
            if word in names:
                numbers.append(names.index(word))
            elif word.isdigit() and int(word) < len(names):
                numbers.append(int(word))
            else:
                raise unknown("class", word, names)
        if len(set(numbers)) < len(numbers):
            raise DerkitError(f"classes names a class twice: {self.classes!r}.")
        return numbers

    def as_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold and ``GenerateConfig(**d)`` reads back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def identity(self) -> dict[str, Any]:
        """The fields that change results (all but the batch size)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["identity"]}

    def hash(self, *more: str) -> str:
        """Eight hex digits over every field that changes results, and whatever else is given (model, data)."""
        return hashlib.sha256((json.dumps(self.identity(), sort_keys=True) + "".join(more)).encode()).hexdigest()[:8]


def check_names(overrides: dict[str, Any]) -> None:
    """Raise DerkitError for a name that is not a field, with the nearest one."""
    names = [f.name for f in fields(GenerateConfig)]
    for key in overrides:
        if key not in names:
            hint = "See python -m derkit.generation --help."
            raise DerkitError(f"unknown parameter {key!r}.{nearest(key, names)} {hint}")


def help_text() -> str:
    """Every field with default, published value and meaning, one a line."""
    lines = ["fields (--set name=value):"]
    for f in fields(GenerateConfig):
        paper = f"  [ECCV'24: {f.metadata['paper']}]" if f.metadata["paper"] else ""
        choices = f"  {{{', '.join(f.metadata['choices'])}}}" if f.metadata["choices"] else ""
        lines.append(f"  {f.name}={f.default}  {f.metadata['help']}{choices}{paper}")
    return "\n".join(lines)
