"""What an attack does to energies, of many images and along its path, as arrays for plots."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from derkit import energy
from derkit.attacks import attack_mode, choose_targets
from derkit.data import Split
from derkit.diagnosis.evaluation import attack_split, pgd_attack, predict

STANDARD_ATTACKS = {  # options of `attacks.pgd`
    "FGSM": dict(steps=1, random_start=False, decay=True),  # a step of 2 eps, cut to the ball
    "PGD": dict(steps=20),
    "PGD to least likely": dict(steps=20, targeted=True, targets="least_likely"),
    "PGD to random class": dict(steps=20, targeted=True, targets="random"),
}


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


@dataclass(frozen=True)
class AttackEnergies:
    """Energies of a split before and after one attack; arrays (N,) in float64."""

    attack: str
    eps: float
    E: np.ndarray
    E_adv: np.ndarray
    Ey: np.ndarray
    Ey_adv: np.ndarray
    fooled: np.ndarray  # bool
    reached: np.ndarray | None = None  # bool, attacks to the least likely class: did they get there

    dE = property(lambda self: self.E - self.E_adv)  # dE(x)
    dEy = property(lambda self: self.Ey - self.Ey_adv)  # dE(x, y)


def attack_energies(model: nn.Module, split: Split, eps: float, attack: str = "PGD", seed: int = 0,
                    **options) -> AttackEnergies:
    """Energies under one of STANDARD_ATTACKS (or any name, with PGD options given)."""
    options = STANDARD_ATTACKS.get(attack, {}) | options
    nat = predict(model, split)
    adv = attack_split(model, split, pgd_attack(eps, **options), seed)
    marginal = [_array(energy.marginal_energy(logits)) for logits in (nat, adv)]
    joint = [_array(energy.joint_energy(logits, split.labels)) for logits in (nat, adv)]
    found, reached = adv.argmax(1), None
    if options.get("targeted") and options.get("targets") == "least_likely":
        goal = choose_targets(nat, split.labels, "least_likely")
        reached = (found == goal).cpu().numpy()
    fooled = (found != split.labels).cpu().numpy()
    return AttackEnergies(attack, eps, *marginal, *joint, fooled, reached)


def energy_table(results: Sequence[AttackEnergies]) -> pd.DataFrame:
    """A row an attack: shares fooled and moved to the target (NaN without a known one), mean dE(x),
    dE(x, y), shares of images whose energy fell."""
    return pd.DataFrame([{
        "attack": r.attack, "eps": r.eps, "fooled": r.fooled.mean(),
        "reached": np.nan if r.reached is None else r.reached.mean(), "dE(x)": r.dE.mean(),
        "dE(x,y)": r.dEy.mean(), "E(x) lowered": (r.dE > 0).mean(),
        "E(x,y) lowered": (r.dEy > 0).mean()} for r in results])


def detection_roc(natural: np.ndarray, adversarial: np.ndarray,
                  points: int = 201) -> tuple[np.ndarray, np.ndarray, float]:
    """ROC of a detector that calls low scores adversarial: (false, true positive rates, AUC), AUC
    exact (Mann-Whitney, ties count half); below 0.5 adversarial scores are higher."""
    levels = np.quantile(np.concatenate([natural, adversarial]), np.linspace(0, 1, points))
    levels = np.concatenate([[-np.inf], levels, [np.inf]])
    natural, adversarial = np.sort(natural), np.sort(adversarial)
    false, true = (np.searchsorted(scores, levels, side="right") / len(scores)
                   for scores in (natural, adversarial))
    below = sum(np.searchsorted(natural, adversarial, side).sum() for side in ("left", "right"))
    return false, true, float(1 - below / 2 / (len(natural) * len(adversarial)))


@torch.no_grad()
def energy_path(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor,
                points: int = 21) -> dict[str, np.ndarray]:
    """Energies along x + u (x* - x), u from 0 to 1: arrays u (U,), E, Ey, ce (U, B)."""
    u = torch.linspace(0, 1, points, dtype=x.dtype, device=x.device)
    with attack_mode(model, "eval"):
        logits = [model(x + value * (x_adv - x)) for value in u]
    kinds = dict(E=[energy.marginal_energy(f) for f in logits],
                 Ey=[energy.joint_energy(f, y) for f in logits],
                 ce=[energy.cross_entropy(f, y) for f in logits])
    return {"u": _array(u)} | {name: _array(torch.stack(rows)) for name, rows in kinds.items()}
