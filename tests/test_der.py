"""DER: its forms against formulas by hand, and its edges; test_reference_step.py trains with it."""

import pytest
import torch

from derkit.training import der
from derkit.training.der import DER
from derkit.training.objectives import make_regularizer, weight_at


def E(f, y=None):
    """Energies written out by hand."""
    return -f.exp().sum(1).log() if y is None else -f[torch.arange(len(f)), y]


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
        "gap": (der.gap(nat, other), (E(nat) - E(other)).abs()),
    }
    for name, (found, by_hand) in expected.items():
        assert found.shape == (12,) and (found >= 0).all() and found.sum() > 0, name
        torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-9, msg=name)
    assert (der.norm(nat, adv, y, gamma=2.0) == 0).any()


def test_norm_has_a_finite_gradient_at_zero(logits):
    nat = logits[0].clone().requires_grad_(True)
    value = der.norm(nat, nat.detach(), logits[3]).sum()
    assert value < 1e-4 and torch.autograd.grad(value, nat)[0].isfinite().all()


# ------------------------------------------------------------------------------------ in training
def test_points_in_an_l2_ball(batch, config, seeded):
    """Not clipped to [0, 1], as in GradAlign and ELLE."""
    options, x = dict(method="pgd", variant="ball", norm="l2", eps=0.5), batch[0]
    r = DER(config(regularizer="der", **options)).points(x, x, seeded())["near"] - x
    assert (x + r).min() < 0 and r.flatten(1).norm(dim=1).max() <= 0.5


def test_mask_without_abnormal_examples(config):
    """0 with a zero, finite gradient."""
    nat = torch.tensor([[2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    masked = DER(config(method="fgsm", regularizer="der"))
    value = masked({"nat": nat, "adv": adv}, torch.tensor([0]))
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
