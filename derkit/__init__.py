"""derkit: energies of classifiers, adversarial training with DER, its diagnosis, and generation.

A kit for "Understanding Adversarial Training with Energy-based Models" (arXiv 2505.22486).
Names are imported on first use, so ``import derkit`` is quick and ``python -m derkit.training`` runs cleanly.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "config": ("TrainConfig", "parse_eps"),
    "data": ("Dataset", "Split", "load_dataset"),
    "models": ("build_model", "Normalize"),
    "energy": ("marginal_energy", "joint_energy", "delta_energy", "abnormal_mask", "trades_decomposition"),
    "attacks": ("fgsm", "rs_fgsm", "n_fgsm", "pgd"),
    "checkpoint": ("save_checkpoint", "load_checkpoint", "load_model"),
    "evaluation": ("robust_accuracy", "strong_accuracy", "autoattack"),
    "masking": ("gradient_masking",),
    "training": ("train",),
    "records": ("Run", "load_runs"),
    "generation": ("generate",),
    "gen_config": ("GenerateConfig",),
    "samples": ("Samples", "load_samples"),
    "jobs": ("prepare",),
    "metrics": ("metrics_table",),
    "extractor": ("extractor_for",),
    "errors": ("DerkitError",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"derkit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'derkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
