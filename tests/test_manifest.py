"""Manifests: groups, grids, the order of seeds, lambda from a sweep, claims, and their errors. Suites on the command line."""

import json
import re

import pytest

from derkit import cli, costs, suite
from derkit import manifest as manifests
from derkit.errors import DerkitError
from derkit.manifest import load_manifest, resolve
from derkit.records import Run
from derkit.results import records_folder

TOY = dict(dataset="fashion_mini", model="small_cnn", width=4, train_size=64, epochs=1, eval_size=16, probe_size=8, eval_steps=1,
           final_size=16, final_steps=1, strong_size=0, pgd50_size=0, autoattack_size=0, device="cpu")
CIFAR = records_folder().parent / "suites" / "cifar10.json"
BASE = dict(name="toy", preset="cifar10", seeds=[0, 1], runs=[
    dict(group="A", label="{method} eps {eps}", grid=dict(method=["fgsm", "n_fgsm"], eps=["8/255", "16/255"])),
    dict(group="B1", label="der lambda {weight}", seeds=[0], set=dict(regularizer="der"), grid=dict(weight=[2, 8])),
    dict(group="B2", label="der", set=dict(regularizer="der"), weight_from="der lambda *")])


@pytest.fixture
def write(tmp_path):
    def path(**changes):
        file = tmp_path / "toy.json"
        file.write_text(json.dumps(BASE | changes))
        return file

    return path


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "records_folder", lambda: tmp_path / "records")
    return tmp_path / "records"


def put(job, valid_pgd, **final):
    """A synthetic record of a job."""
    job.records.mkdir(parents=True)
    (job.records / "config.json").write_text(json.dumps(dict(label=job.label, train=job.config.as_dict())))
    (job.records / "metrics.jsonl").write_text("".join(json.dumps(dict(epoch=i + 1, valid_pgd=v)) + "\n" for i, v in enumerate(valid_pgd)))
    (job.records / "final.json").write_text(json.dumps(dict(last=final)))


def test_grid_groups_and_order(write):
    jobs = load_manifest(write()).jobs
    labels = ["fgsm eps 8/255", "fgsm eps 16/255", "n_fgsm eps 8/255", "n_fgsm eps 16/255", "der lambda 2", "der lambda 8", "der"]
    assert [j.label for j in jobs[:7]] == labels and {j.config.seed for j in jobs[:7]} == {0}
    slugs = ["fgsm_eps_8_255-s1", "fgsm_eps_16_255-s1", "n_fgsm_eps_8_255-s1", "n_fgsm_eps_16_255-s1", "der-s1"]
    assert [j.slug for j in jobs[7:]] == slugs
    assert jobs[3].config.method == "n_fgsm" and jobs[3].config.eps == 16 / 255 and jobs[3].group == "A"
    assert jobs[6].sweep == ("der_lambda_2-s0", "der_lambda_8-s0")


def test_lambda_is_chosen_on_validation_images(write, records):
    jobs = load_manifest(write()).jobs
    put(jobs[4], [0.9, 0.2, 0.2, 0.2], pgd=0.9)
    assert resolve(jobs[6], jobs).sweep, "one run of the sweep is missing"
    put(jobs[5], [0.1, 0.3, 0.3, 0.3], pgd=0.1)  # a lower test accuracy and a lower best epoch decide nothing
    final = [j for j in load_manifest(write()).jobs if j.label == "der"]
    assert [j.config.weight for j in final] == [8.0, 8.0] and not any(j.sweep for j in final)
    jobs[4].records.joinpath("config.json").write_text(json.dumps(dict(train=jobs[4].config.change(lr=0.5).as_dict())))
    assert load_manifest(write()).jobs[6].sweep, "a record of other settings is none of the sweep"


def test_auto_precision_is_what_the_run_resolved_it_to(write, records):
    job = load_manifest(write()).jobs[0]
    put(job, [0.1])
    for precision in ("bf16", "fp32"):
        job.records.joinpath("config.json").write_text(json.dumps(dict(train=job.config.change(precision=precision).as_dict())))
        assert job.is_of(Run(job.records).config["train"])
    job.records.joinpath("config.json").write_text(json.dumps(dict(train=job.config.change(epochs=1).as_dict())))
    assert not job.is_of(Run(job.records).config["train"])


def test_a_diverged_run_of_a_sweep_is_out(write, records):
    jobs = load_manifest(write()).jobs
    put(jobs[4], [0.3])
    for job, weight in ((jobs[5], 2.0), (jobs[4], None)):
        job.records.mkdir(parents=True, exist_ok=True)
        suite.write_json(job.records / manifests.DIVERGED, dict(train=job.config.as_dict()))
        found = resolve(jobs[6], jobs)
        assert (found.config.weight if not found.sweep else None) == weight, "with none left there is nothing to choose"


def test_overridden_runs_are_no_records_of_the_manifest(write, records):
    plain, changed, elsewhere = (load_manifest(write(), o).jobs[0] for o in ({}, dict(epochs="1"), dict(device="cpu", data_dir="/x")))
    assert plain.records.is_relative_to(records) and elsewhere.records == plain.records
    assert not changed.records.is_relative_to(records) and changed.folder != plain.folder


RUN = dict(label="a", set=dict(method="fgsm"))
GOOD = dict(metric="pgd50", value=0.4, tolerance=0.1, source="somebody")


@pytest.mark.parametrize("changes, message", [
    (dict(rnus=[]), "Did you mean 'runs'"),
    (dict(runs=[RUN | dict(lable="b")]), "Did you mean 'label'"),
    (dict(runs=[dict(label="{epz}", grid=dict(eps=[0.1]))]), "not in its grid (eps)"),
    (dict(runs=[dict(label="{epz}", grid=dict(epz=[0.1]))]), "Did you mean 'eps'"),
    (dict(runs=[dict(label="x", grid=dict(eps=[0.1, 0.2]))]), "same label"),
    (dict(runs=[RUN, dict(label="b", weight_from="c *")]), "no run is labelled 'c *'"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(metric="pgd-50")])]), "Did you mean 'pgd50'"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(epoch="first")])]), "Allowed: last, best"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(relation="=>")])]), "unknown relation"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(value=46.06)])]), "share in [0, 1]"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(value="a lot")])]), "are numbers"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(tolerance=0)])]), "needs a value and a tolerance"),
    (dict(runs=[RUN | dict(expect=[GOOD | dict(source="")])]), "'source'"),
    (dict(runs=[RUN | dict(expect=[dict(GOOD, tolerence=1)])]), "Did you mean 'tolerance'"),
    (dict(runs=[RUN | dict(expect=[GOOD], set=dict(dataset="fashion_mini"))]), "not of fashion_mini"),
    (dict(runs=[dict(label="{eps}", grid=dict(eps=[0.1, 0.2]), expect=[GOOD])]), "needs 'run'"),
    (dict(runs=[RUN], claims=[dict(run="b", metric="pgd", relation=">", value=0.1)]), "Labels: a"),
    (dict(runs=[RUN], claims=[dict(run="a", metric="pgd", relation=">", than=["b"])]), "no run is labelled 'b'"),
    (dict(runs=[RUN], claims=[dict(run="a", metric="pgd", relation=">")]), "found neither"),
    (dict(runs=[RUN], claims=[dict(run="a", metric="pgd", relation=">", value=0.1, than=["a"])]), "found both"),
])
def test_errors_name_what_was_found(write, changes, message):
    with pytest.raises(DerkitError, match=re.escape(message)):
        load_manifest(write(**changes))


def test_cifar10_manifest_is_what_it_says():
    manifest = load_manifest(CIFAR)
    groups = {g: [j for j in manifest.jobs if j.group == g] for g in ("A", "B1", "B2", "C")}
    assert sum(map(len, groups.values())) == len(manifest.jobs)
    assert len(groups["A"]) == 27 and {j.config.epochs for j in groups["A"] + groups["B1"] + groups["B2"]} == {30}
    assert {round(j.config.eps * 255) for j in groups["A"]} == {8, 12, 16} and {j.config.seed for j in groups["A"]} == {0, 1, 2}
    assert {j.config.variant for j in groups["B1"]} == set(manifests.TrainConfig.__dataclass_fields__["variant"].metadata["choices"])
    assert all(j.config.model == "preact_resnet18" for j in manifest.jobs)
    sizes = {g: {(j.config.pgd50_size, j.config.autoattack_size) for j in jobs} for g, jobs in groups.items()}
    assert sizes == dict(A={(1000, 1000)}, B1={(0, 0)}, B2={(1000, 1000)}, C={(1000, 1000)}), "sweeps are judged by validation images"
    assert {j.config.epochs for j in groups["C"]} == {200}
    seeds = [j.config.seed for j in manifest.jobs]
    assert seeds == sorted(seeds), "one seed of everything first"
    first = [j.group for j in manifest.jobs if j.config.seed == 0]
    assert first == sorted(first), "A before B before C"
    assert all(c.source and c.value is not None for c in manifest.claims if c.published) and any(c.published for c in manifest.claims)


@pytest.fixture
def here(monkeypatch):
    """Jobs in this process: quick, and in order. tests/test_results.py starts real ones."""

    class Done:
        def __init__(self, job, threads, gpu=""):
            self.returncode = cli.main(suite.arguments(job))

        def poll(self):
            return self.returncode

    monkeypatch.setattr(suite, "start", Done)


def test_the_cifar10_commands_at_toy_size(here, capsys):
    """Calibration and plan, then a sweep and the run that takes its lambda from it: the manifest of the real runs."""
    jobs = manifests.read_manifest(CIFAR, TOY)
    labels = [f"fgsm + der ball eps 16/255 lambda {w}" for w in (2, 8, 32)] + ["fgsm + der ball eps 16/255"]
    chosen = suite.choose(jobs, labels, ["B"], [0])
    assert [j.label for j in chosen] == labels
    measured = costs.calibrate(chosen)
    assert len(measured) == 1 and min(measured.values()) > 0
    text = "\n".join(costs.plan(chosen, measured))
    assert "group B2: 1 runs, 0.0" in text and "lambda from its sweep" in text
    assert suite.run(chosen[3:], known=jobs) == 0 and "left out fgsm_der_ball_eps_16_255-s0" in capsys.readouterr().out
    assert suite.run(chosen, parallel=2, threads=1, known=jobs) == 0
    runs = [Run(j.records) for j in chosen]
    weights = [r.config["train"]["weight"] for r in runs]
    validation = [r.epochs["valid_pgd"].iloc[-1] for r in runs[:3]]
    assert weights[:3] == [2, 8, 32] and weights[3] == weights[validation.index(max(validation))]


def test_finished_runs_are_evaluated_further(here, write, capsys):
    """--evaluate: only finished runs, without training, and into the records."""
    path = write(runs=[dict(label="a", set=TOY | dict(method="fgsm")), dict(label="b", set=TOY)], seeds=[0], preset="fashion_mini")
    assert suite.finished(manifests.read_manifest(path), dict(pgd50=8)) == []
    sets = [f"--set={k}={v}" for k, v in TOY.items() if k != "dataset"] + ["--set=lr=0.05", "--threads=1"]
    assert suite.main([str(path), "--only", "a", *sets]) == 0
    job = manifests.read_manifest(path, dict(lr=0.05))[0]
    before = Run(job.folder)
    assert not {"pgd50", "aa"} & set(before.final["last"])
    assert suite.main([str(path), "--evaluate", "pgd50=8", *sets]) == 0
    text = capsys.readouterr().out
    assert "1 finished runs" in text and text.count("evaluating") == 1
    after = Run(job.records)
    assert before.final["last"].items() <= after.final["last"].items(), "what was there is kept"
    assert after.final["last"]["pgd50_images"] == after.final["best"]["pgd50_images"] == 8
    assert after.epochs["train_loss"].tolist() == before.epochs["train_loss"].tolist()


@pytest.mark.parametrize("arguments, message", [
    (["--group", "D"], "unknown group 'D'"),
    (["--seeds", "7"], "seeds [7]"),
    (["--evaluate", "autoattak=10"], "Did you mean 'autoattack'"),
    (["--evaluate", "autoattack=many"], "autoattack=1000"),
])
def test_command_line_errors(arguments, message, capsys):
    assert suite.main([str(CIFAR), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
