"""Committed records are whole, and say what they are records of."""

import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from derkit.manifest import load_manifest
from derkit.records import load_runs
from derkit.results import by_eps, load_records, records_folder

SUITES = {p.stem: load_manifest(p) for p in sorted((records_folder().parent / "suites").glob("*.json"))}
RUN = sorted(name for name in SUITES if (records_folder() / name).is_dir())
WHOLE = [name for name in RUN if name.endswith("_fashion_mini")]  # what the README's tables are made of


def test_the_bundled_suites_have_records():
    assert {"co_fashion_mini", "ro_fashion_mini", "variants_fashion_mini"} <= set(WHOLE)


def test_every_folder_of_runs_has_its_manifest():
    assert {p.parent.parent.name for p in records_folder().glob("*/*/config.json")} <= set(SUITES)
    assert all(manifest.name == stem for stem, manifest in SUITES.items())


@pytest.mark.parametrize("name", RUN)
def test_records_match_their_manifest(name):
    """Every record is of a run of the manifest: its config, data hash, versions and hardware are there."""
    jobs = {j.slug: j for j in SUITES[name].jobs}
    for run in load_runs(records_folder() / name):
        job = jobs[run.name]
        assert run.finished and job.is_of(run.config["train"])
        assert len(run.epochs) == run.final["last_epoch"] <= job.config.epochs
        assert len(run.config["data_sha256"]) == 64 and run.config["source"]
        assert run.env["torch"] and run.env["device"] and run.env["precision"] == run.config["train"]["precision"]


@pytest.mark.parametrize("name", WHOLE)
def test_every_run_of_the_bundled_suites_is_there(name):
    jobs = SUITES[name].jobs
    assert {j.slug for j in jobs} == {r.name for r in load_runs(records_folder() / name)}
    assert all(r.env["precision"] == "fp32" for r in load_runs(records_folder() / name))
    assert list(load_records(name)) == SUITES[name].labels


@pytest.fixture
def script():
    path = Path(__file__).resolve().parents[1] / "scripts" / "make_figures.py"
    spec = importlib.util.spec_from_file_location("make_figures", path)
    module = importlib.util.module_from_spec(spec)
    backend = plt.get_backend()
    spec.loader.exec_module(module)
    yield module
    plt.switch_backend(backend)


def relabelled():
    """The bundled records in the place of runs at CIFAR scale, only to see them drawn."""
    co, ro = load_records("co_fashion_mini"), load_records("ro_fashion_mini")
    groups = {"fgsm eps 16/255": co["fgsm"], "n_fgsm eps 16/255": co["n_fgsm"], "n_fgsm eps 8/255": co["n_fgsm"],
              "fgsm + der segment eps 16/255": co["fgsm + der"], "fgsm + der ball eps 16/255 lambda 8": co["fgsm + der"],
              "pgd-10": ro["pgd"], "pgd-10 + der segment": ro["pgd + der"]}
    groups["n_fgsm eps 16/255"][0].config["train"]["eps"] = 16 / 255
    return groups


def test_figures_of_suites_with_records_are_drawn(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "BY_EPS", {"pgd.png": ("cifar10", "pgd", "PGD-20 accuracy")})
    groups = relabelled()
    groups["n_fgsm eps 8/255"] = load_records("co_fashion_mini")["n_fgsm"]
    script.draw_suites({"cifar10": groups}, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"co_cifar10.png", "ro_cifar10.png", "pgd.png"}
    text = capsys.readouterr().out
    assert text.count("skipped") == 3 and "skipped co_fashion_mnist.png: no records of fashion_mnist: fgsm, n_fgsm" in text


def test_figures_without_records_are_skipped(script, tmp_path, capsys):
    script.draw_suites({}, tmp_path)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out.count("skipped") == len(script.CURVES) + len(script.BY_EPS)


def test_table_by_eps():
    groups = relabelled()
    table = by_eps(groups, "strong")
    assert set(table["method"]) == {"fgsm", "n_fgsm", "fgsm + der segment"}, "no sweeps, no runs without a radius in the label"
    row = table[table["method"] == "fgsm"].iloc[0]
    values = [r.final["last"]["strong"] for r in groups["fgsm eps 16/255"]]
    assert row["mean"] == pytest.approx(np.mean(values)) and (row["min"], row["max"], row["runs"]) == (min(values), max(values), 3)
    assert len(by_eps(groups, "aa")) == 0


def best_on_validation(*suites):
    """{method: config} with the highest PGD accuracy on validation images in the last epoch, of tuning suites."""
    best = {}
    for suite in suites:
        for job in SUITES[suite].jobs:
            value = load_records(suite)[job.label][0].epochs["valid_pgd"].iloc[-1]
            name = "n_fgsm + der ball" if "n_fgsm" in job.label and "der" in job.label else job.label.split(", ")[0]
            name = job.label.rsplit(", ", 1)[0] if job.config.method == "fgsm" else name
            best[name] = max(best.get(name, (-1, None)), (value, job.config), key=lambda pair: pair[0])
    return {name: (c.weight, c.alpha, c.k) for name, (_, c) in best.items()}


def test_the_fresh_comparison_has_the_strengths_that_validation_chose():
    """fashion_mnist_short runs every method at the strength with the highest PGD accuracy on validation images in tune_fashion_mini;
    N-FGSM with tuned noise is the best of all its settings there and in tune_n_fgsm_fashion_mini."""
    chosen = {j.label: (j.config.weight, j.config.alpha, j.config.k) for j in SUITES["fashion_mnist_short"].jobs}
    later = {"n_fgsm, tuned noise": "n_fgsm", "n_fgsm, tuned noise + der ball": "n_fgsm + der ball"}
    best = best_on_validation("tune_fashion_mini")
    assert set(best) == set(chosen) - {"fgsm", *later}
    assert {name: chosen[name] for name in best} == best
    best = best_on_validation("tune_fashion_mini", "tune_n_fgsm_fashion_mini")
    assert {name: chosen[name] for name in later} == {name: best[found] for name, found in later.items()}
    assert len(load_records("tune_n_fgsm_fashion_mini")) + 3 - 2 == 15, "settings of N-FGSM alone, as README says"
