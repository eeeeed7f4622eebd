"""Diagnosis on made-up records with known answers, and landscapes on models with known energies."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from derkit import diagnosis
from derkit.alarms import first_alarm, should_stop, step_alarm
from derkit.data import Split
from derkit.models import build_model
from derkit.records import Run


def make_run(tmp_path, pgd, fgsm, train, aae, dE=None, cos=None, final=None, name="run"):
    """A run folder with the given curves, 10 steps an epoch."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"train": {"method": "rs_fgsm", "regularizer": "none", "seed": 0}}))
    if final:
        (folder / "final.json").write_text(json.dumps(final))
    n = len(pgd)
    dE, cos = dE if dE is not None else [0.0] * n, cos if cos is not None else [0.9] * n
    with open(folder / "metrics.jsonl", "w") as f:
        for i in range(n):
            steps = {"loss": [1.0] * 10, "acc": [train[i]] * 10, "aae": [aae[i]] * 10}
            row = dict(epoch=i + 1, valid_pgd=pgd[i], valid_fgsm=fgsm[i], train_acc=train[i], train_aae=aae[i], probe_dE=dE[i],
                       cos=cos[i], E_lin=0.01, probe_pgd=pgd[i], steps=steps)
            f.write(json.dumps(row) + "\n")
    return Run(folder)


HEALTHY = dict(pgd=np.linspace(0.1, 0.5, 20).tolist(), fgsm=np.linspace(0.15, 0.6, 20).tolist(),
               train=np.linspace(0.1, 0.6, 20).tolist(), aae=[0.01] * 20)


def collapsed(at=12, n=20):
    """PGD accuracy falls to 0 in epoch ``at``; AAE share and dE jump one epoch earlier."""
    healthy = {k: list(v) for k, v in HEALTHY.items()}
    for i in range(at - 1, n):
        healthy["pgd"][i] = 0.0
    for i in range(at - 2, n):
        healthy["aae"][i], healthy["train"][i] = 0.5, 0.8
    return healthy | dict(dE=[-0.5] * (at - 2) + [2.0] * (n - at + 2), cos=[0.9] * at + [0.1] * (n - at))


def test_onset_epoch_and_step(tmp_path):
    onset = diagnosis.co_onset(make_run(tmp_path, **collapsed(12)))
    assert onset.epoch == 12 and onset.after == 0
    assert abs(onset.step - 101) <= 1  # the share of AAEs jumps with the first step of epoch 11


def test_healthy_run_has_no_onset(tmp_path):
    assert diagnosis.co_onset(make_run(tmp_path, **HEALTHY)) is None


def test_a_fall_with_fgsm_is_not_co(tmp_path):
    """Everything falls together (a diverging run): no catastrophic overfitting."""
    curves = {k: list(v) for k, v in HEALTHY.items()}
    for key in ("pgd", "fgsm", "train"):
        curves[key][10:] = [0.1] * 10
    assert diagnosis.co_onset(make_run(tmp_path, **curves)) is None


def test_alarms_lead_and_false_alarms(tmp_path):
    table = diagnosis.co_alarms(make_run(tmp_path, **collapsed(12))).set_index("signal")
    assert table.loc["AAE share", "alarm"] == 11 and table.loc["AAE share", "lead"] == 1
    assert table.loc["AAE share", "verdict"] == "ahead" and table.loc["dE(x)", "verdict"] == "ahead"
    assert table.loc["gradient cosine", "verdict"] == "late" and table.loc["gradient cosine", "lead"] == -1
    assert table.loc["E_lin", "verdict"] == "missed"
    healthy = diagnosis.co_alarms(make_run(tmp_path, **HEALTHY, name="healthy"))
    assert set(healthy["verdict"]) == {"quiet"}
    noisy = dict(HEALTHY, aae=[0.01] * 10 + [0.4] + [0.01] * 9)
    assert "false alarm" in set(diagnosis.co_alarms(make_run(tmp_path, **noisy, name="noisy"))["verdict"])


def test_alarm_summary_counts_runs(tmp_path):
    runs = [make_run(tmp_path, **collapsed(12), name="a"), make_run(tmp_path, **collapsed(15), name="b"),
            make_run(tmp_path, **HEALTHY, name="c")]
    table = diagnosis.alarm_summary(runs).set_index("signal")
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
    r = diagnosis.robust_overfitting(run)
    assert (r.best_epoch, r.best) == (4, 0.6)
    assert r.last == pytest.approx(0.4) and r.gap == pytest.approx(0.2) and r.test_gap == pytest.approx(0.17)
    assert 6 <= r.onset <= 8
    flat = make_run(tmp_path, pgd=[0.5] * 14, fgsm=[0.5] * 14, train=[0.5] * 14, aae=[0] * 14, name="flat")
    assert diagnosis.robust_overfitting(flat).onset is None


def test_detection_roc_against_pairs():
    rng = np.random.default_rng(0)
    natural, adversarial = rng.normal(0, 1, 70), rng.normal(-1, 1, 50)
    fpr, tpr, auc = diagnosis.detection_roc(natural, adversarial)
    pairs = (adversarial[:, None] < natural[None]).mean()
    assert auc == pytest.approx(pairs, abs=1e-12)
    assert fpr[0] == tpr[0] == 0 and fpr[-1] == tpr[-1] == 1
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()
    assert diagnosis.detection_roc(np.ones(5), np.ones(5))[2] == 0.5  # ties count half


class Linear(nn.Module):
    """Two logits, both a linear function of the image's sum: E(x) = -sum(x) - log 2 exactly."""

    def forward(self, x):
        s = x.flatten(1).sum(1, keepdim=True)
        return torch.cat([s, s], 1)


def test_path_of_a_linear_energy_has_no_bump():
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    path = diagnosis.energy_path(Linear(), x, x + 0.1, torch.tensor([0, 1, 0]), points=11)
    assert path["E"].shape == (11, 3) and diagnosis.bump(path) < 1e-12
    assert np.allclose(path["E"][0] - path["E"][-1], 1.6)  # dE over 16 pixels raised by 0.1
    curved = dict(path, E=path["E"] + np.sin(np.pi * path["u"])[:, None])
    assert diagnosis.bump(curved) == pytest.approx(1.0)


def test_slice_axes_and_origin():
    x, y = torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.tensor([1])
    first, second = torch.full_like(x, 0.1), torch.zeros_like(x)
    s = diagnosis.energy_slice(Linear(), x, y, first, second, extent=1.0, points=5)
    assert s["E"].shape == (5, 5)
    assert np.allclose(s["E"], s["E"][0])  # nothing changes along the second direction (rows)
    assert np.allclose(np.diff(s["E"][0]), -0.8)  # half a step of 0.1 on 16 pixels, columns
    assert np.allclose(s["ce"], np.log(2))


def test_attack_energies_signs_and_table():
    torch.manual_seed(0)
    model = build_model("small_cnn", 1, 10, 28, width=4).double()
    split = Split(torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8), torch.arange(16) % 10)
    results = [diagnosis.attack_energies(model, split, 0.1, a) for a in diagnosis.STANDARD_ATTACKS]
    table = diagnosis.energy_table(results)
    assert list(table["attack"]) == list(diagnosis.STANDARD_ATTACKS)
    r = results[1]
    assert table["dE(x)"][1] == pytest.approx((r.E - r.E_adv).mean())
    zero = diagnosis.attack_energies(model, split, 0.0, "PGD")
    assert np.array_equal(zero.E, zero.E_adv)
