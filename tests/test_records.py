"""Records: JSON lines, run folders, committed records, groups and tables."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from derkit import records
from derkit.checkpoint import save_checkpoint
from derkit.config import TrainConfig
from derkit.records import Run, load_records, read_lines, run_folder, write_lines
from derkit.util import DerkitError, write_json

ROWS = [dict(epoch=e, loss=1 / e, steps=dict(loss=[0.5, 0.25], acc=[1, None])) for e in (1, 2, 3)]


def make_run(folder, final=None, **config):
    train = dict(seed=0, method="fgsm", regularizer="none", eps=0.2)
    train |= {key: config.pop(key) for key in tuple(config) if key in train}
    write_json(folder / "config.json", dict(train=train) | config)
    write_json(folder / "env.json", dict(torch="x"))
    write_lines(folder / "metrics.jsonl", ROWS)
    if final is not None:
        write_json(folder / "final.json", dict(last=final, best=final))
    return folder


# ---------------------------------------------------------------------------------------- lines
def test_lines_round_trip(tmp_path):
    path = tmp_path / "sub" / "m.jsonl"
    write_lines(path, ROWS)
    assert read_lines(path) == ROWS and path.read_bytes().count(b"\n") == 3
    write_lines(path, ROWS[:1])
    assert read_lines(path) == ROWS[:1]
    write_lines(path, [dict(a=math.nan, b=[math.inf, 1.5])])  # which JSON lacks
    assert read_lines(path) == [dict(a=None, b=[None, 1.5])]
    write_lines(path, [])
    assert read_lines(path) == [] == read_lines(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("line", [b'{"epoch": 4', b"[1]", b"3", b"\xff", b"[" * 10_000, b"nul"])
def test_a_broken_line_is_named(tmp_path, line):
    path = make_run(tmp_path / "r") / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(line)
    with pytest.raises(DerkitError, match="metrics.jsonl, line 4 is not a JSON record"):
        Run(tmp_path / "r").epochs.head()


# ----------------------------------------------------------------------------------------- runs
def test_run(tmp_path):
    run = Run(make_run(tmp_path / "r", dict(clean=0.5)))
    assert (run.name, run.finished, run.env["torch"]) == ("r", True, "x")
    assert run.config["train"]["seed"] == 0 and run.final["last"] == dict(clean=0.5)
    assert list(run.epochs["epoch"]) == [1, 2, 3]
    assert repr(run) == "Run(r, 3 epochs, finished)"
    unfinished = Run(make_run(tmp_path / "u"))
    assert not unfinished.finished and repr(unfinished) == "Run(u, 3 epochs)"
    with pytest.raises(DerkitError, match="not a run folder"):
        Run(tmp_path)


def test_the_model_of_a_run(tmp_path, net, batch):
    run = Run(make_run(tmp_path / "r"))
    nets = dict(final=net(), best=net(seed=1))
    for name, model in nets.items():
        save_checkpoint(run.folder / f"{name}.safetensors", model)
    for which, name in (("last", "final"), ("best", "best")):
        assert torch.equal(run.model(which)(batch[0]), nets[name](batch[0]))
    assert torch.equal(run.model(model=net(seed=2))(batch[0]), nets["final"](batch[0]))
    with pytest.raises(DerkitError, match="unknown epoch 'first'.*last, best"):
        run.model("first")
    with pytest.raises(DerkitError, match="does not exist"):
        Run(make_run(tmp_path / "u")).model()


def test_runs_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DERKIT_HOME", str(tmp_path / "x"))
    assert records.runs_folder() == tmp_path / "x" / "runs"
    monkeypatch.setenv("DERKIT_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.runs_folder() == tmp_path / ".cache" / "derkit" / "runs"


def test_the_folder_of_a_run_names_what_decides_it(mini):
    config = TrainConfig.make(regularizer="der", method="fgsm", eps="0.2")
    folder = run_folder(config, mini)
    assert folder.parent == records.runs_folder()
    assert folder.name.startswith("fashion_mini-fgsm-der-norm-eps0.2-s0-")
    others = [run_folder(config.change(epochs=3), mini), run_folder(config, mini, "own"),
              run_folder(config, replace(mini, sha256="x"))]
    assert len({folder, *others}) == 4
    assert run_folder(config.change(device="cpu"), mini) == folder
    assert run_folder(config, replace(mini, name="../../up")).parent == folder.parent


def test_signature_tells_modules_apart():
    modules = [nn.Linear(2, 3), nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 3)), None]
    assert len({records.signature_of(module) for module in modules}) == 4
    assert records.signature_of(None) == ""
    assert records.signature_of(nn.Linear(2, 3)) == records.signature_of(modules[0])


def test_environment_says_what_numbers_depend_on():
    env = records.environment(torch.device("cpu"), "fp32", "because")
    assert env["torch"] == torch.__version__ and env["threads"] == torch.get_num_threads()
    assert (env["device"], env["gpu"], env["precision"]) == ("cpu", None, "fp32")
    assert env["precision_reason"] == "because"
    assert env["cpu"] == torch.backends.cpu.get_cpu_capability()
    json.dumps(env)


# --------------------------------------------------------------------------------------- groups
COMMITTED = sorted({path.parents[1].name for path in records.records_folder().glob("*/*/env.json")})


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_records_are_read(name):
    """Those of earlier versions of the kit as well, with fields and variants that it lost."""
    groups = load_records(name)
    assert groups and all(run.finished for runs in groups.values() for run in runs)
    for run in (runs[0] for runs in groups.values()):
        assert len(run.epochs) == run.final["last_epoch"]
        assert {"clean", "pgd", "dE"} <= set(run.final["last"]) & set(records.METRICS)


def test_labels_and_order_of_records(tmp_path):
    """The suite's label, else method and regulariser; the suite's order, then seeds."""
    for i, config in enumerate((dict(order=2, label="late"), dict(order=1, seed=1),
                                dict(order=1), dict(order=0, regularizer="der"))):
        make_run(tmp_path / "suite" / f"run{i}", dict(clean=0.5), **config)
    make_run(tmp_path / "suite" / "running", label="unfinished")
    groups = load_records("suite", tmp_path)
    assert list(groups) == ["fgsm + der", "fgsm", "late"]
    assert [run.name for run in groups["fgsm"]] == ["run2", "run1"]
    with pytest.raises(DerkitError, match="no records 'suit' in .* Did you mean 'suite'"):
        load_records("suit", tmp_path)
    with pytest.raises(DerkitError, match="There are: none"):
        load_records("suite", tmp_path / "absent")


def test_grid(tmp_path):
    for name in ("a-s0", "a-s1", "b-s0", "alone"):
        make_run(tmp_path / name, dict(clean=0.5))
    make_run(tmp_path / "b-s1")
    assert {k: len(v) for k, v in records.grid(tmp_path).items()} == {"a": 2, "alone": 1, "b": 1}
    with pytest.raises(DerkitError, match="no finished runs in"):
        records.grid(tmp_path / "absent")
