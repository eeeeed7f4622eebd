"""Catastrophic (CO) and robust overfitting (RO): when it set in, what warned of it, from records.

An alarm signal rings when it leaves the band of its own past: further from the median of the epochs
before than three times the noise from epoch to epoch, and by at least a fixed margin, so that a
quiet start does not make noise an alarm (the adaptive idea is ELLE-A's)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from derkit.records import METRICS, Run


class Signal(NamedTuple):
    """A recorded column, how it moves at CO (+1 up, -1 down, 0 either), least move, and whether
    that is in units of its past median: E_lin grows with the network's logits."""

    column: str
    direction: int
    margin: float
    relative: bool = False


SIGNALS: dict[str, Signal] = {
    "AAE share": Signal("train_aae", +1, 0.035),  # free in training; the others look at the probe
    "dE(x)": Signal("probe_dE", 0, 0.5),  # one attack; E(x*) may run up or down
    "E_lin": Signal("E_lin", +1, 2.0, relative=True),  # three forwards
    "gradient cosine": Signal("cos", -1, 0.3),  # two gradients
    "PertAlign": Signal("align", -1, 0.3),  # one gradient more than the attack
}


def first_alarm(epochs: pd.DataFrame, signal: Signal, factor: float = 3.0,
                skip: int = 3) -> int | None:  # fmt: skip
    """The epoch (from 1) at which a signal first alarms, or None, after ``skip`` measured ones."""
    measured = epochs[signal.column].dropna()
    values = measured.to_numpy(float)
    for i in range(skip, len(values)):
        past = values[:i]
        noise = 1.4826 * np.median(np.abs(np.diff(past))) / np.sqrt(2)  # whatever the drift
        middle = np.median(past)
        move = signal.direction * (values[i] - middle) or abs(values[i] - middle)
        if move > max(signal.margin * (middle if signal.relative else 1), factor * noise):
            return int(measured.index[i]) + 1
    return None


def should_stop(rows: list[dict]) -> bool:
    """The CO alarm of `TrainConfig.stop_on_co`: the AAE share, or dE(x) without single steps."""
    epochs = pd.DataFrame(rows)
    name = "AAE share" if epochs["train_aae"].notna().any() else "dE(x)"
    evaluated = {SIGNALS[name].column, "valid_pgd"} <= {*epochs}  # `eval_from` may lie ahead
    return evaluated and first_alarm(epochs, SIGNALS[name]) is not None


class Onset(NamedTuple):
    """CO: ``epoch`` (from 1) from which PGD accuracy had lost half of its ``peak``, ``after``: what
    it was then."""

    epoch: int
    peak: float
    after: float


def co_onset(run: Run, share: float = 0.5) -> Onset | None:
    """The first epoch from which validation PGD accuracy is low and stays so, or None.

    Accuracies are means of three epochs, one before and one after (measure them on 1,000 images:
    100 are noise). Low: below ``share`` of the peak so far, or of half the adversarial training
    accuracy (a run can collapse before it was ever robust), while FGSM or training accuracy did not
    fall with it. Stays: in three quarters of the epochs that follow."""
    smooth = run.epochs[["valid_pgd", "valid_fgsm", "train_acc"]].astype(float)
    smooth = smooth.rolling(3, min_periods=1, center=True).mean()
    pgd, fgsm, train = smooth.to_numpy().T
    reference = np.fmax(np.fmax.accumulate(pgd), train / 2)  # fmax: NaN before `eval_from`
    low = (pgd < share * reference) & ((fgsm > 1.5 * pgd) | (train > 2 * pgd))
    low &= reference > 0.15  # below this nothing has been learnt, and a fall means nothing
    hits = [i for i in np.flatnonzero(low) if low[i:].mean() >= 0.75]
    if not hits or run.config["train"]["method"] == "standard":  # that had nothing to lose
        return None
    epoch = int(hits[0]) + 1
    return Onset(epoch, float(np.nanmax(pgd[:epoch])), float(pgd[epoch - 1]))


def co_alarms(run: Run, signals: Mapping[str, Signal] = SIGNALS) -> pd.DataFrame:
    """One row per signal that the run has (PGD training has no AAE share): epoch of its alarm, of
    the onset, lead in epochs, verdict: 'ahead', 'with', 'late' or 'missed' on a collapsed run, else
    'quiet' or 'false alarm'."""
    onset, rows = getattr(co_onset(run), "epoch", None), []
    for name, signal in signals.items():
        if not run.epochs[signal.column].notna().any():
            continue
        alarm = first_alarm(run.epochs, signal)
        lead = onset - alarm if onset and alarm else None
        verdict = "missed" if onset else "quiet"
        if alarm:
            verdict = {1: "ahead", 0: "with", -1: "late"}[np.sign(lead)] if onset else "false alarm"
        rows.append((name, alarm, onset, lead, verdict))
    table = pd.DataFrame(rows, columns=["signal", "alarm", "onset", "lead", "verdict"])
    return table.astype({"alarm": "Int64", "onset": "Int64", "lead": "Int64"})


def alarm_summary(runs: Sequence[Run], signals: Mapping[str, Signal] = SIGNALS) -> pd.DataFrame:
    """Alarms over many runs, a row per signal: in how many collapsed runs it rang by the onset
    ('in time') and at all ('rang'), median lead there (epochs), 'false alarms' in the others."""
    table = pd.concat([co_alarms(run, signals) for run in runs])
    rows = []
    for name in signals:
        marks = table[table["signal"] == name]
        bad, good = marks[marks["onset"].notna()], marks[marks["onset"].isna()]
        leads = bad["lead"].dropna().astype(float)
        rows.append({"signal": name, "in time": f"{(leads >= 0).sum()} of {len(bad)}",
                     "rang": f"{len(leads)} of {len(bad)}", "median lead": leads.median(),
                     "false alarms": f"{good['alarm'].notna().sum()} of {len(good)}"})
    return pd.DataFrame(rows)


class RobustOverfitting(NamedTuple):
    """RO of a run, in accuracy. ``gap``: best - mean of the last five epochs on validation images.
    ``test_gap``: best - last on test images, the best epoch chosen on validation. ``onset``: first
    epoch from which the five-epoch mean stays more than a point below its best (None: no RO).
    ``train_gain``: rise of PGD accuracy on training images (probe) from the best epoch on."""

    best_epoch: int
    best: float
    last: float
    gap: float
    test_gap: float | None
    onset: int | None
    train_gain: float


def robust_overfitting(run: Run, tail: int = 5, margin: float = 0.01) -> RobustOverfitting:
    """RO gap and onset, one fixed attack, the best epoch chosen on validation images, not test."""
    valid, probe = (run.epochs[c].astype(float) for c in ("valid_pgd", "probe_pgd"))
    best, last = int(valid.argmax()), float(valid[-tail:].mean())
    smooth = valid.rolling(tail, min_periods=1, center=True).mean()
    below = np.array(smooth < smooth.max() - margin)
    below[: int(smooth.argmax()) + 1] = False
    above = np.flatnonzero(~below)
    onset = int(above[-1]) + 2 if below[-1] else None  # the final unbroken stretch begins
    test = run.final["best"]["pgd"] - run.final["last"]["pgd"] if run.final else None
    gain = float(probe[-tail:].mean() - probe[best])
    peak = float(valid[best])
    return RobustOverfitting(best + 1, peak, last, peak - last, test, onset, gain)


def summary(groups: Mapping[str, Sequence[Run]], which: str = "last") -> pd.DataFrame:
    """A row per group: number of runs, how many collapsed, mean of the test metrics over seeds at
    the 'last' or the 'best' epoch, with '<metric> min' and '<metric> max' (NaN: not evaluated)."""
    rows = {}
    for name, runs in groups.items():
        row = dict(runs=len(runs), collapsed=sum(co_onset(run) is not None for run in runs))
        for metric in METRICS:
            values = [run.final[which].get(metric, np.nan) for run in runs]
            row |= {metric: np.mean(values), f"{metric} min": np.min(values),
                    f"{metric} max": np.max(values)}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")
