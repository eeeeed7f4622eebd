"""When chains end: stop rules by name, one signature, and the real energies that they hold a chain against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from derkit.errors import DerkitError
from derkit.gen_config import GenerateConfig
from derkit.targets import Reference, energy_targets


@dataclass(frozen=True)
class Check:
    """What a stop rule may look at, (B,) each: the energy now, the chain's target, its class's mean and deviation."""

    joint: Tensor
    target: Tensor
    mean: Tensor
    std: Tensor


def fixed(check: Check, config: GenerateConfig) -> Tensor:
    """Never: every chain takes config.steps steps."""
    return torch.zeros_like(check.joint, dtype=torch.bool)


def mean_band(check: Check, config: GenerateConfig) -> Tensor:
    """(E(x, y) - mean of the class)^2 small: the two-sided band of the ECCV'24 code, whose width is nowhere stated;
    ours is ``band`` class standard deviations. A chain that steps over the band never stops.
    """
    return (check.joint - check.mean).abs() < config.band * check.std


def quantile(check: Check, config: GenerateConfig) -> Tensor:
    """E(x, y) <= e*: the chain has come down to the energy of a real image of its class (one-sided, our reading)."""
    return check.joint <= check.target


Stop = Callable[[Check, GenerateConfig], Tensor]
STOPS: dict[str, Stop] = {"fixed": fixed, "mean_band": mean_band, "quantile": quantile}


@dataclass(frozen=True)
class Limits:
    """Energies that chains are held against, (n,) float64 each, NaN where there are none."""

    target: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def make(cls, reference: Reference | None, index: Tensor, labels: Tensor, config: GenerateConfig,
             target: Tensor | None) -> Limits:
        """From real energies; ``target`` replaces e*. Raises DerkitError where the stop needs what is not given."""
        known = reference is not None and bool((reference.counts[labels] > 0).all())
        if not known and config.stop != "fixed" and (config.stop != "quantile" or target is None):
            raise DerkitError(f"stop={config.stop} needs real energies of every class: pass reference_energies(...).")
        none = torch.full(labels.shape, torch.nan, dtype=torch.float64, device=labels.device)
        mean, std = reference.moments(labels) if known else (none, none)
        if target is None:
            drawn = (index, labels, config.seed, config.low, config.high)
            target = energy_targets(reference, *drawn) if known else none
        return cls(target.double(), mean, std)

    def stop(self, values: Tensor, rows: Tensor, step: int, config: GenerateConfig) -> Tensor:
        """Which of the chains ``rows`` end now, given their readings (3, B) after ``step`` steps."""
        check = Check(values[0], self.target[rows], self.mean[rows], self.std[rows])
        return STOPS[config.stop](check, config) & (values[2] >= config.p_min) & (step >= config.min_steps)
