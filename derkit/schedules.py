"""Learning-rate schedules as pure functions of progress in [0, 1]; each returns the factor on the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def piecewise(p: float, peak: float) -> float:
    """1, then 1/10 from half, then 1/100 from three quarters (Rice et al.)."""
    return 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01


def triangular(p: float, peak: float) -> float:
    """0 -> 1 -> 0, linear, the top at ``peak`` (Wong et al., N-FGSM: 0.5; GradAlign: 0.4)."""
    return p / peak if p < peak else (1 - p) / max(1 - peak, 1e-12)


def cosine(p: float, peak: float) -> float:
    """1 -> 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * p))


def onecycle(p: float, peak: float) -> float:
    """1/25 -> 1 -> 4e-6 by cosines, the top at ``peak`` (torch's OneCycleLR with its defaults)."""
    low, end = 1 / 25, 1 / 25 / 1e4
    start, stop, q = (low, 1.0, p / peak) if p < peak else (1.0, end, (p - peak) / max(1 - peak, 1e-12))
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * min(q, 1.0)))


def constant(p: float, peak: float) -> float:
    """1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    f.__name__: f for f in (piecewise, triangular, cosine, onecycle, constant)
}
