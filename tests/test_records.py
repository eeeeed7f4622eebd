"""Records: atomic files, JSON lines that survive a kill, run folders."""

import json
import math
import os

import pytest
import torch

from derkit import records
from derkit.errors import DerkitError
from derkit.records import Run, append_line, atomic_write, keep_epochs, load_runs, read_lines, write_json


def fill(path, epochs=3):
    for epoch in range(1, epochs + 1):
        append_line(path, dict(epoch=epoch, loss=1 / epoch, steps=dict(loss=[0.5, 0.25], acc=[1, None])))
    return path


def make_run(folder, final=True):
    folder.mkdir(parents=True)
    write_json(folder / "config.json", dict(train=dict(seed=1)))
    write_json(folder / "env.json", dict(torch="x"))
    fill(folder / "metrics.jsonl")
    if final:
        write_json(folder / "final.json", dict(last=dict(clean=0.5)))
    return folder


def test_lines_round_trip(tmp_path):
    rows = read_lines(fill(tmp_path / "m.jsonl"))
    assert [r["epoch"] for r in rows] == [1, 2, 3] and rows[1]["loss"] == 0.5
    assert read_lines(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_truncated_last_line_is_skipped_with_a_warning(tmp_path, cut):
    path = fill(tmp_path / "m.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 - cut])
    with pytest.warns(UserWarning, match="last line is truncated"):
        assert [r["epoch"] for r in read_lines(path)] == [1, 2]


def test_broken_line_elsewhere_is_an_error(tmp_path):
    path = fill(tmp_path / "m.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]) + "\n")
    with pytest.raises(DerkitError, match="line 2 is not JSON"):
        read_lines(path)


def test_keep_epochs(tmp_path):
    """Lines that the checkpoint does not know are dropped, a truncated one as well."""
    path = fill(tmp_path / "m.jsonl")
    first = path.read_text().splitlines()[:2]
    keep_epochs(path, 2)
    assert path.read_text().splitlines() == first
    fill(path)
    with open(path, "a") as f:
        f.write('{"epoch": 4')
    with pytest.warns(UserWarning):
        keep_epochs(path, 1)
    assert [r["epoch"] for r in read_lines(path)] == [1, 1]
    append_line(path, dict(epoch=2))
    assert read_lines(path)[-1] == {"epoch": 2}


def test_numbers_that_json_lacks_become_null(tmp_path):
    write_json(tmp_path / "a.json", dict(a=math.nan, b=[math.inf, 1.5], c=(1, -math.inf), d={"e": math.nan}))
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == dict(a=None, b=[None, 1.5], c=[1, None], d={"e": None})
    append_line(tmp_path / "a.jsonl", dict(x=math.nan))
    assert read_lines(tmp_path / "a.jsonl") == [{"x": None}]


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_atomic_write_keeps_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "sub" / "file.json"
    atomic_write(path, "old")
    monkeypatch.setattr(os, fails, lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_atomic_write_takes_text_and_bytes(tmp_path):
    atomic_write(tmp_path / "a", "é")
    atomic_write(tmp_path / "b", b"\x00")
    assert (tmp_path / "a").read_bytes() == "é".encode() and (tmp_path / "b").read_bytes() == b"\x00"


def test_run(tmp_path):
    run = Run(make_run(tmp_path / "r"))
    assert run.name == "r" and run.finished and run.config["train"]["seed"] == 1 and run.env["torch"] == "x"
    assert list(run.epochs["epoch"]) == [1, 2, 3] and run.steps("loss") == [0.5, 0.25] * 3
    assert repr(run) == "Run(r, 3 epochs, finished)"
    unfinished = Run(make_run(tmp_path / "u", final=False))
    assert not unfinished.finished and unfinished.final == {}
    with pytest.raises(DerkitError, match="not a run folder"):
        Run(tmp_path)


def test_load_runs(tmp_path):
    for name in ("b", "a", "c"):
        make_run(tmp_path / name)
    (tmp_path / "not a run").mkdir()
    assert [r.name for r in load_runs(tmp_path)] == ["a", "b", "c"]
    assert load_runs(tmp_path / "absent") == []


def test_runs_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DERKIT_HOME", str(tmp_path / "x"))
    assert records.runs_folder() == tmp_path / "x" / "runs"
    monkeypatch.setenv("DERKIT_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.runs_folder() == tmp_path / ".cache" / "derkit" / "runs"


def test_environment_says_what_numbers_depend_on():
    env = records.environment(torch.device("cpu"), "fp32", "because")
    assert env["torch"] == torch.__version__ and env["threads"] == torch.get_num_threads()
    assert (env["device"], env["gpu"], env["precision"], env["precision_reason"]) == ("cpu", None, "fp32", "because")
    json.dumps(env)
