"""Every figure can be drawn from records and arrays, returns nothing and is written where asked."""

import numpy as np
import pandas as pd
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from derkit import plots  # noqa: E402
from derkit.diagnosis import AttackEnergies, co_alarms, detection_roc  # noqa: E402

from .test_diagnosis import collapsed, make_run  # noqa: E402

rng = np.random.default_rng(0)


def energies(name="PGD"):
    values = [rng.normal(size=50) for _ in range(4)]
    return AttackEnergies(name, 0.1, *values, rng.random(50) < 0.5)


def full_run(tmp_path, name="run"):
    run = make_run(tmp_path, **collapsed(12), name=name)
    for column in ("valid_pgd_dE", "probe_pgd_dE", "valid_clean"):
        run.epochs[column] = 0.1
    return run


def draw(fn, *args, tmp_path, **options):
    target = tmp_path / "figure.png"
    assert fn(*args, save=target, **options) is None
    assert target.stat().st_size > 2000
    assert not plots.plt.get_fignums(), "the figure was closed"


def test_training_figures(tmp_path):
    runs = {"a": full_run(tmp_path, "a"), "b": full_run(tmp_path, "b")}
    for kind in ("co", "ro"):
        draw(plots.overfitting_curves, runs, kind, tmp_path=tmp_path)
    draw(plots.signal_curves, runs["a"], co_alarms(runs["a"]), tmp_path=tmp_path)
    draw(plots.compare_runs, {"a": [runs["a"], runs["b"]]}, "valid_pgd", "accuracy", tmp_path=tmp_path)
    table = pd.DataFrame({"clean": [0.8, 0.7], "clean min": [0.7, 0.6], "clean max": [0.9, 0.8], "pgd": [0.4, 0.5]}, index=["a", "b"])
    draw(plots.result_bars, table, ["clean", "pgd"], tmp_path=tmp_path)


def test_energy_figures(tmp_path):
    draw(plots.energy_histograms, {"m": [energies(), energies("FGSM")]}, tmp_path=tmp_path)
    draw(plots.energy_map, {"m": energies(), "n": energies()}, tmp_path=tmp_path)
    table = pd.DataFrame([{"model": m, "attack": a, "eps": e, "dE(x)": e} for m in "mn" for a in ("F", "P") for e in (0.1, 0.2)])
    draw(plots.delta_by_strength, table, tmp_path=tmp_path)
    draw(plots.roc_curves, {"m": detection_roc(rng.normal(size=20), rng.normal(size=20))}, tmp_path=tmp_path)


def test_landscape_figures(tmp_path):
    path = {"u": np.linspace(0, 1, 5), "E": rng.normal(size=(5, 4)), "ce": rng.normal(size=(5, 4))}
    draw(plots.energy_paths, {"m": path}, key="ce", tmp_path=tmp_path)
    draw(plots.energy_slices, {"m": {"axis": np.linspace(-1, 1, 5), "ce": rng.random((5, 5))}}, tmp_path=tmp_path)
    draw(plots.image_rows, {"x": rng.random((10, 1, 8, 8))}, tmp_path=tmp_path)
