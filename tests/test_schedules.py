"""Schedules: the factor on the peak rate at the start, the peak and the end."""

import pytest
import torch

from derkit.config import SCHEDULE_NAMES
from derkit.schedules import SCHEDULES

GRID = [i / 200 for i in range(201)]


def test_names_match_the_config():
    assert set(SCHEDULE_NAMES) == set(SCHEDULES)


@pytest.mark.parametrize(
    "name, start, top, end",
    [
        ("triangular", 0, 1, 0),
        ("onecycle", 1 / 25, 1, 4e-6),
        ("cosine", 1, None, 0),
        ("constant", 1, 1, 1),
        ("piecewise", 1, None, 0.01),
    ],
)
@pytest.mark.parametrize("peak", [0.25, 0.4, 0.5])
def test_values_at_start_peak_and_end(name, start, top, end, peak):
    f = SCHEDULES[name]
    assert f(0.0, peak) == pytest.approx(start, abs=1e-12)
    assert f(1.0, peak) == pytest.approx(end, abs=1e-12)
    if top is not None:
        assert f(peak, peak) == pytest.approx(top)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("peak", [0.0, 0.3, 1.0])
def test_always_a_factor(name, peak):
    """In [0, 1] everywhere, also at extreme peaks."""
    assert all(-1e-12 <= SCHEDULES[name](p, peak) <= 1 + 1e-12 for p in GRID)


@pytest.mark.parametrize("name", ["triangular", "onecycle"])
def test_rises_to_the_peak_and_falls(name):
    up, down = ([SCHEDULES[name](p, 0.4) for p in part] for part in (GRID[:80], GRID[81:]))
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert SCHEDULES["triangular"](0.2, 0.4) == 0.5 and SCHEDULES["triangular"](0.7, 0.4) == pytest.approx(0.5)


def test_piecewise_drops_at_half_and_three_quarters():
    f = SCHEDULES["piecewise"]
    assert [f(p, 0) for p in (0.0, 0.499, 0.5, 0.749, 0.75, 1.0)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_cosine_by_torch():
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(parameter, lr=1.0), T_max=40)
    for i in range(41):
        assert SCHEDULES["cosine"](i / 40, 0) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        scheduler.optimizer.step(), scheduler.step()


@pytest.mark.parametrize("peak", [0.25, 0.4])
def test_onecycle_by_torch(peak):
    """torch counts the last step of each phase; its step i is mapped onto our progress."""
    n = 80
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=n, pct_start=peak, cycle_momentum=False
    )
    top = peak * n - 1
    for i in range(n):
        p = peak * i / top if i < top else peak + (1 - peak) * (i - top) / (n - 1 - top)
        assert SCHEDULES["onecycle"](p, peak) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        if i < n - 1:
            scheduler.step()
