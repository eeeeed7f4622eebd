"""Evaluation: accuracies on models with known robustness, the strong suite, AutoAttack, energy statistics."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from derkit import evaluation
from derkit.attacks import input_gradient
from derkit.data import Split
from derkit.energy import cross_entropy
from derkit.errors import DerkitError
from derkit.evaluation import robust_accuracy, strong_accuracy, strong_mask


class Brightness(nn.Module):
    """Three classes; the prediction is 'bright' (1) if the mean pixel is above 1/2, else 'dark' (0)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        t = (x.mean((1, 2, 3)) - 0.5) * self.scale
        return torch.stack([-t, t, torch.full_like(t, -9.0)], 1)


@pytest.fixture
def greys():
    """Constant images at known distances from the boundary; the last one is labelled wrongly."""
    levels = torch.tensor([10, 60, 100, 120, 140, 160, 200, 250, 30], dtype=torch.uint8)
    labels = (levels > 127).long()
    labels[-1] = 1
    return Split(levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), labels)


@pytest.fixture
def part(mini):
    return mini.test.take(slice(64))


def known(split, eps):
    """Which of the grey images survive every L_inf attack of radius eps."""
    distance = (split.images[:, 0, 0, 0] / 255 - 0.5).abs()
    return (distance > eps) & (torch.arange(len(split)) < len(split) - 1)


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.1, 0.25, 0.45])
def test_known_robustness(greys, eps):
    model, expected = Brightness(), known(greys, eps)
    assert robust_accuracy(model, greys, eps) == pytest.approx(expected.double().mean().item())
    assert torch.equal(strong_mask(model, greys, eps, steps=10), expected)
    assert strong_accuracy(model, greys, eps, steps=10) == pytest.approx(expected.double().mean().item())


def test_known_robustness_l2(greys):
    """For a 4x4 image a mean shift of d costs 4 d in L_2."""
    model = Brightness()
    assert robust_accuracy(model, greys, 0.4, norm="l2") == pytest.approx(known(greys, 0.1).double().mean().item())
    assert torch.equal(strong_mask(model, greys, 0.4, steps=10, norm="l2"), known(greys, 0.1))


def test_strong_sees_through_saturated_logits(greys):
    """Huge logits leave the cross-entropy without a gradient: PGD on it finds nothing, the margin loss does."""
    model = Brightness()
    model.scale.data.fill_(1e5)
    assert robust_accuracy(model, greys, 0.1, random_start=False) == robust_accuracy(model, greys, 0.0)
    assert torch.equal(strong_mask(model, greys, 0.1, steps=10), known(greys, 0.1))


def test_strong_below_pgd_below_clean(trained, part):
    clean = evaluation.accuracy(evaluation.predict(trained, part), part.labels)
    for eps in (0.02, 0.05):
        robust = robust_accuracy(trained, part, eps, steps=10)
        strong = strong_accuracy(trained, part, eps, steps=20)
        assert strong <= robust <= clean
    assert clean > 0.6 and strong < clean


def test_eps_0_is_clean_accuracy(trained, part):
    clean = evaluation.accuracy(evaluation.predict(trained, part), part.labels)
    assert robust_accuracy(trained, part, 0) == clean == strong_accuracy(trained, part, 0.0)
    assert robust_accuracy(trained, part, 0, norm="l2") == clean


def test_robust_accuracy_falls_with_eps(trained, part):
    values = [robust_accuracy(trained, part, eps, steps=5) for eps in (0, 0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] - 0.3


def test_the_given_eps_is_used(trained, part):
    """Every evaluation attack moves up to the eps that was asked for, not further."""
    for attack in (evaluation.fgsm_attack(0.03), evaluation.pgd_attack(0.03, 10)):
        x_adv, logits = evaluation.attack_split(trained, part, attack)
        assert (x_adv - part.floats()).abs().max().item() == pytest.approx(0.03, abs=1e-6)
        torch.testing.assert_close(logits, trained(x_adv).detach())
    x_adv, _ = evaluation.attack_split(trained, part, evaluation.fgsm_attack(0.5, norm="l2"))
    assert 0.4 < (x_adv - part.floats()).flatten(1).norm(dim=1).max().item() <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(
    "evaluate",
    [
        robust_accuracy,
        strong_accuracy,
        lambda m, s, eps: evaluation.autoattack(m, s, eps),
        lambda m, s, eps: evaluation.attack_split(m, s, evaluation.fgsm_attack(eps)),
    ],
)
@pytest.mark.parametrize("eps", [8, -0.1, "8/255"])
def test_bad_eps(evaluate, eps, trained, part):
    with pytest.raises(DerkitError, match="eps"):
        evaluate(trained, part, eps)


def test_batch_size_does_not_matter_without_noise(trained, part):
    attack = evaluation.pgd_attack(0.05, 3, random_start=False)
    whole, pieces = (evaluation.attack_split(trained, part, attack, batch_size=n)[1] for n in (64, 10))
    torch.testing.assert_close(whole, pieces)
    torch.testing.assert_close(evaluation.predict(trained, part, 7), evaluation.predict(trained, part))
    assert torch.equal(strong_mask(trained, part, 0.0, batch_size=9), strong_mask(trained, part, 0.0))


def test_seeded(trained, part):
    attack = evaluation.pgd_attack(0.05, 2)
    one, two, other = (evaluation.attack_split(trained, part, attack, seed=s)[0] for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(strong_mask(trained, part, 0.05, steps=3), strong_mask(trained, part, 0.05, steps=3))


def test_generators_of_different_purposes_differ():
    draws = {
        tuple(torch.rand(2, generator=evaluation.make_generator("cpu", *seed)).tolist())
        for seed in [("a", 0), ("a", 1), ("b", 0), (0,), ("a", 0, 0)]
    }
    assert len(draws) == 5
    a, b = (torch.rand(2, generator=evaluation.make_generator("cpu", "a", 3)) for _ in range(2))
    assert torch.equal(a, b)


def test_nothing_is_left_behind(trained, part):
    """Mode, statistics, gradients and the global random state are as before."""
    trained.train()
    before, random = {k: v.clone() for k, v in trained.state_dict().items()}, torch.get_rng_state()
    (
        robust_accuracy(trained, part, 0.05, steps=2),
        strong_mask(trained, part, 0.05, steps=2),
        evaluation.predict(trained, part),
    )
    assert all(m.training for m in trained.modules()) and all(p.grad is None for p in trained.parameters())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_evaluation_follows_the_models_dtype(trained, part):
    assert evaluation.predict(trained.double(), part).dtype == torch.float64
    assert evaluation.attack_split(trained, part, evaluation.pgd_attack(0.1, 1))[0].dtype == torch.float64
    assert evaluation.predict(trained.bfloat16(), part).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- AutoAttack
def test_autoattack_record(trained, part):
    pytest.importorskip("pyautoattack", reason="pyautoattack (extra: eval) is not installed")
    few = part.take(slice(8))
    random = torch.get_rng_state()
    trained.train()
    record = evaluation.autoattack(trained, few, 0.2, seed=3)
    assert {"attack", "accuracy", "clean", "examples", "seed", "eps", "norm", "package", "version"} == set(record)
    assert (record["attack"], record["examples"], record["seed"], record["eps"], record["norm"]) == (
        "AutoAttack standard",
        8,
        3,
        0.2,
        "linf",
    )
    assert record["package"] == "pyautoattack" and record["version"][0].isdigit()
    assert record["clean"] == evaluation.accuracy(evaluation.predict(trained, few), few.labels)
    assert record["accuracy"] <= robust_accuracy(trained, few, 0.2) <= record["clean"]
    assert all(m.training for m in trained.modules()) and torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())


def test_autoattack_of_a_float64_model_with_nobody_to_attack(trained, part):
    """Images that are misclassified already are counted, not attacked."""
    pytest.importorskip("pyautoattack", reason="pyautoattack (extra: eval) is not installed")
    wrong = evaluation.predict(trained.double(), part).argmax(1) != part.labels
    record = evaluation.autoattack(trained, part.take(wrong), 0.01)
    assert record["accuracy"] == record["clean"] == 0 and record["examples"] == wrong.sum()


@pytest.mark.parametrize("classes", [4, 10, 20])
def test_autoattack_with_few_classes(classes, net, part, monkeypatch):
    """Its targeted attacks try 9 wrong classes (the standard), or all that there are; below 4 they are not defined."""
    package = pytest.importorskip("pyautoattack", reason="pyautoattack (extra: eval) is not installed")
    few, seen = Split(part.images[:4], torch.zeros(4, dtype=torch.long)), []

    def run(self, x, y, **kw):
        seen.extend([self.apgd_targeted.n_target_classes, self.fab.n_target_classes, self.epsilon, self.norm, self.seed])
        seen.append(any(p.requires_grad for p in model.parameters()) or model.training)
        return x, y

    monkeypatch.setattr(package.AutoAttack, "run_standard_evaluation", run)
    model = net(classes=classes).train()
    evaluation.autoattack(model, few, 0.3, norm="l2", seed=5)
    assert seen == [min(9, classes - 1)] * 2 + [0.3, "L2", 5, False]  # in eval mode, and no gradients for parameters
    assert model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(DerkitError, match="at least 4 classes, found 3"):
        evaluation.autoattack(net(classes=3), few, 0.3)


def test_autoattack_errors(trained, part, monkeypatch):
    with pytest.raises(DerkitError, match="eps > 0"):
        evaluation.autoattack(trained, part, 0.0)
    with pytest.raises(DerkitError, match="norm"):
        evaluation.autoattack(trained, part, 0.1, norm="l1")
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(DerkitError, match=r'pip install "derkit\[eval\]"'):
        evaluation.autoattack(trained, part, 0.1)


# ------------------------------------------------------------------------------------------------- energy statistics
def test_energy_summary_by_numpy():
    generator = torch.Generator().manual_seed(0)
    f, g, start = (torch.randn(50, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(3))
    y = torch.arange(50) % 5
    out = evaluation.energy_summary(f, g, y)
    lse = [np.log(np.exp(z.numpy()).sum(1)) for z in (f, g)]
    picked = [z.numpy()[np.arange(50), y.numpy()] for z in (f, g)]
    d, dy = lse[1] - lse[0], picked[1] - picked[0]
    levels = {"q05": 5, "q25": 25, "q50": 50, "q75": 75, "q95": 95}
    expected = {"dE": d.mean(), "dEy": dy.mean(), "E": -lse[0].mean(), "E_adv": -lse[1].mean(), "aae": (d < dy).mean()}
    expected |= {f"dE_{k}": np.percentile(d, q) for k, q in levels.items()} | {
        f"dEy_{k}": np.percentile(dy, q) for k, q in levels.items()
    }
    assert out == pytest.approx(expected, abs=1e-6) and set(out) == set(expected)
    other = evaluation.energy_summary(f, g, y, start)
    assert other["aae"] == pytest.approx(
        (cross_entropy(g, y) < cross_entropy(start, y)).double().mean().item(), abs=1e-6
    )
    assert other["dE"] == out["dE"]


def test_gradient_cosine(trained, part, seeded):
    x, y = part.floats(dtype=torch.float64), part.labels
    trained.double()
    assert evaluation.gradient_cosine(trained, x, y, 0.0, seeded()).min() > 1 - 1e-6
    noisy = x + (2 * torch.rand(x.shape, generator=seeded(), dtype=x.dtype) - 1) * 0.1
    a, b = (input_gradient(trained, z, lambda f: cross_entropy(f, y))[0].flatten(1) for z in (x, noisy))
    expected = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(evaluation.gradient_cosine(trained, x, y, 0.1, seeded()), expected)


def test_elle_linearity(trained, part, seeded):
    x, y = part.floats(dtype=torch.float64), part.labels
    value = evaluation.elle_linearity(trained.double(), x, y, 0.1, seeded())
    assert value.shape == y.shape and (value >= 0).all() and value.mean() > 0
    assert evaluation.elle_linearity(trained, x, y, 0.0, seeded()).max() < 1e-12
    g = seeded()
    a, b = (x + (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1) * 0.1 for _ in range(2))
    u = torch.rand(len(x), generator=g, dtype=x.dtype)
    with torch.no_grad():
        la, lb, lc = (cross_entropy(trained(z), y) for z in (a, b, a + u.view(-1, 1, 1, 1) * (b - a)))
    torch.testing.assert_close(value, (lc - la - u * (lb - la)).square())
