"""Training methods: names, losses against references, the attack that each of them runs."""

import pytest
import torch
from torch.nn import functional as F

from derkit import attacks
from derkit.config import METHOD_NAMES
from derkit.losses import METHODS, Step

TIGHT = dict(rtol=0, atol=1e-12)


@pytest.fixture
def step(trained, batch, config, seeded):
    """A float64 step whose x* is a given noisy image; the model is in eval mode, so forwards can be compared."""

    def make(method, **overrides):
        x, y = batch
        step = Step(trained.double(), x.double(), y, config(method=method, precision="fp64", **overrides), seeded())
        step.x_adv = (step.x + 0.1 * torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)).clamp(0, 1)
        return step

    return make


def logits(step):
    return {"adv": step.model(step.x_adv), "nat": step.model(step.x)}


def test_names_match_the_config():
    assert set(METHODS) == set(METHOD_NAMES)


@pytest.mark.parametrize("name", ["standard", "fgsm", "rs_fgsm", "n_fgsm", "pgd"])
def test_adversarial_loss_is_cross_entropy_on_x_adv(name, step):
    s = step(name)
    f = logits(s)
    torch.testing.assert_close(METHODS[name].loss(f, s), F.cross_entropy(f["adv"], s.y), **TIGHT)
    assert METHODS[name].points == ()


def test_trades_reference(step):
    s = step("trades", beta=2.5)
    f = logits(s)
    expected = F.cross_entropy(f["nat"], s.y) + 2.5 * F.kl_div(
        f["adv"].log_softmax(1), f["nat"].softmax(1), reduction="batchmean"
    )
    torch.testing.assert_close(METHODS["trades"].loss(f, s), expected, **TIGHT)


def test_weat_reference(step):
    """Each sample's TRADES terms times 1 / log(1 + e^|E(x)|)."""
    s = step("weat", beta=6)
    f = logits(s)
    expected = 0.0
    for i in range(len(s.y)):
        nat, adv = f["nat"][i], f["adv"][i]
        weight = 1 / torch.log(1 + torch.exp(torch.logsumexp(nat, 0).abs()))
        kl = (nat.softmax(0) * (nat.log_softmax(0) - adv.log_softmax(0))).sum()
        expected += weight * (F.cross_entropy(nat[None], s.y[i : i + 1]) + 6 * kl)
    torch.testing.assert_close(METHODS["weat"].loss(f, s), expected / len(s.y), **TIGHT)


def test_weat_weights_are_detached(step):
    """The gradient is that of the terms with the weights held fixed."""
    s = step("weat", beta=6)
    f = {k: v.detach().requires_grad_(True) for k, v in logits(s).items()}
    grad = torch.autograd.grad(METHODS["weat"].loss(f, s), f["nat"])[0]
    weight = 1 / F.softplus(torch.logsumexp(f["nat"], 1).abs()).detach()
    kl = F.kl_div(f["adv"].log_softmax(1), f["nat"].softmax(1), reduction="none").sum(1)
    fixed = (weight * (F.cross_entropy(f["nat"], s.y, reduction="none") + 6 * kl)).mean()
    torch.testing.assert_close(grad, torch.autograd.grad(fixed, f["nat"])[0], **TIGHT)


@pytest.mark.parametrize("name", ["trades", "weat"])
def test_trades_gradient_flows_through_both(name, step):
    s = step(name)
    f = {k: v.detach().requires_grad_(True) for k, v in logits(s).items()}
    grads = torch.autograd.grad(METHODS[name].loss(f, s), [f["nat"], f["adv"]])
    assert all(g.abs().sum() > 0 for g in grads)


def test_trades_with_beta_0_is_clean_training(step):
    s = step("trades", beta=0)
    f = logits(s)
    torch.testing.assert_close(METHODS["trades"].loss(f, s), F.cross_entropy(f["nat"], s.y), **TIGHT)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_attack_of_each_method(name, step, seeded):
    """The config's eps, step size, noise, steps, norm and BatchNorm mode reach the attack."""
    own = {"fgsm": {}, "n_fgsm": dict(alpha=0.05, k=3)}.get(name, dict(alpha=0.05))
    s = step(name, eps=0.07, **own, steps=3, attack_bn="train")
    x_adv, start, start_logits = METHODS[name].attack(s)
    common = dict(bn_mode="train", generator=seeded())
    if name == "standard":
        expected = s.x
    elif name == "fgsm":
        expected = attacks.fgsm(s.model, s.x, s.y, 0.07, **common)
    elif name in ("rs_fgsm", "n_fgsm"):
        expected = attacks.ATTACKS[name](s.model, s.x, s.y, 0.07, **own, **common)
    else:
        expected = attacks.pgd(
            s.model, s.x, s.y, 0.07, alpha=0.05, steps=3, loss="ce" if name == "pgd" else "kl", **common
        )
    assert torch.equal(x_adv, expected)
    assert (start is None) == (start_logits is None) == (name not in ("fgsm", "rs_fgsm", "n_fgsm"))


def test_l2_reaches_the_attack(step):
    s = step("pgd", norm="l2", eps=0.5)
    length = (METHODS["pgd"].attack(s)[0] - s.x).flatten(1).norm(dim=1)
    assert length.max() <= 0.5 + 1e-9 and length.mean() > 0.2


def test_start_logits_are_those_of_the_start(step):
    s = step("rs_fgsm", attack_bn="eval")
    _, start, start_logits = METHODS["rs_fgsm"].attack(s)
    torch.testing.assert_close(start_logits, s.model(start).detach(), **TIGHT)
    assert 0 < (start - s.x).abs().max() <= s.config.eps
