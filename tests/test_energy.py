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
from derkit.energy import cross_entropy, delta_energy, joint_energy, marginal_energy


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@st.composite
def pairs(draw, scale=30.0):
    """(logits, logits of x*, labels), float64."""
    b, k = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    floats = st.floats(-scale, scale, allow_nan=False, width=32)
    f, g = (torch.from_numpy(draw(arrays(np.float64, (b, k), elements=floats))) for _ in range(2))
    y = torch.tensor(draw(st.lists(st.integers(0, k - 1), min_size=b, max_size=b)))
    return f, g, y


def test_hand_computed_example():
    """logits (ln 1, ln 2, ln 5): sum of exponentials 8; x* has (ln 2, ln 2, ln 12): 16."""
    f = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log()
    g = torch.tensor([[2.0, 2.0, 12.0]], dtype=torch.float64).log()
    y, last = torch.tensor([0]), torch.tensor([2])
    close(marginal_energy(f), torch.tensor([-math.log(8)], dtype=torch.float64))
    close(joint_energy(f, last), torch.tensor([-math.log(5)], dtype=torch.float64))
    close(cross_entropy(f, y), torch.tensor([math.log(8)], dtype=torch.float64))
    # the attack lowers the energy: dE > 0 (natural minus adversarial)
    close(delta_energy(f, g), torch.tensor([math.log(2)], dtype=torch.float64))
    close(delta_energy(f, g, last), torch.tensor([math.log(12 / 5)], dtype=torch.float64))


@given(pairs())
def test_cross_entropy_is_a_difference_of_energies(case):
    """And so an example is abnormal where dE(x) < dE(x, y)."""
    f, g, y = case
    close(joint_energy(f, y) - marginal_energy(f), cross_entropy(f, y))
    gap = delta_energy(f, g) - delta_energy(f, g, y)
    close(cross_entropy(g, y) - cross_entropy(f, y), gap)
    clear = gap.abs() > 1e-9  # rounding may decide ties
    assert torch.equal(energy.abnormal_mask(f, g, y)[clear], (gap < 0)[clear])
    assert not energy.abnormal_mask(f, f, y).any()  # ties are normal


@given(pairs())
def test_trades_decomposition_is_the_kl(case):
    f, g, _ = case
    log_p, log_q = f.log_softmax(1), g.log_softmax(1)
    kl, conditional, marginal = energy.trades_decomposition(f, g)
    close(kl, F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1))
    close(conditional + marginal, kl)
    close(marginal, delta_energy(f, g))
    classes = [torch.full((len(f),), k) for k in range(f.shape[1])]
    moves = torch.stack([joint_energy(g, k) - joint_energy(f, k) for k in classes], 1)
    close(conditional, (f.softmax(1) * moves).sum(1))


@given(pairs(), st.floats(-100, 100))
def test_shift_of_all_logits(case, c):
    f, g, y = case
    close(marginal_energy(f + c), marginal_energy(f) - c)
    close(joint_energy(f + c, y), joint_energy(f, y) - c)
    close(delta_energy(f + c, g + c, y), delta_energy(f, g, y))
    close(cross_entropy(f + c, y), cross_entropy(f, y))


@given(pairs(), st.randoms(use_true_random=False))
def test_permutation_of_classes(case, random):
    f, g, y = case
    order = list(range(f.shape[1]))
    random.shuffle(order)
    new = torch.tensor([order.index(c) for c in y.tolist()])
    close(marginal_energy(f[:, order]), marginal_energy(f))
    close(delta_energy(f[:, order], g[:, order], new), delta_energy(f, g, y))


@given(pairs(scale=2.0**100))
def test_huge_logits_stay_finite(case):
    f, g, y = case
    ce, delta = cross_entropy(f, y), delta_energy(f, g)
    for value in (marginal_energy(f), ce, delta, *energy.trades_decomposition(f, g)):
        assert value.isfinite().all()
    assert (ce >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_before_the_energy(dtype):
    f = torch.randn(8, 10).to(dtype) * 10
    assert torch.equal(marginal_energy(f), marginal_energy(f.float()))
    wide = f.double()
    assert energy.upcast(wide) is wide
