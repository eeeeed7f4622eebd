"""Attacks: where x* may lie, what they leave untouched, restarts, targets, determinism, bad input, oracles."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from derkit import attack_losses, attacks
from derkit.attacks import fgsm, input_gradient, n_fgsm, pgd, rs_fgsm
from derkit.energy import cross_entropy
from derkit.errors import DerkitError

EPS = 0.1
CASES = {
    "fgsm": (fgsm, {}),
    "rs_fgsm": (rs_fgsm, {}),
    "n_fgsm": (n_fgsm, {}),
    "pgd": (pgd, dict(steps=3)),
    "pgd plain start": (pgd, dict(steps=3, random_start=False)),
    "pgd kl": (pgd, dict(steps=3, loss="kl")),
    "pgd margin": (pgd, dict(steps=3, loss="margin")),
    "pgd dlr": (pgd, dict(steps=3, loss="dlr")),
    "pgd l2": (pgd, dict(steps=3, norm="l2")),
    "pgd l2 kl": (pgd, dict(steps=3, norm="l2", loss="kl")),
    "pgd least likely": (pgd, dict(steps=3, targeted=True)),
    "pgd random target": (pgd, dict(steps=3, targeted=True, targets="random")),
    "pgd restarts": (pgd, dict(steps=3, restarts=2)),
    "pgd decay": (pgd, dict(steps=3, decay=True, any_iterate=True)),
    "pgd 0 steps": (pgd, dict(steps=0)),
    "pgd l2 0 steps": (pgd, dict(steps=0, norm="l2")),
}
every_attack = pytest.mark.parametrize("attack, options", CASES.values(), ids=CASES)


class OnePixel(nn.Module):
    """The prediction is 1 where low < first pixel < high, else 0; the CE of class 0 rises slowly with the pixel.

    Its failures have a HIGHER cross-entropy for class 0 (near log 3) than its successes (near log 2).
    """

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


def state(model):
    """Everything that an attack must leave as it was."""
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    tracked = [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return buffers, modes, tracked


def assert_same_state(model, before):
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])


# --------------------------------------------------------------------------------------------------- where x* lies
@every_attack
def test_range_ball_and_shape(attack, options, trained, batch, seeded):
    x, y = batch
    x_adv = attack(trained, x, y, EPS, generator=seeded(), **options)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not torch.equal(x_adv, x)
    if options.get("norm") == "l2":
        assert (x_adv - x).flatten(1).norm(dim=1).max() <= EPS * (1 + 1e-5)
    else:
        limit = EPS if attack is not n_fgsm else 3 * EPS
        assert (x_adv - x).abs().max() <= limit + 1e-6


def test_small_noise_of_the_kl_start_stays_in_the_ball(trained, batch, seeded):
    """TRADES starts from x + 0.001 N(0, 1), which may be further away than eps."""
    x, y = batch
    assert (pgd(trained, x, y, 1e-4, steps=0, loss="kl", generator=seeded()) - x).abs().max() <= 1e-4 + 1e-7


def test_n_fgsm_may_leave_the_ball(trained, batch, seeded):
    """By definition there is no projection: up to (k + 1) eps."""
    x, y = batch
    far = (n_fgsm(trained, x, y, EPS, generator=seeded()) - x).abs().max()
    assert 2 * EPS < far <= 3 * EPS + 1e-6
    assert (n_fgsm(trained, x, y, EPS, k=0.5, generator=seeded()) - x).abs().max() <= 1.5 * EPS + 1e-6


@every_attack
def test_eps_0_returns_x(attack, options, trained, batch, seeded):
    x, y = batch
    assert torch.equal(attack(trained, x, y, 0.0, generator=seeded(), **options), x)


def test_fgsm_by_its_formula(trained, batch):
    x, y = batch
    z = x.clone().requires_grad_(True)
    grad = torch.autograd.grad(F.cross_entropy(trained(z), y, reduction="sum"), z)[0]
    assert torch.equal(fgsm(trained, x, y, EPS), (x + EPS * grad.sign()).clamp(0, 1))


@pytest.mark.parametrize("attack, start, step, projected", [(rs_fgsm, 1, 1.25, True), (n_fgsm, 2, 1, False)])
def test_noisy_single_steps_by_their_formulas(attack, start, step, projected, trained, batch, seeded):
    x, y = batch
    begin = (x + (torch.rand(x.shape, generator=seeded(3)) * 2 - 1) * start * EPS).clamp(0, 1)
    z = begin.clone().requires_grad_(True)
    grad = torch.autograd.grad(F.cross_entropy(trained(z), y, reduction="sum"), z)[0]
    expected = begin + step * EPS * grad.sign()
    if projected:
        expected = x + (expected - x).clamp(-EPS, EPS)
    x_adv, x_start, logits = attack(trained, x, y, EPS, generator=seeded(3), return_start=True)
    torch.testing.assert_close(x_adv, expected.clamp(0, 1))
    torch.testing.assert_close(x_start, begin)
    torch.testing.assert_close(logits, trained(begin).detach())


def test_alpha_is_used(trained, batch, seeded):
    x, y = batch
    for attack in (rs_fgsm, n_fgsm):
        assert torch.equal(
            attack(trained, x, y, EPS, alpha=0.0, generator=seeded()),
            attack(trained, x, y, EPS, alpha=0.0, generator=seeded(), return_start=True)[1],
        )
    one = pgd(trained, x, y, EPS, alpha=0.01, steps=1, random_start=False)
    assert (one - x).abs().max().item() == pytest.approx(0.01, abs=1e-6)
    default = pgd(trained, x, y, EPS, steps=1, random_start=False)
    assert (default - x).abs().max().item() == pytest.approx(EPS / 4, abs=1e-6)


def test_decaying_steps(trained, batch):
    """With decay the step starts at 2 eps and shrinks by a cosine."""
    x, y = batch
    x_adv = pgd(trained, x, y, EPS, steps=2, random_start=False, decay=True)
    middle = attacks.project(x + 2 * EPS * input_gradient(trained, x, lambda f: cross_entropy(f, y))[0].sign(), x, EPS)
    end = middle + EPS * input_gradient(trained, middle, lambda f: cross_entropy(f, y))[0].sign()
    torch.testing.assert_close(x_adv, attacks.project(end, x, EPS))


def test_l2_step_has_length_alpha(trained):
    x, y = torch.full((4, 1, 28, 28), 0.5), torch.arange(4)
    step = pgd(trained, x, y, 0.5, alpha=0.2, steps=1, norm="l2", random_start=False) - x
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((4,), 0.2), rtol=1e-4, atol=0)


def test_projection():
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64)
    far = x + torch.tensor([0.3, -0.01]).view(2, 1, 1, 1)
    linf, l2 = attacks.project(far, x, 0.1), attacks.project(far, x, 0.1, "l2")
    assert linf[0].unique().item() == pytest.approx(0.6) and torch.equal(linf[1], far[1])
    assert (l2 - x).flatten(1).norm(dim=1)[0].item() == pytest.approx(0.1) and torch.equal(l2[1], far[1])
    assert torch.equal(attacks.project(x, x, 0.1, "l2"), x)
    assert attacks.project(x + 9, x, 1.0, "l2").max() <= 1


# ----------------------------------------------------------------------------------------------- they are attacks
def test_attacks_raise_their_loss(trained, batch, seeded):
    x, y = batch
    clean = trained(x).detach()

    def after(**options):
        return trained(pgd(trained, x, y, EPS, steps=5, generator=seeded(), **options)).detach()

    assert (cross_entropy(after(), y) > cross_entropy(clean, y)).all()
    assert attack_losses.margin(after(loss="margin"), y).mean() > attack_losses.margin(clean, y).mean() + 1
    assert attack_losses.dlr(after(loss="dlr"), y).mean() > attack_losses.dlr(clean, y).mean()
    kl = F.kl_div(after(loss="kl").log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    assert kl.min() > 0.1
    assert cross_entropy(after(norm="l2"), y).mean() > cross_entropy(clean, y).mean()


def test_margin_and_dlr_by_hand():
    f = torch.tensor([[1.0, 4.0, 2.0], [5.0, 4.0, 1.0]])
    assert attack_losses.margin(f, torch.tensor([1, 1])).tolist() == [-2.0, 1.0]
    torch.testing.assert_close(attack_losses.dlr(f, torch.tensor([1, 1])), torch.tensor([-2 / 3, 1 / 4]))
    with pytest.raises(DerkitError, match="at least 3 classes"):
        attack_losses.dlr(f[:, :2], torch.tensor([0, 1]))


@pytest.mark.parametrize("targets", ["least_likely", "random", "given"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_targeted_moves_towards_the_target(targets, loss, trained, batch, seeded):
    x, y = batch
    clean = trained(x).detach()
    goal = attacks.choose_targets(clean, y, (y + 3) % 10 if targets == "given" else targets, seeded(5))
    assert (goal != y).all() and goal.min() >= 0 and goal.max() <= 9
    x_adv = pgd(trained, x, y, EPS, steps=5, targeted=True, targets=goal, loss=loss, generator=seeded())
    assert (cross_entropy(trained(x_adv).detach(), goal) < cross_entropy(clean, goal)).all()


def test_choice_of_targets(seeded):
    logits, y = torch.tensor([[-9.0, 1.0, -2.0], [3.0, 1.0, 2.0]]), torch.tensor([0, 0])
    assert attacks.choose_targets(logits, y, "least_likely").tolist() == [2, 1]  # never the label itself
    many = attacks.choose_targets(torch.zeros(300, 3), torch.zeros(300, dtype=torch.long), "random", seeded())
    assert set(many.tolist()) == {1, 2}
    with pytest.raises(DerkitError, match="differ from the labels"):
        attacks.choose_targets(logits, y, torch.tensor([1, 0]))
    with pytest.raises(DerkitError, match="least_likely"):
        attacks.choose_targets(logits, y, "nearest")


def test_targeted_restarts_keep_a_hit(seeded):
    """With a target, success means the target class; another wrong class does not count."""

    class ThreeBands(nn.Module):
        def forward(self, x):
            t = x[:, 0, 0, 0]
            return F.one_hot(torch.bucketize(t.detach(), torch.tensor([0.5, 0.57])), 3) + 0 * t[:, None]

    model, x, y = ThreeBands(), torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.long)
    options = dict(alpha=0.0, steps=1, targeted=True, targets=y + 2)
    generator = seeded(1)
    found = torch.stack([model(pgd(model, x, y, 0.1, generator=generator, **options)).argmax(1) for _ in range(4)])
    assert ((found[0] == 1) & (found == 2).any(0)).any()  # a wrong class first, the target later
    best = pgd(model, x, y, 0.1, restarts=4, generator=seeded(1), **options)
    assert torch.equal(model(best).argmax(1) == 2, (found == 2).any(0))


def test_restarts_keep_any_success(seeded):
    """A success with a lower loss than a failure of another restart is kept."""
    model, x, y = OnePixel(0.5, 1), torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.long)
    generator = seeded(7)
    tries = [pgd(model, x, y, 0.1, alpha=0.0, steps=1, generator=generator) for _ in range(4)]
    logits = torch.stack([model(t) for t in tries])
    fooled = logits.argmax(2) != y
    highest = torch.stack([cross_entropy(f, y) for f in logits]).argmax(0)
    by_loss = fooled[highest, torch.arange(64)]
    assert (fooled.any(0) & ~by_loss).sum() > 30  # the highest loss would lose these
    best = pgd(model, x, y, 0.1, alpha=0.0, steps=1, restarts=4, generator=seeded(7))
    assert torch.equal(model(best).argmax(1) != y, fooled.any(0))


def test_restarts_keep_the_highest_loss_among_failures(trained, batch, seeded):
    x, y = batch
    y = trained(x).argmax(1)
    generator = seeded(2)
    losses = torch.stack(
        [cross_entropy(trained(pgd(trained, x, y, 0.004, steps=1, generator=generator)), y) for _ in range(4)]
    )
    best = pgd(trained, x, y, 0.004, steps=1, restarts=4, generator=seeded(2))
    assert (trained(best).argmax(1) == y).all()  # nobody is fooled at this eps
    torch.testing.assert_close(cross_entropy(trained(best), y), losses.amax(0))


def test_any_iterate_finds_what_the_last_iterate_lost():
    model, x, y = OnePixel(0.55, 0.65), torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    options = dict(alpha=0.1, steps=2, random_start=False)
    last, best = (pgd(model, x, y, 0.3, any_iterate=flag, **options) for flag in (False, True))
    assert last.item() == pytest.approx(0.7) and model(last).argmax() == 0
    assert best.item() == pytest.approx(0.6) and model(best).argmax() == 1


@pytest.mark.parametrize(
    "options",
    [dict(alpha=0.2), dict(decay=True), dict(loss="margin", restarts=2, alpha=0.15), dict(targeted=True, alpha=0.2)],
)
def test_any_iterate_never_loses_a_success(options, trained, batch, seeded):
    x, y = batch
    goal = trained(x).scatter(1, y[:, None], math.inf).argmin(1)

    def success(any_iterate):
        out = trained(pgd(trained, x, y, 0.2, steps=4, any_iterate=any_iterate, generator=seeded(1), **options)).argmax(
            1
        )
        return out == goal if options.get("targeted") else out != y

    last, best = success(False), success(True)
    assert (best | ~last).all() and last.any()


# ----------------------------------------------------------------------------------------------------- side effects
@every_attack
@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_model_is_left_as_it_was(attack, options, bn_mode, trained, batch, seeded):
    """Weights, running statistics, num_batches_tracked, each module's own mode."""
    trained.train()
    trained[1].features[1].eval()  # a frozen BatchNorm inside a model in training
    before = state(trained)
    attack(trained, *batch, EPS, bn_mode=bn_mode, generator=seeded(), **options)
    assert_same_state(trained, before)
    assert all(p.grad is None for p in trained.parameters())


@pytest.mark.parametrize("attack", [fgsm, rs_fgsm, n_fgsm, pgd])
def test_existing_gradients_are_untouched(attack, trained, batch, seeded):
    for p in trained.parameters():
        p.grad = torch.full_like(p, 3.0)
    attack(trained, *batch, EPS, generator=seeded())
    assert all((p.grad == 3).all() and p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("attack", [fgsm, rs_fgsm, n_fgsm, pgd])
def test_state_is_restored_when_the_model_raises(attack, bn_mode, trained, batch, seeded):
    model = nn.Sequential(trained, Raises()).train()
    trained[1].features[1].eval()
    before = state(model)
    with pytest.raises(RuntimeError, match="inside the model"):
        attack(model, *batch, EPS, bn_mode=bn_mode, generator=seeded(), check=False)
    assert_same_state(model, before)


def test_attack_mode_restores_a_layer_without_statistics():
    bn = nn.BatchNorm2d(1, track_running_stats=False)
    with attacks.attack_mode(bn, "train"):
        assert bn.training and not bn.track_running_stats
    assert bn.training and not bn.track_running_stats and bn.running_mean is None


@pytest.mark.parametrize("attack", [fgsm, rs_fgsm, n_fgsm, pgd])
def test_bn_mode_matters(attack, trained, batch, seeded):
    a, b = (attack(trained, *batch, EPS, bn_mode=mode, generator=seeded()) for mode in attacks.BN_MODES)
    assert not torch.equal(a, b)


def test_bn_mode_train_uses_batch_statistics(trained, batch):
    """The gradient of mode 'train' is that of a copy of the model in training mode."""
    x, y = batch
    x_adv = fgsm(trained, x, y, EPS, bn_mode="train")
    reference = copy.deepcopy(trained).train()
    grad = input_gradient(reference, x, lambda f: cross_entropy(f, y))[0]
    assert torch.equal(x_adv, (x + EPS * grad.sign()).clamp(0, 1))


def test_dropout_is_off(trained, batch, seeded):
    model = nn.Sequential(nn.Dropout(0.5), trained).train()
    for mode in attacks.BN_MODES:
        assert torch.equal(*(fgsm(model, *batch, EPS, bn_mode=mode) for _ in range(2)))


@every_attack
def test_same_generator_same_result(attack, options, trained, batch, seeded):
    one, two = (attack(trained, *batch, EPS, generator=seeded(4), **options) for _ in range(2))
    assert torch.equal(one, two)


def test_global_random_state_is_not_used(trained, batch, seeded):
    before = torch.get_rng_state()
    for attack, options in CASES.values():
        attack(trained, *batch, EPS, generator=seeded(), **options)
    assert torch.equal(before, torch.get_rng_state())


def test_random_start_off_is_deterministic(trained, batch, seeded):
    one, two = (pgd(trained, *batch, EPS, random_start=False, generator=seeded(s)) for s in (1, 2))
    assert torch.equal(one, two)
    one, two = (pgd(trained, *batch, EPS, generator=seeded(s)) for s in (1, 2))
    assert not torch.equal(one, two)


@every_attack
def test_float64_stays_float64(attack, options, trained, batch, seeded):
    x, y = batch
    x_adv = attack(trained.double(), x.double(), y, EPS, generator=seeded(), **options)
    assert x_adv.dtype == torch.float64 and (
        options.get("norm") == "l2" or (x_adv - x.double()).abs().max() <= 3 * EPS + 1e-12
    )


def test_works_under_no_grad_and_for_frozen_models(trained, batch):
    expected = fgsm(trained, *batch, EPS)
    with torch.no_grad():
        assert torch.equal(fgsm(trained, *batch, EPS), expected)
    assert torch.equal(fgsm(trained.requires_grad_(False), *batch, EPS), expected)


def test_x_that_requires_grad(trained, batch, seeded):
    """x* is data: it carries no graph, and x gets no gradient."""
    x, y = batch
    x = x.clone().requires_grad_(True)
    for attack, options in CASES.values():
        assert not attack(trained, x, y, EPS, generator=seeded(), **options).requires_grad
    assert x.grad is None


def test_samples_do_not_influence_each_other(trained, batch):
    x, y = batch
    whole = pgd(trained, x, y, EPS, random_start=False)
    torch.testing.assert_close(pgd(trained, x[:3], y[:3], EPS, random_start=False), whole[:3])


@every_attack
def test_empty_batch(attack, options, trained, seeded):
    x, y = torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.long)
    assert attack(trained, x, y, EPS, generator=seeded(), **options).shape == x.shape


# -------------------------------------------------------------------------------------------------------- bad input
BAD = {
    "x above 1": (lambda x, y: (x * 255, y), r"\[0, 1\].*normaliser"),
    "x below 0": (lambda x, y: (x - 0.5, y), r"\[0, 1\]"),
    "NaN in x": (lambda x, y: (x.masked_fill(x == x.max(), math.nan), y), r"\[0, 1\]"),
    "bytes": (lambda x, y: (x.mul(255).byte(), y), "float batch"),
    "one image": (lambda x, y: (x[0], y), "float batch"),
    "label 10": (lambda x, y: (x, y.clone().fill_(10)), r"\[0, 10\)"),
    "label -1": (lambda x, y: (x, y - 10), r"\[0, 10\)"),
    "too few labels": (lambda x, y: (x, y[:-1]), "labels"),
    "one-hot labels": (lambda x, y: (x, F.one_hot(y, 10)), "labels"),
    "float labels": (lambda x, y: (x, y.float()), "labels"),
}
each = pytest.mark.parametrize("attack", [fgsm, rs_fgsm, n_fgsm, pgd])


@each
@pytest.mark.parametrize("spoil, message", BAD.values(), ids=BAD)
def test_bad_batch(attack, spoil, message, trained, batch):
    with pytest.raises(DerkitError, match=message):
        attack(trained, *spoil(*batch), EPS)


def test_bad_label_with_a_users_own_module(trained, batch):
    """The number of classes is found out without a spec as well."""
    x, y = batch
    with pytest.raises(DerkitError, match=r"\[0, 10\)"):
        pgd(nn.Sequential(trained), x, y + 10, EPS)


@each
@pytest.mark.parametrize("eps", [8, -0.1, math.nan, math.inf, "8/255", None, True])
@pytest.mark.parametrize("check", [True, False])
def test_bad_eps(attack, eps, check, trained, batch):
    """Also where the checks of the batch, which cost a host sync, are off."""
    with pytest.raises(DerkitError, match="eps"):
        attack(trained, *batch, eps, check=check)


@pytest.mark.parametrize("eps", [-1, math.nan, math.inf, "1", True])
def test_bad_eps_l2(eps, trained, batch):
    with pytest.raises(DerkitError, match="eps"):
        pgd(trained, *batch, eps, norm="l2")


def test_l2_eps_may_exceed_1(trained, batch, seeded):
    x, y = batch
    far = (pgd(trained, x, y, 2.0, norm="l2", generator=seeded()) - x).flatten(1).norm(dim=1)
    assert 1 < far.max() <= 2 * (1 + 1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm="l1"), "norm"),
        (dict(loss="mse"), "unknown attack loss"),
        (dict(loss="margn"), "'margin'"),
        (dict(steps=-1), "steps"),
        (dict(restarts=0), "restarts"),
        (dict(bn_mode="frozen"), "bn_mode"),
        (dict(targeted=True, loss="kl"), "targeted"),
        (dict(targeted=True, targets="nearest"), "targets"),
    ],
)
def test_bad_option(options, message, trained, batch):
    with pytest.raises(DerkitError, match=message):
        pgd(trained, *batch, EPS, **options)


# ---------------------------------------------------------------------------------------------------------- oracles
def test_against_foolbox(trained, batch):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    x, y = batch
    wrapped = foolbox.PyTorchModel(trained, bounds=(0, 1), device="cpu")
    expected, *_ = foolbox.attacks.FGSM()(wrapped, x, y, epsilons=EPS)
    torch.testing.assert_close(fgsm(trained, x, y, EPS), expected, rtol=0, atol=1e-5)
    oracle = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=7, random_start=False)
    expected, *_ = oracle(wrapped, x, y, epsilons=EPS)
    torch.testing.assert_close(
        pgd(trained, x, y, EPS, alpha=0.03, steps=7, random_start=False), expected, rtol=0, atol=1e-5
    )


def test_against_torchattacks(trained, batch):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    x, y = batch
    expected = torchattacks.FGSM(trained, eps=EPS)(x, y)
    torch.testing.assert_close(fgsm(trained, x, y, EPS), expected, rtol=0, atol=1e-5)
    expected = torchattacks.PGD(trained, eps=EPS, alpha=0.03, steps=7, random_start=False)(x, y)
    torch.testing.assert_close(
        pgd(trained, x, y, EPS, alpha=0.03, steps=7, random_start=False), expected, rtol=0, atol=1e-5
    )
    expected = torchattacks.PGDL2(trained, eps=1.0, alpha=0.3, steps=7, random_start=False)(x, y)
    torch.testing.assert_close(
        pgd(trained, x, y, 1.0, alpha=0.3, steps=7, norm="l2", random_start=False), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_fills_the_ball_of_its_norm(norm):
    """Inside the radius, near it in most samples (volume grows with the radius), and new for every draw."""
    x = torch.full((400, 1, 3, 3), 0.5)
    noise = attacks.noise_in_ball(x, 0.2, norm, torch.Generator().manual_seed(0)).flatten(1)
    size = noise.abs().amax(1) if norm == "linf" else noise.norm(dim=1)
    assert size.max() <= 0.2 + 1e-6 and size.min() < 0.15 and noise.mean().abs() < 0.005
    assert (size / 0.2).pow(9).mean().item() == pytest.approx(0.5, abs=0.05)  # uniform in the ball: (r / eps)^D ~ U(0, 1)
