"""Onset, alarms and robust overfitting: made-up records with known answers, and committed ones."""

import numpy as np
import pandas as pd
import pytest

from derkit.diagnosis import overfitting
from derkit.diagnosis.overfitting import SIGNALS, first_alarm, should_stop, summary
from derkit.records import Run, load_tested, write_lines
from derkit.util import write_json


def make_run(tmp_path, pgd, fgsm, train, aae, dE=None, cos=None, final=None, name="run"):
    """A run folder with the given curves, 10 steps an epoch."""
    folder = tmp_path / name
    folder.mkdir()
    write_json(folder / "config.json", dict(train=dict(method="rs_fgsm", regularizer="none")))
    if final:
        write_json(folder / "final.json", final)
    n = len(pgd)
    columns = dict(epoch=range(1, n + 1), valid_pgd=pgd, probe_pgd=pgd, valid_fgsm=fgsm,
                   train_acc=train, train_aae=aae, probe_dE=dE or [0.0] * n, cos=cos or [0.9] * n,
                   E_lin=[0.01] * n, align=[0.5] * n)
    rows = zip(*columns.values(), strict=True)
    write_lines(folder / "metrics.jsonl", [dict(zip(columns, row, strict=True)) for row in rows])
    return Run(folder)


HEALTHY = {name: np.linspace(*ends, 20).tolist() for name, ends in dict(
    pgd=(0.1, 0.5), fgsm=(0.15, 0.6), train=(0.1, 0.6), aae=(0.01, 0.01)).items()}


def collapsed(at=12, n=20):
    """PGD accuracy falls to 0 in epoch ``at``; AAE share and dE jump one epoch earlier."""
    healthy = {k: list(v) for k, v in HEALTHY.items()}
    for i in range(at - 1, n):
        healthy["pgd"][i] = 0.0
    for i in range(at - 2, n):
        healthy["aae"][i], healthy["train"][i] = 0.5, 0.8
    dE, cos = [-0.5] * (at - 2) + [2.0] * (n - at + 2), [0.9] * at + [0.1] * (n - at)
    return healthy | dict(dE=dE, cos=cos)


def test_onset_epoch_and_step(tmp_path):
    onset = overfitting.co_onset(run := make_run(tmp_path, **collapsed(12)))
    assert onset.epoch == 12 and onset.after < onset.peak / 2
    write_json(run.folder / "config.json", dict(train=dict(method="standard")))
    assert overfitting.co_onset(Run(run.folder)) is None  # it had nothing to lose


def test_runs_without_an_onset(tmp_path):
    """A healthy one, and one in which everything falls together (it diverges)."""
    assert overfitting.co_onset(make_run(tmp_path, **HEALTHY, name="healthy")) is None
    curves = {k: v if k == "aae" else v[:10] + [0.1] * 10 for k, v in HEALTHY.items()}
    assert overfitting.co_onset(make_run(tmp_path, **curves)) is None


def test_epochs_that_were_not_evaluated_hide_nothing(tmp_path):
    """`eval_from`: their accuracies are not there; of the others, those of the whole run hold."""
    late = {k: [None] * 8 * (k in ("pgd", "fgsm")) + list(v)[8 * (k in ("pgd", "fgsm")) :]
            for k, v in collapsed(12).items()}
    run = make_run(tmp_path, **late, final=dict(best=dict(pgd=0.3), last=dict(pgd=0.0)))
    assert overfitting.co_onset(run).epoch == 12
    r = overfitting.robust_overfitting(run)
    assert r.best_epoch == 11 and r.best > 0.25 and r.last == 0 and r.gap == r.best
    assert not should_stop(run.epochs.iloc[:8].drop(columns="valid_pgd").to_dict("records"))


def test_alarms_lead_and_false_alarms(tmp_path):
    table = overfitting.co_alarms(make_run(tmp_path, **collapsed(12))).set_index("signal")
    assert tuple(table.loc["AAE share"]) == (11, 12, 1, "ahead")
    assert tuple(table.loc["gradient cosine", ["lead", "verdict"]]) == (-1, "late")
    assert table.loc[["dE(x)", "E_lin"], "verdict"].tolist() == ["ahead", "missed"]
    healthy = overfitting.co_alarms(make_run(tmp_path, **HEALTHY, name="healthy"))
    assert set(healthy["verdict"]) == {"quiet"}
    noisy = dict(HEALTHY, aae=[0.01] * 10 + [0.4] + [0.01] * 9)
    found = overfitting.co_alarms(make_run(tmp_path, **noisy, name="noisy"))
    assert "false alarm" in set(found["verdict"])


def test_alarm_summary_counts_runs(tmp_path):
    curves = dict(a=collapsed(12), b=collapsed(15), c=HEALTHY)
    runs = [make_run(tmp_path, **curve, name=name) for name, curve in curves.items()]
    table = overfitting.alarm_summary(runs).set_index("signal")
    assert tuple(table.loc["AAE share"]) == ("2 of 2", "2 of 2", 1.0, "0 of 1")
    assert tuple(table.loc["gradient cosine"])[:2] == ("0 of 2", "2 of 2")
    assert table.loc["E_lin", "rang"] == "0 of 2" and np.isnan(table.loc["E_lin", "median lead"])


def test_stop_rule(tmp_path):
    rows = make_run(tmp_path, **collapsed(12)).epochs
    assert not should_stop(rows.iloc[:10].to_dict("records"))
    assert should_stop(rows.iloc[:11].to_dict("records"))
    assert first_alarm(rows.iloc[:10], SIGNALS["AAE share"]) is None
    assert not should_stop([dict(train_aae=None)] * 9), "no epoch has been evaluated yet"
    cos = np.repeat([0.9, 0.6, 0.8, 0.7, 0.9, 0.3], 2)
    cos[1::2] = np.nan  # measured in every second epoch
    cos = pd.DataFrame(dict(cos=cos))
    assert first_alarm(cos, SIGNALS["gradient cosine"]) is None, "as noisy as before"


def test_robust_overfitting_gap_and_onset(tmp_path):
    pgd = [0.1, 0.3, 0.5, 0.6, 0.6, 0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4, 0.4]
    final = {"best": {"pgd": 0.58}, "last": {"pgd": 0.41}}
    run = make_run(tmp_path, pgd=pgd, fgsm=pgd, train=pgd, aae=[0] * 14, final=final)
    r = overfitting.robust_overfitting(run)
    assert (r.best_epoch, r.best) == (4, 0.6)
    assert (r.last, r.gap, r.test_gap) == pytest.approx((0.4, 0.2, 0.17))
    assert 6 <= r.onset <= 8
    half = [0.5] * 14
    flat = make_run(tmp_path, pgd=half, fgsm=half, train=half, aae=[0] * 14, name="flat")
    assert overfitting.robust_overfitting(flat).onset is None


# -------------------------------------------------------------------------------- committed records
def test_committed_collapse():
    """Two of three FGSM runs of co_fashion_mini collapse, no run of PGD training does."""
    table = summary(load_tested("co_fashion_mini"))
    assert table.loc["fgsm", "runs"] == 3 and table.loc["fgsm", "collapsed"] == 2, "one never rose"
    assert table.loc["pgd-10", "collapsed"] == 0
    assert (table["strong min"] <= table["strong"]).all() and table.loc["fgsm", "strong"] < 0.1


def test_committed_robust_overfitting():
    runs = load_tested("ro_fashion_mini")["pgd"]
    assert all(overfitting.robust_overfitting(run).train_gain > 0 for run in runs)
    assert all(run.final["best"]["strong"] > run.final["last"]["strong"] for run in runs)
