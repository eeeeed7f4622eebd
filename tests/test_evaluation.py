"""Evaluation on models of known robustness, the strong suite, AutoAttack, energy statistics."""

import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from derkit.attacks import input_gradient
from derkit.data import Split
from derkit.diagnosis import evaluation
from derkit.diagnosis.evaluation import (
    autoattack_mask,
    robust_accuracy,
    strong_accuracy,
    strong_mask,
)
from derkit.energy import cross_entropy
from derkit.util import DerkitError, images_format, make_generator


class Brightness(nn.Module):
    """Four classes: 'bright' (1) if the mean pixel is above 1/2, 'dark' (0) if not, and no more."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        t = (x.mean((1, 2, 3)) - 0.5) * self.scale
        return torch.stack([-t, t, torch.full_like(t, -9.0), torch.full_like(t, -10.0)], 1)


@pytest.fixture
def greys():
    """Constant images at known distances from the boundary; the last one is labelled wrongly."""
    levels = torch.tensor([10, 60, 100, 120, 140, 160, 200, 250, 30], dtype=torch.uint8)
    labels = (levels > 127).long()
    labels[-1] = 1
    return Split(levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), labels)


def known(split, eps):
    """Which of the grey images survive every L_inf attack of radius eps."""
    distance = (split.images[:, 0, 0, 0] / 255 - 0.5).abs()
    return (distance > eps) & (torch.arange(len(split)) < len(split) - 1)


@pytest.fixture
def part(mini):
    return mini.test.take(slice(64))


@pytest.mark.parametrize("norm, unit", [("linf", 1), ("l2", 4)])  # a shift d costs 4 d in L_2
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.25])
def test_known_robustness(greys, eps, norm, unit):
    """The accuracies and the mask are those of the distances; at eps 0 that is the clean one."""
    model, expected = Brightness(), known(greys, eps)
    share, radius = expected.double().mean().item(), dict(eps=unit * eps, norm=norm)
    assert torch.equal(strong_mask(model, greys, steps=10, **radius), expected)
    assert strong_accuracy(model, greys, steps=10, **radius) == share
    assert robust_accuracy(model, greys, **radius) == share
    assert evaluation.pgd50_accuracy(model, greys, restarts=2, **radius) == share


def test_strong_sees_through_saturated_logits(greys):
    """Huge logits leave CE without a gradient: PGD on it finds nothing, the margin loss does."""
    model = Brightness()
    model.scale.data.fill_(1e5)
    assert robust_accuracy(model, greys, 0.1, random_start=False) == 8 / 9
    assert torch.equal(strong_mask(model, greys, 0.1, steps=10), known(greys, 0.1))


def test_restarts_and_survivors(trained, part, monkeypatch):
    """An image counts if it survives ALL restarts; what has fallen is not attacked again."""
    spy = Mock(wraps=evaluation.attacks.pgd)
    monkeypatch.setattr(evaluation.attacks, "pgd", spy)
    settings = dict(eps=0.05, steps=1, alpha=0.05)
    one, five = (evaluation.pgd50_accuracy(trained, part, restarts=n, **settings) for n in (1, 5))
    assert five <= one
    clean = (evaluation.predict(trained, part).argmax(1) == part.labels).sum().item()
    sizes = [len(call.args[1]) for call in spy.call_args_list]
    assert sizes[:3] == [clean, clean, one * len(part)]
    assert sizes[1:] == sorted(sizes[1:], reverse=True)


def test_the_given_eps_is_used(trained, part):
    """Every evaluation attack moves up to the eps that was asked for, not further."""
    x = part.floats()
    for attack in (evaluation.fgsm_attack(0.03), evaluation.pgd_attack(0.03, 10)):
        x_adv = attack(trained, x, part.labels, make_generator("cpu", "evaluation", 0))
        assert (x_adv - x).abs().max().item() == pytest.approx(0.03, abs=1e-6)
        logits = evaluation.attack_split(trained, part, attack)
        torch.testing.assert_close(logits, trained(x_adv).detach())
    x_adv = evaluation.fgsm_attack(0.5, norm="l2")(trained, x, part.labels, None)
    assert 0.4 < (x_adv - x).flatten(1).norm(dim=1).max().item() <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("evaluate", [robust_accuracy, strong_accuracy, autoattack_mask])
@pytest.mark.parametrize("eps", [8, -0.1, "8/255"])
def test_bad_eps(evaluate, eps, trained, part):
    with pytest.raises(DerkitError, match="eps"):
        evaluate(trained, part, eps)


@pytest.mark.parametrize("attack, more", [(strong_accuracy, {"steps": 2}), (autoattack_mask, {})])
def test_nothing_is_left_behind(attack, more, trained, part):
    """Mode, statistics, gradients and the global random state are as before."""
    pytest.importorskip("pyautoattack")
    trained.train()
    before, random = {k: v.clone() for k, v in trained.state_dict().items()}, torch.get_rng_state()
    attack(trained, part.take(slice(8)), 0.2, **more)
    assert all(m.training for m in trained.modules()) and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_batches_are_what_the_model_wants(net, trained, part):
    """Its dtype and memory format; logits are float32 at least."""
    x, _ = next(evaluation.float_batches(part, net(width=16), 30))
    assert x.is_contiguous(memory_format=images_format(net(width=16)))
    assert evaluation.predict(trained.double(), part).dtype == torch.float64
    assert evaluation.predict(trained.bfloat16(), part).dtype == torch.float32


def test_autoattack_agrees_with_known_robustness(greys):
    """An oracle: where distances are known it finds what the strong suite finds."""
    pytest.importorskip("pyautoattack")
    found = autoattack_mask(Brightness().double(), greys, 0.25)
    assert torch.equal(found, known(greys, 0.25))
    assert not autoattack_mask(Brightness(), greys.take(slice(8, None)), 0.25)  # wrong already


@pytest.mark.parametrize("classes", [4, 20])
def test_autoattack_with_few_classes(classes, net, part, monkeypatch):
    """Its targeted attacks try 9 wrong classes (the standard), or all that there are."""
    package = pytest.importorskip("pyautoattack")
    few, seen = Split(part.images[:4], torch.zeros(4, dtype=torch.long)), []

    def run(self, x, y, **options):
        seen.extend([self.apgd_targeted.n_target_classes, self.fab.n_target_classes])
        seen.extend([self.epsilon, self.norm, self.seed, self.model(x).requires_grad])
        return x, y

    monkeypatch.setattr(package.AutoAttack, "run_standard_evaluation", run)
    autoattack_mask(net(classes=classes), few, 0.3, norm="l2", seed=5)
    assert seen == [min(9, classes - 1)] * 2 + [0.3, "L2", 5, False]  # no gradients for weights
    with pytest.raises(DerkitError, match="4 classes, found 0.3 and 3:"):
        autoattack_mask(net(classes=3), few, 0.3)


def test_autoattack_errors(trained, part, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for eps, norm, text in ((0.0, "linf", "eps > 0"), (0.1, "l1", "norm 'l1'"),
                            (0.1, "linf", r'pip install "derkit\[eval\]"')):
        with pytest.raises(DerkitError, match=text):
            autoattack_mask(trained, part, eps, norm=norm)


def test_energy_summary_by_numpy(seeded):
    rng = seeded()
    f, g, start = (torch.randn(50, 5, generator=rng, dtype=torch.float64) * 3 for _ in range(3))
    y = torch.arange(50) % 5
    out = evaluation.energy_summary(f, g, y)
    lse = [np.log(np.exp(z.numpy()).sum(1)) for z in (f, g)]
    d, dy = lse[1] - lse[0], (g - f).numpy()[np.arange(50), y.numpy()]
    expected = {"E": -lse[0].mean(), "E_adv": -lse[1].mean(), "aae": (d < dy).mean(),
                "dE": d.mean(), "dEy": dy.mean()}
    assert out == pytest.approx(expected, abs=1e-6)
    lowered = (cross_entropy(g, y) < cross_entropy(start, y)).double().mean().item()
    other = evaluation.energy_summary(f, g, y, start)
    assert other == pytest.approx(expected | dict(aae=lowered), abs=1e-6)


def test_gradient_cosine(trained, part, seeded):
    x, y = part.floats(dtype=torch.float64), part.labels
    noisy = x + (2 * torch.rand(x.shape, generator=seeded(), dtype=x.dtype) - 1) * 0.1
    value = evaluation.gradient_cosine(trained.double(), x, noisy, y)
    a, b = (input_gradient(trained, z, lambda f: cross_entropy(f, y))[0].flatten(1)
            for z in (x, noisy))
    torch.testing.assert_close(value, (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))
    assert evaluation.gradient_cosine(trained, x, x, y).min() > 1 - 1e-6
