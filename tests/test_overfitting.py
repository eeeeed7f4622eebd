"""Onset, alarms and robust overfitting: made-up records with known answers, and committed ones."""

import json

import numpy as np
import pytest

from derkit.diagnosis import overfitting
from derkit.diagnosis.overfitting import first_alarm, should_stop, step_alarm, summary
from derkit.records import Run, load_records, load_tested


def make_run(tmp_path, pgd, fgsm, train, aae, dE=None, cos=None, final=None, name="run"):
    """A run folder with the given curves, 10 steps an epoch."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"train": {"method": "rs_fgsm", "regularizer": "none", "seed": 0}})
    )
    if final:
        (folder / "final.json").write_text(json.dumps(final))
    n = len(pgd)
    dE, cos = dE if dE is not None else [0.0] * n, cos if cos is not None else [0.9] * n
    with open(folder / "metrics.jsonl", "w") as f:
        for i in range(n):
            steps = {"loss": [1.0] * 10, "acc": [train[i]] * 10, "aae": [aae[i]] * 10}
            row = dict(
                epoch=i + 1,
                valid_pgd=pgd[i],
                valid_fgsm=fgsm[i],
                train_acc=train[i],
                train_aae=aae[i],
                probe_dE=dE[i],
                cos=cos[i],
                E_lin=0.01,
                align=0.5,
                probe_pgd=pgd[i],
                steps=steps,
            )
            f.write(json.dumps(row) + "\n")
    return Run(folder)


HEALTHY = dict(
    pgd=np.linspace(0.1, 0.5, 20).tolist(),
    fgsm=np.linspace(0.15, 0.6, 20).tolist(),
    train=np.linspace(0.1, 0.6, 20).tolist(),
    aae=[0.01] * 20,
)


def collapsed(at=12, n=20):
    """PGD accuracy falls to 0 in epoch ``at``; AAE share and dE jump one epoch earlier."""
    healthy = {k: list(v) for k, v in HEALTHY.items()}
    for i in range(at - 1, n):
        healthy["pgd"][i] = 0.0
    for i in range(at - 2, n):
        healthy["aae"][i], healthy["train"][i] = 0.5, 0.8
    return healthy | dict(
        dE=[-0.5] * (at - 2) + [2.0] * (n - at + 2), cos=[0.9] * at + [0.1] * (n - at)
    )


def test_onset_epoch_and_step(tmp_path):
    onset = overfitting.co_onset(make_run(tmp_path, **collapsed(12)))
    assert onset.epoch == 12 and onset.after < onset.peak / 2
    assert abs(onset.step - 101) <= 1  # the share of AAEs jumps with the first step of epoch 11


def test_healthy_run_has_no_onset(tmp_path):
    assert overfitting.co_onset(make_run(tmp_path, **HEALTHY)) is None


def test_a_fall_with_fgsm_is_not_co(tmp_path):
    """Everything falls together (a diverging run): no catastrophic overfitting."""
    curves = {k: list(v) for k, v in HEALTHY.items()}
    for key in ("pgd", "fgsm", "train"):
        curves[key][10:] = [0.1] * 10
    assert overfitting.co_onset(make_run(tmp_path, **curves)) is None


def test_alarms_lead_and_false_alarms(tmp_path):
    table = overfitting.co_alarms(make_run(tmp_path, **collapsed(12))).set_index("signal")
    assert table.loc["AAE share", "alarm"] == 11 and table.loc["AAE share", "lead"] == 1
    assert table.loc["AAE share", "verdict"] == "ahead" and table.loc["dE(x)", "verdict"] == "ahead"
    assert (
        table.loc["gradient cosine", "verdict"] == "late"
        and table.loc["gradient cosine", "lead"] == -1
    )
    assert table.loc["E_lin", "verdict"] == "missed"
    healthy = overfitting.co_alarms(make_run(tmp_path, **HEALTHY, name="healthy"))
    assert set(healthy["verdict"]) == {"quiet"}
    noisy = dict(HEALTHY, aae=[0.01] * 10 + [0.4] + [0.01] * 9)
    assert "false alarm" in set(
        overfitting.co_alarms(make_run(tmp_path, **noisy, name="noisy"))["verdict"]
    )


def test_alarm_summary_counts_runs(tmp_path):
    runs = [
        make_run(tmp_path, **collapsed(12), name="a"),
        make_run(tmp_path, **collapsed(15), name="b"),
        make_run(tmp_path, **HEALTHY, name="c"),
    ]
    table = overfitting.alarm_summary(runs).set_index("signal")
    assert tuple(table.loc["AAE share"]) == ("2 of 2", "2 of 2", 1.0, "0 of 1")
    assert tuple(table.loc["gradient cosine"])[:2] == ("0 of 2", "2 of 2")
    assert table.loc["E_lin", "rang"] == "0 of 2" and np.isnan(table.loc["E_lin", "median lead"])


def test_stop_rule(tmp_path):
    rows = make_run(tmp_path, **collapsed(12)).epochs
    assert not should_stop(rows.iloc[:10].to_dict("records"))
    assert should_stop(rows.iloc[:11].to_dict("records"))
    assert first_alarm(rows.iloc[:10], "AAE share") is None


def test_step_alarm_finds_the_rise():
    series = np.concatenate([np.zeros(37), np.ones(23)])
    assert step_alarm(series, 10) == 38


def test_robust_overfitting_gap_and_onset(tmp_path):
    pgd = [0.1, 0.3, 0.5, 0.6, 0.6, 0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4, 0.4]
    final = {"best": {"pgd": 0.58}, "last": {"pgd": 0.41}}
    run = make_run(tmp_path, pgd=pgd, fgsm=pgd, train=pgd, aae=[0] * 14, final=final)
    r = overfitting.robust_overfitting(run)
    assert (r.best_epoch, r.best) == (4, 0.6)
    assert (
        r.last == pytest.approx(0.4)
        and r.gap == pytest.approx(0.2)
        and r.test_gap == pytest.approx(0.17)
    )
    assert 6 <= r.onset <= 8
    flat = make_run(
        tmp_path, pgd=[0.5] * 14, fgsm=[0.5] * 14, train=[0.5] * 14, aae=[0] * 14, name="flat"
    )
    assert overfitting.robust_overfitting(flat).onset is None


# -------------------------------------------------------------------------------- committed records
def test_committed_collapse():
    """Two of three FGSM runs of co_fashion_mini collapse, no run of PGD training does."""
    table = summary(load_tested("co_fashion_mini"))
    assert table.loc["fgsm", "runs"] == 3 and table.loc["fgsm", "collapsed"] == 2, "one never rose"
    assert table.loc["pgd-10", "collapsed"] == 0
    assert (table["strong min"] <= table["strong"]).all() and table.loc["fgsm", "strong"] < 0.1


def test_committed_robust_overfitting():
    groups = load_records("ro_fashion_mini")
    plain = [overfitting.robust_overfitting(run) for run in groups["pgd"]]
    assert all(r.onset and r.train_gain > 0 for r in plain)
    best, last = summary(groups, "best"), summary(groups, "last")
    assert best.loc["pgd", "pgd"] > last.loc["pgd", "pgd"]
