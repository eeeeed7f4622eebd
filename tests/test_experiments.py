"""Suites against the committed records, the choice of lambda, running, verdicts of claims."""

import json
import math
from unittest.mock import Mock

import pandas as pd
import pytest

from derkit.records import Run, load_runs, records_folder
from derkit.util import DerkitError, write_json
from experiments import claims, run, suites
from experiments.suites import SUITES, Experiment, Suite, planned, resolve

UNSEEN = {"cifar10", "co_cifar100", "co_preact"}  # suites that have not been run, or in part
HEALTHY, COLLAPSED = [0.2, 0.3, 0.4, 0.4, 0.4, 0.4], [0.2, 0.4, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture
def toy(monkeypatch, tmp_path, config):
    """A suite: two lambdas to choose from, the run that takes its own from them, and FGSM."""
    tiny = config(method="fgsm", train_size=64, epochs=1)
    der = tiny.change(regularizer="der")
    experiments = (
        Experiment("der lambda 2", der.change(weight=2), "B1", (0,)),
        Experiment("der lambda 8", der.change(weight=8), "B1", (0,)),
        Experiment("der", der, "B2", (0, 1), "der lambda *"),
        Experiment("fgsm", tiny.change(precision="auto"), "A", (0, 1)))
    monkeypatch.setitem(SUITES, "toy", Suite("a toy", experiments))
    monkeypatch.setattr(suites, "records_folder", lambda: tmp_path / "records")
    return {one.slug: one for one in planned("toy")}


def put(one, curve=HEALTHY, best=0.4, folder=None, config=None, **last):
    """A synthetic record of a planned run."""
    folder, last, config = folder or one.records, dict(pgd=0.4) | last, config or one.config
    write_json(folder / "config.json", dict(label=one.label, train=config.as_dict()))
    same = dict(valid_fgsm=0.5, train_acc=0.5, train_aae=0.0, steps=dict(acc=[0.5], aae=[0.0]))
    rows = [dict(epoch=i + 1, valid_pgd=v) | same for i, v in enumerate(curve)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "env.json", {})
    write_json(folder / "final.json", dict(last=last, best=last | dict(pgd=best)))


# ----------------------------------------------------------------------------------------- suites
@pytest.mark.filterwarnings("ignore:retired fields")
@pytest.mark.parametrize("name", SUITES)
def test_every_record_is_of_an_experiment_and_no_experiment_lacks_one(name):
    runs = {one.slug: one for one in planned(name)}
    found = {record.name: record for record in load_runs(records_folder() / name)}
    assert found.keys() <= runs.keys()
    assert not runs.keys() - found.keys() or name in UNSEEN | {"gen_cifar10"}
    records = [found[slug] for slug in runs if slug in found]
    for record in records:
        one = runs[record.name]
        assert one.is_of(record.config["train"]) and one.label == record.config["label"]
    first = [record for record in records if record.config["train"]["seed"] in (0, 100)]
    orders = [record.config["order"] for record in first]
    assert orders == sorted(orders)


def test_labels_set_what_they_name():
    named = suites.experiment("n_fgsm + der ball eps 12/255, lambda 2", "cifar10", {}).config
    found = (named.method, named.regularizer, named.variant, named.eps, named.weight)
    assert found == ("n_fgsm", "der", "ball", pytest.approx(12 / 255), 2)
    assert suites.experiment("pgd-4", "fashion_ro", {}).config.steps == 4


def test_every_row_of_a_collapse_is_tuned_alike():
    """As many settings a row on the same seeds and validation images; FGSM has none. Then fresh
    seeds."""
    for name, tried, seeds in (("co_fashion_mini", 4, (100, 101)), ("co_cifar10", 3, (100,)),
                               ("co_cifar100", 3, (100,))):
        found = SUITES[name].experiments
        tests = {one.label: one for one in found if one.group == "test"}
        tunes = [one for one in found if one.group == "tune"]
        labels = [one.label.partition(": ")[0] for one in tunes]
        counts = {label: labels.count(label) for label in tests}
        assert {counts.pop("fgsm"), counts.pop("rs_fgsm, published step", 0)} == {0}
        assert set(counts.values()) == {tried}
        assert {one.seeds for one in tests.values()} == {(0, 1, 2)}
        assert {one.seeds for one in tunes} == {seeds}
        assert {one.config.eval_size for one in found} == {1000}
        assert {one.config.autoattack_size for one in tests.values()} == {200}
    sizes = ("final_size", "strong_size", "pgd50_size", "autoattack_size")
    assert {tuple(getattr(one.config, size) for size in sizes) for suite in SUITES.values()
            for one in suite.experiments if one.group in ("tune", "B1")} == {(1, 0, 0, 0)}


def test_order_of_runs_and_overrides(toy):
    first = ["der_lambda_2-s0", "der_lambda_8-s0", "der-s0", "fgsm-s0"]
    assert list(toy) == [*first, "der-s1", "fgsm-s1"]
    changed, elsewhere = planned("toy", {"lr": "0.2"})[0], planned("toy", {"data_dir": "x"})[0]
    assert changed.config.lr == 0.2 and changed.folder != toy["der_lambda_2-s0"].folder
    assert not changed.records.is_relative_to(suites.records_folder())
    assert elsewhere.records == toy["der_lambda_2-s0"].records, "the same results"
    with pytest.raises(DerkitError, match="Did you mean 'cifar10'"):
        planned("cifar1")


def test_lambda_is_chosen_on_validation_images(toy):
    two, eight = toy["der_lambda_2-s0"], toy["der_lambda_8-s0"]
    put(two, [0.9, 0.2, 0.2, 0.2], pgd=0.9)
    assert resolve(toy["der-s1"], list(toy.values())).sweep, "one run of the sweep is missing"
    put(eight, [0.1, 0.3, 0.3, 0.3], pgd=0.1)  # test accuracy and the best epoch decide nothing
    chosen = [one for one in planned("toy") if one.label == "der"]
    assert [one.config.weight for one in chosen] == [8, 8] and not any(one.sweep for one in chosen)
    put(two, config=two.config.change(lr=0.5))
    assert resolve(toy["der-s1"], list(toy.values())).sweep, "a record of other settings"
    for one, weight in ((two, 8), (eight, "auto")):
        write_json(one.records / suites.DIVERGED, dict(train=one.config.as_dict()))
        found = resolve(toy["der-s1"], list(toy.values()))
        assert found.config.weight == weight, "diverged runs are out; with none left, no choice"


# -------------------------------------------------------------------------------------------- runs
def test_a_grid_on_this_machine(toy, capfd):
    """Through submitit: the sweep, then the run that waits for it; a second call has no work."""
    command = ["toy", "--group", "B", "--jobs", "2", "--threads", "1"]
    assert run.main(command) == 0
    text = capfd.readouterr().out
    assert text.count("started") == text.count("finished der") == 4
    assert text.index("finished der_lambda_8-s0") < text.index("started der-s0")
    done = [Run(suites.records_folder() / "toy" / slug) for slug in toy if slug.startswith("der")]
    assert [record.config["order"] for record in done] == [0, 1, 2, 2]
    values = [record.epochs["valid_pgd"].iloc[-1] for record in done[:2]]
    weight = (2, 8)[values.index(max(values))]
    assert [record.config["train"]["weight"] for record in done] == [2, 8, weight, weight]
    assert done[0].env["threads"] == 1 and not list(done[0].folder.parent.glob("jobs-*"))
    assert run.main(command) == 0
    text = capfd.readouterr().out
    assert "4 of 4 runs are finished" in text and "started" not in text


@pytest.fixture
def here(monkeypatch):
    """Jobs in this process, as submitit would give them back."""

    def make_submit(options, folder):
        def submit(one):
            job, result, error = Mock(**{"paths.stdout": "log"}), None, None
            try:
                result = run.work(one.config.as_dict(), str(one.folder), 1, "")
            except DerkitError as problem:
                error = problem
            job.exception.return_value, job.result.return_value = error, result
            job.cancel_at_deletion.return_value = job
            return job

        return submit

    monkeypatch.setattr(run, "make_submit", make_submit)


def test_failed_and_diverged_runs_do_not_stop_the_others(toy, here, capsys):
    put(toy["fgsm-s0"], folder=toy["fgsm-s0"].folder, config=toy["fgsm-s1"].config)
    assert run.main(["toy", "--only", "fgsm"]) == 1
    text = capsys.readouterr().out
    assert "FAILED fgsm-s0: see log" in text and "finished fgsm-s1" in text
    assert Run(toy["fgsm-s1"].records).finished and toy["fgsm-s1"].finished(toy["fgsm-s1"].records)
    assert run.main(["toy", "--only", "der lambda 2", "--set", "lr=1e30"]) == 1
    assert "DIVERGED der_lambda_2-s0" in capsys.readouterr().out
    assert planned("toy", {"lr": "1e30"})[0].diverged and not toy["der_lambda_2-s0"].diverged
    assert run.main(["toy", "--only", "der", "--seeds", "0"]) == 0
    assert "left out der-s0: no records yet of der lambda *" in capsys.readouterr().out


def test_finished_runs_are_evaluated_further(toy, here, capsys):
    assert run.main(["toy", "--only", "fgsm", "--seeds", "0"]) == 0
    before = Run(toy["fgsm-s0"].folder)
    assert run.main(["toy", "--only", "fgsm", "--evaluate", "pgd50=8"]) == 0
    text, after = capsys.readouterr().out, Run(toy["fgsm-s0"].records)
    assert "1 of 2 runs are finished" in text and text.count("evaluating") == 1
    assert before.final["last"].items() < after.final["last"].items(), "what was there is kept"
    assert after.final["last"]["pgd50_images"] == 8


def test_dry_run_and_calibration(toy, capsys):
    put(toy["fgsm-s1"], folder=toy["fgsm-s1"].folder)
    assert run.main(["toy", "--dry-run", "--seeds", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "B2 der-s1: fgsm, der, eps 0.1000, 1 epochs, settings from its sweep",
        "A fgsm-s1: fgsm, none, eps 0.1000, 1 epochs, finished"]
    assert run.main(["toy", "--calibrate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["der lambda 2", "fgsm"], "two kinds"


@pytest.mark.parametrize("words, message", [
    (["tyo"], "Did you mean 'toy'"), (["toy", "--only", "fgms"], "Did you mean 'fgsm'"),
    (["toy", "--group", "D"], "Groups: A, B1, B2"), (["toy", "--seeds", "7"], "no run has such"),
    (["toy", "--set", "epoch=1"], "Did you mean 'epochs'"), (["toy", "--set", "x"], "key=value"),
    (["toy", "--evaluate", "autoattak=10"], "Did you mean 'autoattack'"),
    (["toy", "--cluster", "slurm"], "submitit refuses cluster slurm"),
    (["toy", "--submitit", "gpu=1"], "submitit refuses cluster local")])
def test_command_line_errors(toy, words, message, capsys):
    assert run.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


# ------------------------------------------------------------------------------------------ claims
def series(*values):
    return pd.Series(values, dtype=float)


@pytest.mark.parametrize("ours, theirs, verdict", [
    ((0.5, 0.6, 0.7), (0.4, 0.5, 0.6), "PASS"), ((0.4, 0.5), (0.5, 0.6), "FAIL"),
    ((0.5, 0.6, 0.4), (0.4, 0.6, 0.5), "TIE"), ((0.5,), (0.5,), "TIE"),
    ((0.5, 0.5), (0.5, 0.5), "TIE"),
    ((0.9, 0.8), (0.5,), "TIE"), ((0.4, 0.9), (0.5,), "FAIL"),  # one seed in common
    ((0.5, math.nan), (0.4, 0.4), "not run"), ((0.5, 0.5), (0.4, math.nan), "not run"),
    ((0.5, 0.5), (0.4, -math.inf), "not run")])
def test_comparisons_are_of_paired_seeds(ours, theirs, verdict):
    assert claims.compare(series(*ours), series(*theirs))[0] == verdict


@pytest.fixture
def card(monkeypatch):
    """Verdicts of four claims on the toy suite."""
    made = [*claims.about("fgsm", "somebody 2020", 0.03, aa=0.46),
            claims.within("stands", "fgsm", "collapsed", 0, 0),
            claims.better("stronger", "fgsm", "aa", "der lambda 2"),
            claims.within("gap", "fgsm", "gap", -1, 0.01)]
    monkeypatch.setattr(claims, "CLAIMS", {"toy": made})
    return lambda: claims.scorecard(["toy"])


def test_verdicts_on_records(toy, card):
    assert card()["verdict"].tolist() == ["not run"] * 4 and set(card()["ours"]) == {"-"}
    put(toy["der_lambda_2-s0"], aa=0.40)
    put(toy["fgsm-s0"], aa=0.44, config=toy["fgsm-s0"].config.change(precision="bf16"))
    assert card()["verdict"].tolist() == ["not run"] * 4 and set(card()["seeds"]) == {"1 of 2"}
    put(toy["fgsm-s1"], aa=0.48)
    table = card()
    assert table["verdict"].tolist() == ["PASS", "PASS", "TIE", "PASS"], "a single common seed"
    assert table["ours"][0] == "0.460 [0.440, 0.480]" and table["published"][0] == "0.46"
    assert table["source"].tolist() == ["somebody 2020", "goal", "goal", "goal"]
    assert claims.counts(table) == {"not run": 0, "FAIL": 0, "TIE": 1, "PASS": 3}
    assert claims.duels(["toy"]).empty, "one seed in common is no comparison"
    put(toy["fgsm-s1"], COLLAPSED, best=0.5, aa=0.30)
    assert card()["verdict"].tolist() == ["FAIL", "FAIL", "TIE", "FAIL"]
    put(toy["fgsm-s1"], config=toy["fgsm-s1"].config.change(epochs=2), aa=0.48)
    assert card()["verdict"].tolist() == ["not run"] * 4, "a record of other settings"
    lost = toy["fgsm-s1"]
    write_json(lost.records / suites.DIVERGED, dict(train=lost.config.as_dict()))
    assert card()["verdict"].tolist() == ["FAIL"] * 4 and card()["seeds"][0] == "1 of 2, 1 diverged"


@pytest.mark.filterwarnings("ignore:retired fields")
def test_claims_on_the_committed_records(capsys):
    duels = claims.duels(["co_preact"]).set_index(["run", "than"])
    row = duels.loc[("rs_fgsm + der norm", "n_fgsm")]
    assert [*row["seeds"]] == pytest.approx([0.0, -0.01]) and row["bar"] == pytest.approx(0.01)
    assert row["gain"] == pytest.approx(-0.005) and duels["gain"].is_monotonic_decreasing
    table = claims.scorecard()
    assert set(table["suite"]) == set(claims.CLAIMS)
    assert table["verdict"].isin(claims.VERDICTS).all()
    assert set(table[table["verdict"] == "not run"]["suite"]) == UNSEEN
    assert set(table[table["published"] != "-"]["suite"]) == {"cifar10"}, "published values"
    for name, made in claims.CLAIMS.items():
        assert {claim.text for claim in made} == set(table[table["suite"] == name]["claim"]), name
    assert claims.main(["ro_fashion_mini"]) == 0 and "PGD overfits" in capsys.readouterr().out
    assert claims.main(["ro_fashion_min"]) == 2 and "Did you mean" in capsys.readouterr().err
