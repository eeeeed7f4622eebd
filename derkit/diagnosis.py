"""Diagnosis: when did catastrophic or robust overfitting set in, what warned of it, and what does the energy look like?

Functions of a run read records only; functions of a model return arrays for `derkit.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from derkit import attacks, energy, evaluation
from derkit.alarms import SIGNALS, first_alarm, step_alarm
from derkit.data import Split
from derkit.records import Run


# -------------------------------------------------------------------------------------------- catastrophic (CO)
@dataclass(frozen=True)
class Onset:
    """CO onset: ``epoch`` (from 1) from which PGD accuracy had lost half of its ``peak``, ``step`` (from 1) of the jump that
    led to it (largest rise of the AAE share or of the adversarial training accuracy up to that epoch)."""

    epoch: int
    step: int
    peak: float
    after: float


def co_onset(run: Run, share: float = 0.5) -> Onset | None:
    """The first epoch from which validation PGD accuracy is and stays low (in three quarters of the epochs that follow).

    Low: below ``share`` of its peak so far, or of half the running adversarial training accuracy (a run can collapse before
    it was ever robust), while the FGSM or training accuracy did not fall along with it. None for a healthy run.
    """
    rows = run.epochs
    pgd, fgsm, train = (rows[c].to_numpy(float) for c in ("valid_pgd", "valid_fgsm", "train_acc"))
    reference = np.maximum(np.maximum.accumulate(pgd), train / 2)
    learnt = reference > 0.15  # below this nothing has been learnt yet, and a fall means nothing
    low = learnt & (pgd < share * reference) & ((fgsm > 1.5 * pgd) | (train > 2 * pgd))
    hits = [i for i in np.flatnonzero(low) if low[i:].mean() >= 0.75]
    if not hits:
        return None
    epoch = int(hits[0]) + 1
    per_epoch = len(rows["steps"].iloc[0]["acc"])
    name = "aae" if rows["steps"].iloc[0]["aae"][0] is not None else "acc"
    series = np.array(run.steps(name), dtype=float)
    return Onset(epoch, step_alarm(series[: epoch * per_epoch], per_epoch), float(pgd[:epoch].max()), float(pgd[epoch - 1]))


def co_alarms(run: Run) -> pd.DataFrame:
    """One row per signal (`derkit.alarms.SIGNALS`): the epoch of its alarm and its lead before the onset, in epochs.

    ``verdict`` is 'ahead', 'with', 'late', 'missed' on a collapsed run, and 'quiet' or 'false alarm' on a healthy one.
    """
    onset, rows = co_onset(run), []
    for name in SIGNALS:
        alarm = first_alarm(run.epochs, name)
        lead = onset.epoch - alarm if onset and alarm else None
        if onset is None:
            verdict = "quiet" if alarm is None else "false alarm"
        elif lead is None:
            verdict = "missed"
        else:
            verdict = "ahead" if lead > 0 else "with" if lead == 0 else "late"
        rows.append(dict(signal=name, alarm=alarm, onset=onset.epoch if onset else None, lead=lead, verdict=verdict))
    return pd.DataFrame(rows).astype({"alarm": "Int64", "onset": "Int64", "lead": "Int64"})


def alarm_summary(runs: Sequence[Run]) -> pd.DataFrame:
    """Alarms judged over many runs: per signal, in how many collapsed runs it rang no later than the onset, the median
    lead there (epochs, counting all runs in which it rang), and in how many healthy runs it rang (false alarms)."""
    tables = [co_alarms(r).set_index("signal") for r in runs]
    rows = []
    for name in SIGNALS:
        marks = [t.loc[name] for t in tables]
        bad, good = [m for m in marks if pd.notna(m["onset"])], [m for m in marks if pd.isna(m["onset"])]
        leads = [int(m["lead"]) for m in bad if pd.notna(m["lead"])]
        rows.append({"signal": name, "in time": f"{sum(lead >= 0 for lead in leads)} of {len(bad)}",
                     "rang": f"{len(leads)} of {len(bad)}", "median lead": float(np.median(leads)) if leads else np.nan,
                     "false alarms": f"{sum(pd.notna(m['alarm']) for m in good)} of {len(good)}"})
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------- robust (RO)
@dataclass(frozen=True)
class RobustOverfitting:
    """RO of a run, in accuracy: ``gap`` = best - mean of the last five epochs on validation images, ``test_gap`` = best
    - last on test images with the best epoch chosen on validation, ``onset``: first epoch from which the five-epoch mean
    stays more than one point below the best five-epoch mean (None: no RO)."""

    best_epoch: int
    best: float
    last: float
    gap: float
    test_gap: float | None
    onset: int | None
    train_gain: float


def robust_overfitting(run: Run, tail: int = 5, margin: float = 0.01) -> RobustOverfitting:
    """RO gap and onset, one fixed attack, the best epoch chosen on validation images (never on test).

    ``train_gain``: rise of the robust accuracy on training images (probe) from the best epoch to the end.
    """
    valid, probe = (run.epochs[c].to_numpy(float) for c in ("valid_pgd", "probe_pgd"))
    best = int(valid.argmax())
    last = float(valid[-tail:].mean())
    smooth = pd.Series(valid).rolling(tail, min_periods=1, center=True).mean().to_numpy()
    below = smooth < smooth.max() - margin
    below[: int(smooth.argmax()) + 1] = False
    start = len(below) - int(np.argmin(below[::-1])) if below[-1] else None  # first index of the final unbroken stretch
    test = run.final["best"]["pgd"] - run.final["last"]["pgd"] if run.final else None
    return RobustOverfitting(best + 1, float(valid[best]), last, float(valid[best] - last), test,
                             start + 1 if start is not None else None, float(probe[-tail:].mean() - probe[best]))


# ------------------------------------------------------------------------------------------------- energy of attacks
STANDARD_ATTACKS = {
    "FGSM": dict(steps=1, random_start=False, alpha_share=1.0),
    "PGD": dict(steps=20),
    "PGD, KL": dict(steps=20, loss="kl"),
    "PGD, margin": dict(steps=20, loss="margin"),
    "PGD to least likely": dict(steps=20, targeted=True, targets="least_likely"),
    "PGD to random class": dict(steps=20, targeted=True, targets="random"),
}


@dataclass(frozen=True)
class AttackEnergies:
    """Energies of a split before and after one attack; arrays (N,) in float64."""

    attack: str
    eps: float
    E: np.ndarray
    E_adv: np.ndarray
    Ey: np.ndarray
    Ey_adv: np.ndarray
    fooled: np.ndarray

    @property
    def dE(self) -> np.ndarray:
        return self.E - self.E_adv

    @property
    def dEy(self) -> np.ndarray:
        return self.Ey - self.Ey_adv


def attack_energies(model: nn.Module, split: Split, eps: float, attack: str = "PGD", seed: int = 0, **options) -> AttackEnergies:
    """Energies under one of STANDARD_ATTACKS (or any name, with PGD options given)."""
    settings = dict(STANDARD_ATTACKS.get(attack, {})) | options
    share = settings.pop("alpha_share", None)
    if share:
        settings["alpha"] = share * eps
    natural = evaluation.predict(model, split)
    _, logits = evaluation.attack_split(model, split, evaluation.pgd_attack(eps, **settings), seed)
    values = [energy.marginal_energy(natural), energy.marginal_energy(logits), energy.joint_energy(natural, split.labels),
              energy.joint_energy(logits, split.labels), logits.argmax(1) != split.labels]
    return AttackEnergies(attack, eps, *(v.cpu().numpy() if v.dtype == torch.bool else v.double().cpu().numpy() for v in values))


def energy_table(results: Sequence[AttackEnergies]) -> pd.DataFrame:
    """One row an attack: fooled share, mean dE(x), dE(x, y), and the shares of images whose E(x) and E(x, y) fell."""
    return pd.DataFrame([
        {"attack": r.attack, "eps": r.eps, "fooled": r.fooled.mean(), "dE(x)": r.dE.mean(), "dE(x,y)": r.dEy.mean(),
         "E(x) lowered": (r.dE > 0).mean(), "E(x,y) lowered": (r.dEy > 0).mean()} for r in results
    ])


def detection_roc(natural: np.ndarray, adversarial: np.ndarray, points: int = 201) -> tuple[np.ndarray, np.ndarray, float]:
    """ROC of a detector that calls low scores adversarial: (false positive rate, true positive rate, AUC).

    AUC is the exact Mann-Whitney value (ties count half); below 0.5 means that adversarial scores are the higher ones.
    """
    both = np.concatenate([natural, adversarial])
    thresholds = np.concatenate([[-np.inf], np.quantile(both, np.linspace(0, 1, points)), [np.inf]])
    natural, adversarial = np.sort(natural), np.sort(adversarial)
    fpr = np.searchsorted(natural, thresholds, side="right") / len(natural)
    tpr = np.searchsorted(adversarial, thresholds, side="right") / len(adversarial)
    less = np.searchsorted(natural, adversarial, side="right")
    less_strict = np.searchsorted(natural, adversarial, side="left")
    auc = 1 - (less + less_strict).sum() / 2 / (len(natural) * len(adversarial))
    return fpr, tpr, float(auc)


# ------------------------------------------------------------------------------------------------------ landscapes
@torch.no_grad()
def energy_path(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, points: int = 21, beyond: float = 0.0) -> dict[str, np.ndarray]:
    """Energies along x + u (x* - x), u from 0 to 1 + beyond: arrays u (U,), E, Ey, ce (U, B). Not clipped to [0, 1]."""
    u = torch.linspace(0, 1 + beyond, points, dtype=x.dtype, device=x.device)
    out: dict[str, list] = {"E": [], "Ey": [], "ce": []}
    with attacks.attack_mode(model, "eval"):
        for value in u:
            logits = model(x + value * (x_adv - x))
            out["E"].append(energy.marginal_energy(logits))
            out["Ey"].append(energy.joint_energy(logits, y))
            out["ce"].append(energy.cross_entropy(logits, y))
    return {"u": u.double().cpu().numpy()} | {k: torch.stack(v).double().cpu().numpy() for k, v in out.items()}


def bump(path: dict[str, np.ndarray], key: str = "E") -> float:
    """Mean over images of the largest |energy - chord| on the path between its ends: 0 for a linear energy."""
    u, values = path["u"], path[key]
    inside = u <= 1 + 1e-9
    u, values = u[inside][:, None], values[inside]
    return float(np.abs(values - (1 - u) * values[0] - u * values[-1]).max(0).mean())


@torch.no_grad()
def energy_slice(model: nn.Module, x: Tensor, y: Tensor, first: Tensor, second: Tensor, extent: float = 1.5,
                 points: int = 25) -> dict[str, np.ndarray]:
    """E and CE on the plane x + a first + b second around ONE image (1, C, H, W), a and b in [-extent, extent].

    Typical directions: x* - x, and a random sign vector times eps. Arrays axis (P,), E, ce (P, P) with rows b, columns a.
    """
    axis = torch.linspace(-extent, extent, points, dtype=x.dtype, device=x.device)
    out: dict[str, list] = {"E": [], "ce": []}
    with attacks.attack_mode(model, "eval"):
        for b in axis:
            logits = model(x + axis.view(-1, 1, 1, 1) * first + b * second)
            out["E"].append(energy.marginal_energy(logits))
            out["ce"].append(energy.cross_entropy(logits, y.expand(len(logits))))
    return {"axis": axis.double().cpu().numpy()} | {k: torch.stack(v).double().cpu().numpy() for k, v in out.items()}
