"""Alarms for catastrophic overfitting: pure functions of what training has recorded so far.

A signal alarms when it leaves the band of its own past: further from the median of the epochs before than three times the noise
from epoch to epoch, and by at least a fixed margin, so that a quiet start does not make noise an alarm (the adaptive idea is ELLE-A's).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Signal:
    """A recorded column, the direction in which it moves at CO (+1 up, -1 down, 0 either), the smallest move that counts.

    dE(x) may leave either way: at CO the energy of x* runs off, up or down, with the attack and the network.
    """

    column: str
    direction: int
    margin: float
    cost: str


SIGNALS: dict[str, Signal] = {
    "AAE share": Signal("train_aae", +1, 0.035, "free in training"),
    "dE(x)": Signal("probe_dE", 0, 0.5, "one attack on the probe"),
    "E_lin": Signal("E_lin", +1, 0.03, "three forwards on the probe"),
    "gradient cosine": Signal("cos", -1, 0.3, "two gradients on the probe"),
}


def first_alarm(epochs: pd.DataFrame, name: str, factor: float = 3.0, skip: int = 3) -> int | None:
    """The epoch (from 1) at which a signal first alarms, or None. The first ``skip`` epochs only build the history."""
    signal = SIGNALS[name]
    values = epochs[signal.column].ffill().to_numpy(float)
    for i in range(skip, len(values)):
        past = values[:i][np.isfinite(values[:i])]
        if len(past) < skip:
            continue
        middle = np.median(past)
        noise = 1.4826 * np.median(np.abs(np.diff(past))) / np.sqrt(2)  # of one epoch, whatever the drift
        move = values[i] - middle
        if (abs(move) if signal.direction == 0 else signal.direction * move) > max(signal.margin, factor * noise):
            return i + 1
    return None


def should_stop(rows: list[dict]) -> bool:
    """The default CO alarm for `TrainConfig.stop_on_co`: the AAE share in training, or dE(x) where the method has no AAEs."""
    epochs = pd.DataFrame(rows)
    name = "AAE share" if epochs["train_aae"].notna().any() else "dE(x)"
    return first_alarm(epochs, name) is not None


def step_alarm(series: np.ndarray, window: int) -> int:
    """The step (from 1) of the largest rise of a per-step series: mean of the next half window minus that of the previous."""
    half = max(1, window // 2)
    padded = np.concatenate([np.full(half, series[:half].mean()), series, np.full(half, series[-half:].mean())])
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(padded))])
    i = np.arange(len(series)) + half
    rise = (total[i + half] - total[i]) - (total[i] - total[i - half])
    return int(rise.argmax()) + 1
