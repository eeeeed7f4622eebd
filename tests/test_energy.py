"""Energies: sign, identities in float64 to 1e-10, precision, edge cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from derkit import energy

TIGHT = dict(rtol=0, atol=1e-10)


def logits_of(values):
    return torch.from_numpy(values.copy())


@st.composite
def pairs(draw, scale=30.0, min_classes=1):
    """(logits, logits of x*, labels), float64."""
    b, k = draw(st.integers(1, 5)), draw(st.integers(min_classes, 6))
    floats = st.floats(-scale, scale, allow_nan=False, width=32)
    f, g = (logits_of(draw(arrays(np.float64, (b, k), elements=floats))) for _ in range(2))
    y = torch.tensor(draw(st.lists(st.integers(0, k - 1), min_size=b, max_size=b)))
    return f, g, y


def test_hand_computed_example():
    """logits (ln 1, ln 2, ln 5): sum of exponentials 8; x* has (ln 2, ln 2, ln 12): 16."""
    f = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log()
    g = torch.tensor([[2.0, 2.0, 12.0]], dtype=torch.float64).log()
    y = torch.tensor([0])
    assert energy.marginal_energy(f).item() == pytest.approx(-math.log(8), abs=1e-12)
    assert energy.joint_energy(f, torch.tensor([2])).item() == pytest.approx(-math.log(5), abs=1e-12)
    assert energy.cross_entropy(f, y).item() == pytest.approx(math.log(8), abs=1e-12)
    # the attack lowers the energy -> dE > 0 (natural minus adversarial)
    assert energy.delta_energy(f, g).item() == pytest.approx(math.log(2), abs=1e-12)
    assert energy.delta_energy(f, g, y).item() == pytest.approx(math.log(2), abs=1e-12)
    assert energy.delta_energy(f, g, torch.tensor([2])).item() == pytest.approx(math.log(12 / 5), abs=1e-12)


@given(pairs())
def test_cross_entropy_is_a_difference_of_energies(case):
    f, g, y = case
    torch.testing.assert_close(
        energy.joint_energy(f, y) - energy.marginal_energy(f), energy.cross_entropy(f, y), **TIGHT
    )
    gap = energy.cross_entropy(g, y) - energy.cross_entropy(f, y)
    torch.testing.assert_close(gap, energy.delta_energy(f, g) - energy.delta_energy(f, g, y), **TIGHT)


@given(pairs())
def test_abnormal_iff_marginal_below_joint_delta(case):
    f, g, y = case
    gap = energy.delta_energy(f, g) - energy.delta_energy(f, g, y)
    clear = gap.abs() > 1e-9  # rounding may decide ties
    assert torch.equal(energy.abnormal_mask(f, g, y)[clear], (gap < 0)[clear])


def test_ties_are_normal():
    f = torch.randn(4, 3, dtype=torch.float64)
    assert not energy.abnormal_mask(f, f, torch.zeros(4, dtype=torch.long)).any()


@given(pairs())
def test_trades_decomposition_is_the_kl(case):
    f, g, _ = case
    kl, conditional, marginal = energy.trades_decomposition(f, g)
    expected = F.kl_div(g.log_softmax(1), f.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(kl, expected, **TIGHT)
    torch.testing.assert_close(conditional + marginal, expected, **TIGHT)
    torch.testing.assert_close(marginal, energy.delta_energy(f, g), **TIGHT)
    by_hand = sum(
        f.softmax(1)[:, k]
        * (energy.joint_energy(g, torch.full((len(f),), k)) - energy.joint_energy(f, torch.full((len(f),), k)))
        for k in range(f.shape[1])
    )
    torch.testing.assert_close(conditional, by_hand, **TIGHT)


@given(pairs(), st.floats(-100, 100))
def test_shift_of_all_logits(case, c):
    f, g, y = case
    torch.testing.assert_close(energy.marginal_energy(f + c), energy.marginal_energy(f) - c, **TIGHT)
    torch.testing.assert_close(energy.joint_energy(f + c, y), energy.joint_energy(f, y) - c, **TIGHT)
    torch.testing.assert_close(energy.delta_energy(f + c, g + c), energy.delta_energy(f, g), **TIGHT)
    torch.testing.assert_close(energy.delta_energy(f + c, g + c, y), energy.delta_energy(f, g, y), **TIGHT)
    torch.testing.assert_close(energy.cross_entropy(f + c, y), energy.cross_entropy(f, y), **TIGHT)


@given(pairs(), st.randoms(use_true_random=False))
def test_permutation_of_classes(case, random):
    f, g, y = case
    order = list(range(f.shape[1]))
    random.shuffle(order)
    new = torch.tensor([order.index(c) for c in y.tolist()])
    torch.testing.assert_close(energy.marginal_energy(f[:, order]), energy.marginal_energy(f), **TIGHT)
    torch.testing.assert_close(
        energy.delta_energy(f[:, order], g[:, order], new), energy.delta_energy(f, g, y), **TIGHT
    )


@given(pairs(scale=2.0**100))
def test_huge_logits_stay_finite(case):
    f, g, y = case
    for value in (
        energy.marginal_energy(f),
        energy.joint_energy(f, y),
        energy.cross_entropy(f, y),
        energy.delta_energy(f, g),
        *energy.trades_decomposition(f, g),
    ):
        assert value.isfinite().all()
    assert (energy.cross_entropy(f, y) >= 0).all()


def test_one_class():
    """With one class E(x) = E(x, y) and CE = 0."""
    f, g, y = (
        torch.randn(3, 1, dtype=torch.float64),
        torch.randn(3, 1, dtype=torch.float64),
        torch.zeros(3, dtype=torch.long),
    )
    torch.testing.assert_close(energy.marginal_energy(f), energy.joint_energy(f, y), **TIGHT)
    assert energy.cross_entropy(f, y).abs().max() == 0
    torch.testing.assert_close(energy.trades_decomposition(f, g)[0], torch.zeros(3, dtype=torch.float64), **TIGHT)


def test_empty_batch():
    f, y = torch.empty(0, 10), torch.empty(0, dtype=torch.long)
    results = [
        energy.marginal_energy(f),
        energy.joint_energy(f, y),
        energy.cross_entropy(f, y),
        energy.delta_energy(f, f),
        energy.abnormal_mask(f, f, y),
        *energy.trades_decomposition(f, f),
    ]
    assert all(r.shape == (0,) for r in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_before_the_energy(dtype):
    f, y = torch.randn(8, 10).to(dtype) * 10, torch.arange(8)
    for value in (
        energy.marginal_energy(f),
        energy.joint_energy(f, y),
        energy.cross_entropy(f, y),
        energy.delta_energy(f, f.flip(0)),
    ):
        assert value.dtype == torch.float32
    assert torch.equal(energy.marginal_energy(f), energy.marginal_energy(f.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_kept(dtype):
    f = torch.randn(3, 4, dtype=dtype)
    assert energy.upcast(f) is f and energy.marginal_energy(f).dtype == dtype


def test_linearity_errors():
    """Zero for energies on a line, the squared bump otherwise."""
    u = torch.tensor([0.25, 0.5], dtype=torch.float64)
    f, g = torch.randn(2, 1, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    middle = (1 - u)[:, None] * f + u[:, None] * g  # one class: E = -logit, linear along the line
    torch.testing.assert_close(energy.energy_linearity(f, middle, g, u), torch.zeros(2, dtype=torch.float64), **TIGHT)
    torch.testing.assert_close(
        energy.energy_linearity(f, middle + 3, g, u), torch.full((2,), 9.0, dtype=torch.float64), **TIGHT
    )
    a, c, b = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))
    y = torch.tensor([1, 4])
    ce = [F.cross_entropy(t, y, reduction="none") for t in (a, c, b)]
    torch.testing.assert_close(
        energy.loss_linearity(a, c, b, u, y), (ce[1] - (1 - u) * ce[0] - u * ce[2]) ** 2, **TIGHT
    )


def test_gradient_of_energies():
    """dE(x)/df = -softmax, dE(x,y)/df_y = -1."""
    f = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(energy.marginal_energy(f).sum(), f)[0]
    torch.testing.assert_close(grad, -f.softmax(1), **TIGHT)
    grad = torch.autograd.grad(energy.joint_energy(f, torch.tensor([0, 1, 3])).sum(), f)[0]
    assert grad.sum() == -3 and grad[2, 3] == -1
