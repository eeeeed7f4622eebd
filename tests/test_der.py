"""DER: its forms against formulas by hand, and the object that asks for points."""

import pytest
import torch
from torch.nn import functional as F

from derkit.config import VARIANT_NAMES
from derkit.training import der
from derkit.training.der import DER
from derkit.training.objectives import make_regularizer, weight_at

TIGHT = dict(rtol=0, atol=1e-12)


def E(f, y=None):
    """Energies written out by hand."""
    return -f.exp().sum(1).log() if y is None else -f[torch.arange(len(f)), y]


def ce(f, y):
    return F.cross_entropy(f, y, reduction="none")


@pytest.fixture
def logits():
    """Logits at x, x* and another point, and labels: what a notebook would hold in arrays."""
    rng = torch.Generator().manual_seed(0)
    nat, adv, other = (3 * torch.randn(12, 5, generator=rng, dtype=torch.float64) for _ in range(3))
    return nat, adv, other, torch.arange(12) % 5


def test_forms_by_hand(logits):
    nat, adv, other, y = logits
    d, dy = E(nat) - E(adv), E(nat, y) - E(adv, y)
    expected = {
        "norm": (der.norm(nat, adv, y), (d**2 + dy**2).sqrt()),
        "gamma": (der.norm(nat, adv, y, gamma=2.0), ((d**2 + dy**2).sqrt() - 2).clamp_min(0)),
        "marginal": (der.marginal(nat, adv), d.abs()),
        "segment": (der.segment(nat, other), (E(nat) - E(other)).abs()),
        "ball": (der.ball(nat, other), (E(nat) - E(other)).abs()),
    }
    for name, (found, by_hand) in expected.items():
        assert found.shape == (12,) and (found >= 0).all() and found.sum() > 0, name
        torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-9, msg=name)
    assert (der.norm(nat, adv, y, gamma=2.0) == 0).any()


def test_norm_is_the_distance_in_the_energy_plane(logits):
    """dE(x) - dE(x, y) = CE(x*) - CE(x): a change of the loss alone already costs its half."""
    nat, adv, _, y = logits
    assert (der.norm(nat, adv, y) >= (ce(adv, y) - ce(nat, y)).abs() / 2**0.5 - 1e-9).all()


def test_norm_has_a_finite_gradient_at_zero(logits):
    nat = logits[0].clone().requires_grad_(True)
    value = der.norm(nat, nat.detach(), logits[3]).sum()
    assert value < 1e-4 and torch.autograd.grad(value, nat)[0].isfinite().all()


def test_half_precision_logits_are_widened(logits):
    """Energies are differences of large numbers."""
    nat, adv, _, y = (t.bfloat16() if t.is_floating_point() else t for t in logits)
    assert der.norm(nat + 300, adv + 300, y).dtype == torch.float32


# ------------------------------------------------------------------------------------ in training
@pytest.fixture
def images(batch, seeded):
    x = batch[0].double()
    return x, (x + 0.1 * torch.randn(x.shape, generator=seeded(1), dtype=x.dtype)).clamp(0, 1)


def make(config, **options):
    return DER(config(method="fgsm", regularizer="der", precision="fp64", **options))


def test_points(images, config, seeded):
    """x always; a point of the attack's path, a new u for every sample; a point of the ball."""
    x, x_adv = images
    for variant in VARIANT_NAMES:
        regularizer = make(config, variant=variant, eps=0.05)
        points = regularizer.points(x, x_adv, seeded())
        extra = {"segment": ["mid"], "ball": ["near"]}.get(variant, [])
        assert list(points) == ["nat", *extra] and points["nat"] is x
        if "mid" in points:
            u = torch.rand(16, 1, 1, 1, generator=seeded(), dtype=x.dtype)
            torch.testing.assert_close(points["mid"], x + u * (x_adv - x), **TIGHT)
        if "near" in points:
            r = points["near"] - x
            assert 0.049 < r.abs().max() <= 0.05 and points["near"].min() < 0  # not clipped


def test_points_in_an_l2_ball(images, config, seeded):
    options = dict(method="pgd", regularizer="der", variant="ball", norm="l2", eps=0.5)
    r = DER(config(**options)).points(*images, seeded())["near"] - images[0]
    assert r.flatten(1).norm(dim=1).max() <= 0.5


@pytest.mark.parametrize("variant", VARIANT_NAMES)
def test_every_form_reaches_the_weights(variant, trained, batch, images, config, seeded):
    """The value is positive, and the gradient through x and x* is not zero anywhere by mistake."""
    model, y = trained.double(), batch[1]
    regularizer = make(config, variant=variant, mask="all")
    points = {"adv": images[1]} | regularizer.points(*images, seeded())
    leaves = {name: model(point).detach().requires_grad_(True) for name, point in points.items()}
    value = regularizer(leaves, y)
    used = {"segment": ("nat", "mid"), "ball": ("nat", "near")}.get(variant, tuple(leaves))
    grads = torch.autograd.grad(value, [leaves[name] for name in used])
    assert value > 0 and all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_no_perturbation_costs_nothing(trained, batch, config, seeded):
    x, y = batch[0].double(), batch[1]
    for variant in VARIANT_NAMES:
        regularizer = make(config, variant=variant, eps=0.0, mask="all")
        points = {"adv": x} | regularizer.points(x, x, seeded())
        logits = {name: trained.double()(point) for name, point in points.items()}
        assert regularizer(logits, y) < 2e-6  # norm: the root of 1e-12


def test_mask_averages_over_abnormal_examples(logits, config):
    nat, adv, _, y = logits
    masked = make(config, variant="norm")  # by default on abnormal examples only
    abnormal = ce(adv, y) < ce(nat, y)
    assert 0 < abnormal.sum() < 12
    expected = der.norm(nat, adv, y)[abnormal].mean()
    torch.testing.assert_close(masked({"nat": nat, "adv": adv}, y), expected, **TIGHT)
    everywhere = make(config, variant="norm", mask="all")({"nat": nat, "adv": adv}, y)
    torch.testing.assert_close(everywhere, der.norm(nat, adv, y).mean(), **TIGHT)


def test_mask_without_abnormal_examples(config):
    """0 with a zero, finite gradient."""
    nat = torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    value = make(config, variant="norm")({"nat": nat, "adv": adv}, torch.tensor([0]))
    assert value == 0 and (torch.autograd.grad(value, nat)[0] == 0).all()


def test_weight_over_training(config, net):
    """0 before start, rising over warmup; gradalign has its whole weight at once."""
    assert make_regularizer(config(), net()) is None
    assert make_regularizer(config(regularizer="der", weight=0), net()) is None
    elle = config(method="fgsm", regularizer="elle", weight=8, warmup=0.4, start=0.2)
    values = [weight_at(elle, p) for p in (0, 0.19, 0.2, 0.3, 0.4, 0.6, 0.9)]
    assert values == pytest.approx([0, 0, 0, 2, 4, 8, 8])
    assert weight_at(elle.change(warmup=0), 0.2) == 8
    align = config(method="fgsm", regularizer="gradalign", weight=8, warmup=0.4)
    assert weight_at(align, 0.0) == 8 and weight_at(config(method="fgsm"), 0.5) == 0
