"""Attacks: formulas, restarts, what is left untouched, errors. More is in test_properties.py."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from derkit import attacks
from derkit.attacks import fgsm, n_fgsm, pgd, rs_fgsm, zerograd
from derkit.energy import cross_entropy
from derkit.util import DerkitError

EPS = 0.1
CASES = {
    "fgsm": (fgsm, {}),
    "rs_fgsm": (rs_fgsm, {}),
    "n_fgsm": (n_fgsm, {}),
    "pgd": (pgd, dict(steps=3)),
    "kl": (pgd, dict(steps=3, loss="kl")),
    "l2": (pgd, dict(steps=3, norm="l2")),
    "random target": (pgd, dict(steps=3, targeted=True, targets="random")),
    "margin, restarts": (pgd, dict(steps=3, restarts=2, loss="margin")),
    "any iterate": (pgd, dict(steps=3, decay=True, any_iterate=True)),
}
every_case = pytest.mark.parametrize("attack, options", CASES.values(), ids=CASES)
every_attack = pytest.mark.parametrize("attack", [fgsm, rs_fgsm, n_fgsm, pgd])


class OnePixel(nn.Module):
    """Predicts 1 where low < first pixel < high, else 0; the CE of class 0 rises slowly with the
    pixel, and is HIGHER in failures (near log 3) than in successes (near log 2)."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x):
        t = x[:, 0, 0, 0, None]
        fooled, safe = t.new_tensor([[0.0, 0.1, -10.0]]), t.new_tensor([[0.01, 0.0, 0.0]])
        slope = t.new_tensor([[-1e-3, 0.0, 0.0]])
        return torch.where((self.low < t) & (t < self.high), fooled, safe) + slope * t


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("inside the model")


def grey(n):
    """n one-pixel images of 0.5, of class 0."""
    return torch.full((n, 1, 1, 1), 0.5), torch.zeros(n, dtype=torch.long)


def loss_gradient(model, x, y):
    z = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)[0]


@pytest.mark.parametrize("attack, noise, step, options", [
    (rs_fgsm, 1, 1.25, {}),
    (rs_fgsm, 1, 0.3, dict(alpha=0.3 * EPS)),
    (n_fgsm, 2, 1, {}),
    (n_fgsm, 0.5, 2, dict(k=0.5, alpha=2 * EPS)),
])  # fmt: skip
def test_noisy_single_steps(attack, noise, step, options, trained, batch, seeded):
    """RS-FGSM is projected; N-FGSM is not, and may leave the ball."""
    x, y = batch
    uniform = torch.rand(x.shape, generator=seeded(3)) * 2 - 1
    begin = (x + uniform * noise * EPS).clamp(0, 1)
    expected = begin + step * EPS * loss_gradient(trained, begin, y).sign()
    if attack is rs_fgsm:
        expected = x + (expected - x).clamp(-EPS, EPS)
    result = attack(trained, x, y, EPS, generator=seeded(3), return_start=True, **options)
    for found, value in zip(result, (expected.clamp(0, 1), begin, trained(begin)), strict=True):
        torch.testing.assert_close(found, value.detach())
    assert attack is rs_fgsm or (result[0] - x).abs().max() > 2 * EPS


def test_pgd_steps(trained, batch):
    """The default is eps/4; with decay the step starts at 2 eps and shrinks by a cosine."""
    x, y = batch
    one = pgd(trained, x, y, EPS, steps=1, random_start=False)
    torch.testing.assert_close(one, (x + EPS / 4 * loss_gradient(trained, x, y).sign()).clamp(0, 1))
    middle = attacks.project(x + 2 * EPS * loss_gradient(trained, x, y).sign(), x, EPS)
    end = attacks.project(middle + EPS * loss_gradient(trained, middle, y).sign(), x, EPS)
    found = pgd(trained, x, y, EPS, steps=2, random_start=False, decay=True)
    torch.testing.assert_close(found, end)
    x = torch.full_like(x, 0.5)
    step = pgd(trained, x, y, 0.5, alpha=0.2, steps=1, norm="l2", random_start=False) - x
    lengths = step.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.2), rtol=1e-4, atol=0)


def test_projection():
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    far = x + torch.tensor([0.3, -0.01]).view(2, 1, 1, 1)
    linf, l2 = attacks.project(far, x, 0.1), attacks.project(far, x, 0.1, "l2")
    assert linf[0].unique().item() == pytest.approx(0.6) and torch.equal(linf[1], far[1])
    assert (l2 - x)[0].norm().item() == pytest.approx(0.1) and torch.equal(l2[1], far[1])
    assert torch.equal(attacks.project(x, x, 0.1, "l2"), x)
    assert attacks.project(x + 9, x, 1.0, "l2").max() <= 1


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_noise_fills_the_ball_of_its_norm(norm, seeded):
    """Uniform in the ball of dimension D = 9: (r / eps)^D is uniform in [0, 1]."""
    x = torch.full((400, 1, 3, 3), 0.5)
    noise = attacks.noise_in_ball(x, 0.2, norm, seeded()).flatten(1)
    size = noise.abs().amax(1) if norm == "linf" else noise.norm(dim=1)
    assert size.max() <= 0.2 + 1e-6 and size.min() < 0.15 and noise.mean().abs() < 0.005
    assert (size / 0.2).pow(9).mean().item() == pytest.approx(0.5, abs=0.05)


def test_margin():
    f, y = torch.tensor([[1.0, 4.0, 2.0], [5.0, 4.0, 1.0]]), torch.tensor([1, 1])
    assert attacks.margin(f, y).tolist() == [-2.0, 1.0]


@pytest.mark.parametrize("loss, norm", [*((n, "linf") for n in attacks.LOSSES), ("ce", "l2")])
def test_attacks_raise_their_loss(loss, norm, trained, batch, seeded):
    x, y = batch
    reference = trained(x).detach().log_softmax(1) if loss == "kl" else y
    x_adv = pgd(trained, x, y, EPS, steps=5, loss=loss, norm=norm, generator=seeded())
    before, after = (attacks.LOSSES[loss](trained(z).detach(), reference) for z in (x, x_adv))
    assert (after > before).float().mean() > 0.9 and (after - before).mean() > 0.01


def test_start_of_the_kl_attack_stays_in_the_ball(trained, batch, seeded):
    """TRADES starts from x + 0.001 N(0, 1), which may be further away than eps."""
    start = pgd(trained, *batch, 1e-4, steps=0, loss="kl", generator=seeded())
    assert 0 < (start - batch[0]).abs().max() <= 1e-4 + 1e-7


@pytest.mark.parametrize("targets", ["least_likely", "random", "given"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_targeted_moves_towards_the_target(targets, loss, trained, batch, seeded):
    x, y = batch
    clean = trained(x).detach()
    wanted = (y + 3) % 10 if targets == "given" else targets
    goal = attacks.choose_targets(clean, y, wanted, seeded())
    options = dict(steps=5, targeted=True, targets=wanted, loss=loss)
    x_adv = pgd(trained, x, y, EPS, generator=seeded(), **options)
    assert (cross_entropy(trained(x_adv).detach(), goal) < cross_entropy(clean, goal)).all()


def test_choice_of_targets(seeded):
    logits, y = torch.tensor([[-9.0, 1.0, -2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 0])
    assert attacks.choose_targets(logits, y, "least_likely").tolist() == [2, 1]  # not the label
    many = attacks.choose_targets(torch.zeros(300, 3), grey(300)[1], "random", seeded())
    assert set(many.tolist()) == {1, 2}
    with pytest.raises(DerkitError, match="below 3 other than the labels"):
        attacks.choose_targets(logits, y, torch.tensor([1, 0]))


def test_restarts_keep_any_success(seeded):
    """A success with a lower loss than a failure of another restart is kept."""
    model, (x, y), rng = OnePixel(0.5, 1), grey(64), seeded(7)
    tries = [pgd(model, x, y, 0.1, alpha=0.0, steps=1, generator=rng) for _ in range(4)]
    logits = torch.stack([model(t) for t in tries])
    fooled = logits.argmax(2) != y
    highest = torch.stack([cross_entropy(f, y) for f in logits]).argmax(0)
    by_loss = fooled[highest, torch.arange(64)]
    assert (fooled.any(0) & ~by_loss).sum() > 30  # the highest loss would lose these
    best = pgd(model, x, y, 0.1, alpha=0.0, steps=1, restarts=4, generator=seeded(7))
    assert torch.equal(model(best).argmax(1) != y, fooled.any(0))


def test_targeted_restarts_keep_a_hit(seeded):
    """Success means the target class, here 0; another wrong class, here 1, is none."""
    model, (x, y), rng = OnePixel(0.5, 0.55), grey(64), seeded(7)
    options = dict(alpha=0.0, steps=1, targeted=True, targets=y)
    tries = [pgd(model, x, y + 2, 0.1, generator=rng, **options) for _ in range(4)]
    hits = torch.stack([model(t).argmax(1) == 0 for t in tries])
    assert not hits[0].all() and hits.any(0).sum() > 50
    best = pgd(model, x, y + 2, 0.1, restarts=4, generator=seeded(7), **options)
    assert torch.equal(model(best).argmax(1) == 0, hits.any(0))


def test_restarts_keep_the_highest_loss_among_failures(trained, batch, seeded):
    x, y = batch[0], trained(batch[0]).argmax(1)
    eps, rng = 0.004, seeded(2)
    tries = [pgd(trained, x, y, eps, steps=1, generator=rng) for _ in range(4)]
    losses = torch.stack([cross_entropy(trained(t), y) for t in tries])
    best = trained(pgd(trained, x, y, eps, steps=1, restarts=4, generator=seeded(2)))
    assert (best.argmax(1) == y).all()  # nobody is fooled at this eps
    torch.testing.assert_close(cross_entropy(best, y), losses.amax(0))


def test_any_iterate_finds_what_the_last_iterate_lost():
    model, (x, y) = OnePixel(0.55, 0.65), grey(1)
    options = dict(alpha=0.1, steps=2, random_start=False)
    last, best = (pgd(model, x, y, 0.3, any_iterate=flag, **options) for flag in (False, True))
    assert last.item() == pytest.approx(0.7) and model(last).argmax() == 0
    assert best.item() == pytest.approx(0.6) and model(best).argmax() == 1


@pytest.mark.parametrize("options", [dict(decay=True), dict(restarts=2), dict(loss="margin")])
def test_any_iterate_never_loses_a_success(options, trained, batch, seeded):
    x, y = batch
    last, best = (
        trained(pgd(trained, x, y, 0.05, any_iterate=flag, generator=seeded(), **options)).argmax(1)
        for flag in (False, True)
    )
    assert ((best != y) | (last == y)).all() and (last != y).any() and (best == y).any()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("bn_mode", attacks.BN_MODES)
@every_case
def test_model_is_left_as_it_was(attack, options, bn_mode, fails, trained, batch, seeded):
    """Weights, gradients, running statistics, each module's mode, also when the model raises."""
    first = nn.BatchNorm2d(1, track_running_stats=False)
    model = nn.Sequential(first, trained, Raises() if fails else nn.Identity()).train()
    trained[1].features[1].eval()  # a frozen BatchNorm inside a model in training
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)

    def state():
        modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
        grads = [(p.grad == 3).all().item() and p.requires_grad for p in model.parameters()]
        return modes, grads, [v.tolist() for v in model.state_dict().values()]

    x, y = batch[0].clone().requires_grad_(), batch[1]
    before, options = state(), options | dict(bn_mode=bn_mode, generator=seeded(), check=False)
    if fails:
        with pytest.raises(RuntimeError, match="inside the model"):
            attack(model, x, y, EPS, **options)
    else:
        assert not attack(model, x, y, EPS, **options).requires_grad
    assert state() == before and all(before[1]) and x.grad is None


@pytest.mark.parametrize("bn_mode", attacks.BN_MODES)
def test_bn_mode(bn_mode, trained, batch):
    """The gradient is that of a copy of the model in this mode, without its dropout."""
    reference = copy.deepcopy(trained).train(bn_mode == "train")
    expected = (batch[0] + EPS * loss_gradient(reference, *batch).sign()).clamp(0, 1)
    model = nn.Sequential(nn.Dropout(0.5), trained).train()
    assert torch.equal(fgsm(model, *batch, EPS, bn_mode=bn_mode), expected)


@every_case
def test_randomness_comes_from_the_generator(attack, options, trained, batch, seeded):
    """Under no_grad and for a frozen model as well."""
    before = torch.get_rng_state()
    expected = attack(trained, *batch, EPS, generator=seeded(), **options)
    with torch.no_grad():
        found = attack(trained.requires_grad_(False), *batch, EPS, generator=seeded(), **options)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(found, expected)


@every_case
def test_empty_batch(attack, options, trained, seeded):
    x, y = torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.long)
    assert attack(trained, x, y, EPS, generator=seeded(), **options).shape == x.shape


BAD = {
    "x above 1": (lambda x, y: (x * 255, y), r"\[0, 1\].*normaliser"),
    "NaN in x": (lambda x, y: (x.masked_fill(x == x.max(), math.nan), y), r"\[0, 1\]"),
    "bytes": (lambda x, y: (x.mul(255).byte(), y), "x must be floats"),
    "one image": (lambda x, y: (x[0], y), "x must be floats"),
    "label 10": (lambda x, y: (x, y.clone().fill_(10)), r"\[0, 10\), found \[10, 10\]"),
    "label -1": (lambda x, y: (x, y - 10), r"\[0, 10\)"),
    "one-hot labels": (lambda x, y: (x, F.one_hot(y, 10)), "labels must be 16 int64"),
    "int32 labels": (lambda x, y: (x, y.int()), "labels must be 16 int64"),
}


@every_attack
@pytest.mark.parametrize("spoil, message", BAD.values(), ids=BAD)
def test_bad_batch(attack, spoil, message, trained, batch):
    with pytest.raises(DerkitError, match=message):
        attack(trained, *spoil(*batch), EPS)


@every_attack
@pytest.mark.parametrize("eps", [8, -0.1, math.nan, math.inf, "8/255", None, True])
def test_bad_eps(attack, eps, trained, batch):
    """Also where the checks of the batch, which cost a host sync, are off."""
    with pytest.raises(DerkitError, match="eps"):
        attack(trained, *batch, eps, check=False)


@pytest.mark.parametrize("options, message", [
    (dict(norm="l1"), "norm"),
    (dict(loss="margn"), "unknown attack loss 'margn'. Did you mean 'margin'"),
    (dict(steps=-1), "steps"),
    (dict(restarts=0), "restarts"),
    (dict(bn_mode="frozen"), "bn_mode"),
    (dict(targeted=True, loss="kl"), "targeted"),
    (dict(targeted=True, targets="nearest"), "least_likely"),
])  # fmt: skip
def test_bad_option(options, message, trained, batch):
    with pytest.raises(DerkitError, match=message):
        pgd(trained, *batch, EPS, **options)


@pytest.mark.parametrize("attack, name, value", [
    (pgd, "alpha", -0.1), (fgsm, "alpha", "1/255"), (n_fgsm, "k", math.nan), (zerograd, "q", 1)])
def test_bad_size(attack, name, value, trained, batch):
    with pytest.raises(DerkitError, match=f"{name} must be a number in"):
        attack(trained, *batch, EPS, **{name: value})


def test_eps_may_exceed_1_in_l2(trained, batch, seeded):
    x_adv = pgd(trained, *batch, 2.0, norm="l2", generator=seeded())
    assert 1 < (x_adv - batch[0]).flatten(1).norm(dim=1).max() <= 2 * (1 + 1e-5)
    with pytest.raises(DerkitError, match="eps"):
        pgd(trained, *batch, math.inf, norm="l2")
