"""DER and its variants, GradAlign, ELLE: float64 references, every combination, warm-up, no host sync in a step."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from derkit import regularizers
from derkit.attacks import attack_mode
from derkit.config import METHOD_NAMES, REGULARIZER_NAMES, VARIANT_NAMES, TrainConfig
from derkit.losses import Step
from derkit.regularizers import PENALTIES, REGULARIZERS, VARIANTS, input_gradients, make_points, strength
from derkit.training import train_step

TIGHT = dict(rtol=0, atol=1e-12)
COMBINATIONS = [
    (m, r, v)
    for m in METHOD_NAMES
    for r in REGULARIZER_NAMES
    for v in (VARIANT_NAMES if r == "der" else ("segment",))
    if m != "standard" or r == "none"
]


@pytest.fixture
def step(trained, batch, config, seeded):
    """A float64 step on 16 images with the model in eval mode, so that joint and separate forwards agree."""

    def make(seed=0, progress=1.0, **overrides):
        x, y = batch
        options = dict(method="fgsm", regularizer="der", precision="fp64", weight=2.0, attack_bn="eval") | overrides
        return Step(trained.double().eval(), x.double(), y, config(**options), seeded(seed), progress)

    return make


@pytest.fixture
def small_step(net, config, seeded):
    """4 images of 8x8 pixels and a net in training mode."""

    def make(**overrides):
        x = torch.rand(4, 1, 8, 8, generator=seeded(9), dtype=torch.float64)
        model = net(torch.float64, width=2, size=8).train()
        return Step(model, x, torch.tensor([1, 2, 3, 4]), config(precision="fp64", **overrides), seeded(), 0.5)

    return make


def ce(f, y):
    return F.cross_entropy(f, y, reduction="none")


def E(f, y=None):
    """Energies written out by hand."""
    return -f.exp().sum(1).log() if y is None else -f[torch.arange(len(f)), y]


# ------------------------------------------------------------------------------------------------------------ names
def test_names_match_the_config():
    assert {"none", *REGULARIZERS} == set(REGULARIZER_NAMES) and set(VARIANTS) == set(VARIANT_NAMES)
    choices = {f.name: f.metadata["choices"] for f in TrainConfig.__dataclass_fields__.values()}
    assert set(choices["penalty"]) == set(PENALTIES)


@pytest.mark.parametrize("name", VARIANTS)
def test_points_are_known(name):
    assert set(VARIANTS[name].points) <= {*regularizers.POINTS, "ball_c"}


# -------------------------------------------------------------------------------------------- one step of everything
@pytest.mark.parametrize("method, regularizer, variant", COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])
def test_every_combination_takes_a_finite_step(method, regularizer, variant, small_step):
    step = small_step(method=method, regularizer=regularizer, variant=variant)
    total, statistics = train_step(step)
    total.backward()
    grads = [p.grad for p in step.model.parameters()]
    assert (
        total.isfinite()
        and all(g is not None and g.isfinite().all() for g in grads)
        and sum(g.abs().sum() for g in grads) > 0
    )
    assert set(statistics) == {"loss", "penalty", "acc", "aae", "E_adv"} and not any(
        v.requires_grad for v in statistics.values()
    )
    assert statistics["penalty"] >= 0 and (regularizer != "none" or statistics["penalty"] == 0)
    torch.testing.assert_close(
        total.detach(),
        statistics["loss"] + strength(step) * statistics["penalty"] if regularizer != "none" else statistics["loss"],
    )


@pytest.mark.parametrize(
    "regularizer, variant", [(r, v) for m, r, v in COMBINATIONS if m == "fgsm" and r != "none" and v != "abnormal"]
)
def test_regulariser_changes_the_gradient(regularizer, variant, small_step):
    """Nothing is accidentally detached from the weights. ('abnormal' acts on AAEs only: see below.)"""
    grads = []
    for weight in (1.0, 1e-15):  # the same points and BatchNorm statistics
        step = small_step(method="fgsm", regularizer=regularizer, variant=variant, weight=weight)
        total, statistics = train_step(step)
        grads.append(torch.autograd.grad(total, list(step.model.parameters())))
    assert statistics["penalty"] > 0 and any((a - b).abs().max() > 1e-9 for a, b in zip(*grads, strict=True))


class NoSync(TorchDispatchMode):
    """Raises on every operation that would make the host wait for the device."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "item", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.lstrip("_") in {f.lstrip("_") for f in self.forbidden}:
            raise AssertionError(f"host sync: {name}")
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError("host sync: indexing with a mask")
        return func(*args, **(kwargs or {}))


def test_no_sync_guard_works():
    x = torch.ones(2)
    for sync in (
        lambda: x[0].item(),
        lambda: bool(x.sum() > 1),
        lambda: float(x[0]),
        lambda: x[x > 0],
        lambda: x.nonzero(),
    ):
        with pytest.raises(AssertionError, match="host sync"), NoSync():
            sync()


@pytest.mark.parametrize("method, regularizer, variant", COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])
def test_no_host_sync_inside_a_step(method, regularizer, variant, small_step, monkeypatch):
    step = small_step(method=method, regularizer=regularizer, variant=variant)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"host sync: {name}"))
    with NoSync():
        total, _ = train_step(step)
        total.backward()


# ---------------------------------------------------------------------------------------------------- DER references
def differences(variant, f, y, u):
    """The variants, by hand, from logits of x, x*, x_u."""
    nat, adv, mid = f
    return {
        "marginal": [E(nat) - E(adv)],
        "joint": [E(nat, y) - E(adv, y)],
        "both": [E(nat) - E(adv), E(nat, y) - E(adv, y)],
        "abnormal": [(ce(nat, y) - ce(adv, y)).clamp_min(0)],
        "hinge": [((E(nat) - E(adv)) - (E(nat) - E(adv)).mean().detach()).clamp_min(0)],
        "segment": [E(nat) - E(mid)],
        "segment_joint": [E(nat, y) - E(mid, y)],
        "segment_ce": [ce(nat, y) - ce(mid, y)],
        "linear": [E(mid) - (1 - u) * E(nat) - u * E(adv)],
        "linear_both": [E(mid) - (1 - u) * E(nat) - u * E(adv), E(mid, y) - (1 - u) * E(nat, y) - u * E(adv, y)],
    }[variant]


BY_HAND = {
    "abs": torch.abs,
    "square": lambda d: d * d,
    "huber": lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("variant", [v for v in VARIANT_NAMES if v != "ball"])
def test_der_reference(variant, penalty, step):
    """total = CE(x*) + lambda mean R(d), to 1e-12, and the same gradient."""
    s = step(variant=variant, penalty=penalty, method="n_fgsm")
    total, statistics = train_step(s)
    u = s.u if s.u is not None else torch.zeros(len(s.y), dtype=torch.float64)
    mid = s.x + u.view(-1, 1, 1, 1) * (s.x_adv - s.x)
    f = [s.model(z) for z in (s.x, s.x_adv, mid)]
    penalty = sum(BY_HAND[penalty](d).mean() for d in differences(variant, f, s.y, u))
    expected = F.cross_entropy(f[1], s.y) + 2.0 * penalty
    torch.testing.assert_close(total, expected, **TIGHT)
    torch.testing.assert_close(statistics["penalty"], penalty.detach(), **TIGHT)
    parameters = list(s.model.parameters())
    for a, b in zip(torch.autograd.grad(total, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_der_ball_reference(step, seeded):
    """E(x) - E(x + r), r uniform in the ball, not clipped."""
    s = step(variant="ball", penalty="square")
    _, statistics = train_step(s)
    noise = (2 * torch.rand(s.x.shape, generator=seeded(), dtype=torch.float64) - 1) * s.config.eps
    expected = (E(s.model(s.x)) - E(s.model(s.x + noise))).square().mean()
    torch.testing.assert_close(statistics["penalty"], expected.detach(), **TIGHT)


def test_der_of_no_perturbation_is_zero(step):
    for variant in VARIANT_NAMES:
        assert train_step(step(variant=variant, eps=0.0))[1]["penalty"].abs() < 1e-12


def test_abnormal_acts_on_aaes_only(step):
    s = step(variant="abnormal")
    nat, adv = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    s.y = torch.tensor([0, 1])
    (d,) = VARIANTS["abnormal"].differences({"nat": nat, "adv": adv}, s)
    assert d[0] > 0 and d[1] == 0


def test_hinge_follows_a_running_mean(step):
    """m starts at the first batch's mean dE and moves by 1 % of every later one."""
    s = step(variant="hinge")
    zero = torch.zeros(2, 3, dtype=torch.float64)
    VARIANTS["hinge"].differences({"nat": zero, "adv": zero + torch.tensor([[1.0], [3.0]])}, s)  # dE = 1, 3
    assert s.state["hinge_mean"].item() == pytest.approx(2)
    (d,) = VARIANTS["hinge"].differences({"nat": zero, "adv": zero + torch.tensor([[12.0], [0.0]])}, s)
    assert d.tolist() == pytest.approx([10, 0]) and s.state["hinge_mean"].item() == pytest.approx(0.99 * 2 + 0.01 * 6)
    assert not s.state["hinge_mean"].requires_grad


def test_segment_point_lies_on_the_attack_path(step):
    s = step(variant="segment")
    train_step(s)
    points = make_points(s, ("mid",))
    assert s.u.shape == (16,) and s.u.min() >= 0 and s.u.max() < 1 and s.u.unique().numel() == 16
    torch.testing.assert_close(points["mid"], s.x + s.u.view(-1, 1, 1, 1) * (s.x_adv - s.x), **TIGHT)


# ----------------------------------------------------------------------------------------------------- ELLE, GradAlign
def test_elle_reference(step, seeded):
    s = step(regularizer="elle", weight=3.0)
    total, statistics = train_step(s)
    g = seeded()
    a, b = (s.x + (2 * torch.rand(s.x.shape, generator=g, dtype=torch.float64) - 1) * s.config.eps for _ in range(2))
    u = torch.rand(16, generator=g, dtype=torch.float64)
    c = (1 - u).view(-1, 1, 1, 1) * a + u.view(-1, 1, 1, 1) * b
    la, lb, lc = (ce(s.model(z), s.y) for z in (a, b, c))
    expected = (lc - (1 - u) * la - u * lb).square().mean()
    torch.testing.assert_close(statistics["penalty"], expected.detach(), **TIGHT)
    torch.testing.assert_close(total, F.cross_entropy(s.model(s.x_adv), s.y) + 3 * expected, **TIGHT)


def test_gradalign_reference(step, seeded):
    """1 - cos of input gradients at x (fixed) and x + r, in a few independent lines; value and parameter gradient."""
    s = step(regularizer="gradalign", weight=0.7)
    total, statistics = train_step(s)
    noise = (2 * torch.rand(s.x.shape, generator=seeded(), dtype=torch.float64) - 1) * s.config.eps
    grads = []
    for z in (s.x.clone().requires_grad_(True), (s.x + noise).requires_grad_(True)):
        grads.append(
            torch.autograd.grad(F.cross_entropy(s.model(z), s.y, reduction="sum"), z, create_graph=True)[0].flatten(1)
        )
    a, b = grads[0].detach(), grads[1]
    expected = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    torch.testing.assert_close(statistics["penalty"], expected.detach(), **TIGHT)
    expected = F.cross_entropy(s.model(s.x_adv), s.y) + 0.7 * expected
    parameters = list(s.model.parameters())
    ours, theirs = (torch.autograd.grad(t, parameters, allow_unused=True) for t in (total, expected))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


class Clipped(nn.Module):
    """The gradient is exactly zero for dark images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 3)
        nn.init.constant_(self.head.bias, 1.0)

    def forward(self, x):
        return self.head(F.relu(x.flatten(1) - 0.5))


def test_gradalign_with_zero_gradients_gives_no_nan(config, seeded):
    """Such samples count as aligned: value 0 and no part in the gradient."""
    torch.manual_seed(0)
    model = Clipped().double()
    x = torch.full((3, 1, 4, 4), 0.1, dtype=torch.float64)
    x[2] = torch.rand(1, 4, 4, generator=seeded(3), dtype=torch.float64) * 0.3 + 0.6
    s = Step(
        model,
        x,
        torch.tensor([0, 1, 2]),
        config(method="fgsm", regularizer="gradalign", weight=1.0, eps=0.05, precision="fp64"),
        seeded(),
    )
    a, b = input_gradients(s)
    assert (a[:2] == 0).all() and (b[:2] == 0).all() and (a[2] != 0).all()
    s.generator = seeded()
    value = REGULARIZERS["gradalign"].value({}, s)
    grads = torch.autograd.grad(value, list(model.parameters()))
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(value, (1 - F.cosine_similarity(a[2:], b[2:])).sum() / 3, **TIGHT)
    s.x, s.y, s.generator = x[:2], s.y[:2], seeded()
    value = REGULARIZERS["gradalign"].value({}, s)
    assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, list(model.parameters())))


def test_gradalign_leaves_the_model_as_it_was(step):
    s = step(regularizer="gradalign", attack_bn="train")
    s.model.train()
    buffers = {k: v.clone() for k, v in s.model.named_buffers()}
    input_gradients(s)
    assert all(torch.equal(v, buffers[k]) for k, v in s.model.named_buffers()) and all(
        m.training for m in s.model.modules()
    )


# --------------------------------------------------------------------------------------------------- strength, points
def test_warm_up(step):
    """lambda rises linearly over the warm-up share (der, elle) and is at full strength at once for gradalign."""
    for regularizer in ("der", "elle"):
        values = [
            strength(step(regularizer=regularizer, weight=8, warmup=0.4, progress=p)) for p in (0, 0.1, 0.2, 0.4, 0.9)
        ]
        assert values == pytest.approx([0, 2, 4, 8, 8])
        assert strength(step(regularizer=regularizer, weight=8, warmup=0, progress=0.0)) == 8
    assert strength(step(regularizer="gradalign", weight=8, warmup=0.4, progress=0.0)) == 8


def test_weight_0_switches_the_regulariser_off(step):
    total, statistics = train_step(step(weight=0))
    assert statistics["penalty"] == 0 and torch.equal(total.detach(), statistics["loss"])


def test_points_of_a_step_share_one_forward(small_step):
    """x*, x and x_u go through the model, and its BatchNorm, together."""
    for method, regularizer, variant, sizes in (
        ("fgsm", "none", "segment", [4]),
        ("fgsm", "der", "segment", [12]),
        ("trades", "der", "segment", [12]),
        ("trades", "none", "segment", [8]),
        ("fgsm", "elle", "segment", [16]),
    ):
        step = small_step(method=method, regularizer=regularizer, variant=variant)
        seen = []
        step.model.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(len(args[0])) if m.training else None
        )
        train_step(step)
        assert seen == sizes


def test_statistics_of_a_step(step):
    s = step(regularizer="none", method="n_fgsm")
    _, statistics = train_step(s)
    f = s.model(s.x_adv).detach()
    assert statistics["acc"] == (f.argmax(1) == s.y).double().mean()
    torch.testing.assert_close(statistics["E_adv"], E(f).mean(), **TIGHT)
    torch.testing.assert_close(statistics["loss"], F.cross_entropy(f, s.y), **TIGHT)
    s = step(regularizer="none", method="trades")
    _, statistics = train_step(s)
    with attack_mode(s.model):
        assert statistics["aae"] == (ce(s.model(s.x_adv), s.y) < ce(s.model(s.x), s.y)).double().mean()
    assert train_step(step(regularizer="none", method="pgd"))[1]["aae"].isnan()  # its start is not looked at


def test_same_generator_same_step(step):
    for regularizer, seed in itertools.product(("der", "elle", "gradalign"), (0, 1)):
        one, two = (train_step(step(seed=seed, regularizer=regularizer, method="rs_fgsm"))[0] for _ in range(2))
        assert torch.equal(one, two)


def test_points_in_the_ball_follow_the_norm():
    """In an L_2 run the ball is the L_2 ball: the noise of ball, ELLE and GradAlign stays within eps in that norm."""
    x, y = torch.full((32, 1, 8, 8), 0.5), torch.zeros(32, dtype=torch.long)
    for norm, size in (("linf", lambda r: r.abs().amax(1)), ("l2", lambda r: r.norm(dim=1))):
        config = TrainConfig.make("fashion_mini", method="pgd", norm=norm, eps=0.25)
        step = Step(None, x, y, config, torch.Generator().manual_seed(0))
        noise = (regularizers.POINTS["ball"](step) - x).flatten(1)
        assert 0.15 < size(noise).max() <= 0.25 + 1e-6, norm
