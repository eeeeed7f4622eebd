"""Energies of attacks and along paths, on models with known energies."""

import numpy as np
import pytest
import torch
from torch import nn

from derkit.attacks import choose_targets
from derkit.data import Split
from derkit.diagnosis import landscape
from derkit.diagnosis.evaluation import attack_split, pgd_attack, predict
from derkit.models import build_model


def test_detection_roc_against_pairs():
    rng = np.random.default_rng(0)
    natural, adversarial = rng.normal(0, 1, 70), rng.normal(-1, 1, 50)
    fpr, tpr, auc = landscape.detection_roc(natural, adversarial)
    pairs = (adversarial[:, None] < natural[None]).mean()
    assert auc == pytest.approx(pairs, abs=1e-12)
    assert fpr[0] == tpr[0] == 0 and fpr[-1] == tpr[-1] == 1
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()
    assert landscape.detection_roc(np.ones(5), np.ones(5))[2] == 0.5  # ties count half


class Linear(nn.Module):
    """Two logits, both a linear function of the image's sum: E(x) = -sum(x) - log 2 exactly."""

    def forward(self, x):
        s = x.flatten(1).sum(1, keepdim=True)
        return torch.cat([s, s], 1)


def test_path_of_a_linear_energy():
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    path = landscape.energy_path(Linear(), x, x + 0.1, torch.tensor([0, 1, 0]), points=11)
    assert path["E"].shape == (11, 3) and np.abs(np.diff(path["E"], 2, axis=0)).max() < 1e-12
    assert np.allclose(path["E"][0] - path["E"][-1], 1.6)  # dE over 16 pixels raised by 0.1


def test_attack_energies_signs_and_table():
    torch.manual_seed(0)
    model = build_model("small_cnn", 1, 10, 28, width=4).double()
    split = Split(torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8), torch.arange(16) % 10)
    results = [landscape.attack_energies(model, split, 0.1, a) for a in landscape.STANDARD_ATTACKS]
    table = landscape.energy_table(results)
    assert list(table["attack"]) == list(landscape.STANDARD_ATTACKS)
    r = results[1]
    assert table["dE(x)"][1] == pytest.approx((r.E - r.E_adv).mean())
    targeted = "PGD to least likely"
    assert table["attack"][table["reached"].notna()].tolist() == [targeted]
    zero = landscape.attack_energies(model, split, 0.0, targeted)
    assert np.array_equal(zero.E, zero.E_adv) and not zero.reached.any()


def test_which_targets_are_reached(trained, tiny):
    part = tiny.test.take(slice(32))
    goal = choose_targets(predict(trained, part), part.labels, "least_likely")
    attack = pgd_attack(0.3, steps=20, targeted=True, targets="least_likely")
    expected = attack_split(trained, part, attack).argmax(1) == goal
    found = landscape.attack_energies(trained, part, 0.3, "PGD to least likely").reached
    assert found.any() and np.array_equal(found, expected.numpy())
