"""Nothing is lost: runs killed at drawn moments, full disks, read-only folders, two processes, NaN, Ctrl-C.

The kills are SIGKILL in children of tests/survivor.py, at drawn calls of the functions that train, evaluate and write
(also in the middle of a write) and after drawn delays. Whatever happened on the way, the result is that of an undisturbed
run, bit for bit.
"""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from derkit import cli, gen_cli, records, run_folders, training
from derkit.checkpoint import load_checkpoint, save_checkpoint
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.generation import generate
from derkit.records import Run, append_line, read_lines
from derkit.run_folders import run_folder
from derkit.samples import load_samples
from derkit.training import train

from . import survivor

ROOT = Path(__file__).resolve().parents[1]
TIMING = ("seconds", "images_per_s")


def record(folder):
    """All that a training run leaves behind and that must not depend on how often it was killed."""
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_lines(folder / "metrics.jsonl")]
    points = {name: load_checkpoint(folder / name) for name in ("best.pt", "last.pt", "final.pt")}
    hashes = {name: (p["sha256"], p["epoch"]) for name, p in points.items()}
    momentum = [v["momentum_buffer"] for v in points["last.pt"]["optimizer"]["state"].values()]
    config = json.loads((folder / "config.json").read_text())
    return rows, json.loads((folder / "final.json").read_text()), hashes, [m.numpy().tobytes() for m in momentum], config


def shards(folder):
    """The same for generated samples: the files' bytes."""
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("seconds_per_1000")
    manifest = json.loads((folder / "manifest.json").read_text())
    return {p.name: p.read_bytes() for p in sorted(folder.glob("part_*.npz"))}, summary, manifest


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`attempt(task, folder, kill)` -> exit status of a child that was killed, or was not."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", TQDM_DISABLE="1", CUDA_VISIBLE_DEVICES="")
    errors = tmp_path_factory.mktemp("server") / "stderr"
    with open(errors, "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "tests.survivor"], cwd=ROOT, env=environment, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def attempt(task, folder, **kill):
        process.stdin.write(json.dumps(dict(task=task, folder=str(folder), kill=kill)) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer and json.loads(answer) <= 0, errors.read_text()
        return json.loads(answer)

    yield attempt
    process.stdin.close()
    process.wait(30)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """What each task ends with when nobody disturbs it, and how long it takes."""
    out = {}
    for task, result in (("train", record), ("generate", shards)):
        folder = tmp_path_factory.mktemp(task) / "run"
        assert server(task, folder) == 0
        began = time.monotonic()
        assert server(task, folder.parent / "again") == 0
        seconds = time.monotonic() - began
        out[task] = (result(folder), seconds)
        assert result(folder.parent / "again") == out[task][0]
    return out


def draw(rng, task, seconds):
    """One kill: at a call, in a write, or after a delay."""
    if rng.random() < 0.25:
        return dict(delay=rng.uniform(0.02, 0.9) * seconds)
    where = rng.choice(survivor.POINTS[task])
    moment = "torn" if where.endswith("fsync") and rng.random() < 0.7 else rng.choice(["before", "after"])
    return dict(where=where, call=rng.randint(1, 3), moment=moment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("task", ["train", "generate"])
def test_killed_again_and_again(task, server, undisturbed, tmp_path):
    """20 kills of each task or a few more, at most five of a run; then it is left to finish."""
    expected, seconds = undisturbed[task]
    result, killed, kinds = (record if task == "train" else shards), 0, set()
    for seed in range(40):
        if killed >= 20:
            break
        rng, folder, here, done = random.Random(seed), tmp_path / f"{seed}" / "run", 0, None
        folder.parent.mkdir()
        while here < 5 and done != 0:
            kill = draw(rng, task, seconds)
            done = server(task, folder, **kill)
            assert done in (0, -signal.SIGKILL), (seed, kill)
            if done:
                here += 1
                kinds.add(kill.get("where", "delay") + kill.get("moment", ""))
        assert server(task, folder) == 0, seed
        assert result(folder) == expected, (seed, kinds)
        assert not list(folder.glob(".*.tmp")), "what a killed writer left is removed"
        killed += here
    assert killed >= 20 and len(kinds) >= 8, (killed, kinds)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("task", ["train", "generate"])
@pytest.mark.parametrize("call", [1, 4, 6])
def test_killed_in_the_middle_of_a_write(task, call, server, undisturbed, tmp_path):
    folder = tmp_path / "run"
    assert server(task, folder, where="records.os.fsync", call=call, moment="torn") == -signal.SIGKILL
    assert server(task, folder) == 0
    assert (record if task == "train" else shards)(folder) == undisturbed[task][0]


# ---------------------------------------------------------------------------------------------------- full disk etc.
WRITES = [(name, errno.ENOSPC) for name in ("config.json", "env.json", "best.pt", "last.pt", "final.pt", "final.json", "metrics.jsonl")]


@pytest.mark.parametrize("name, code", [*WRITES, ("last.pt", errno.EROFS), ("final.json", errno.EIO)])
def test_a_write_that_fails_is_one_clear_error(name, code, tiny, config, tmp_path, monkeypatch):
    """Whichever file it is: what was there before stays as it was, and the same call then goes on to the same record."""
    c, folder, count = config(epochs=3), tmp_path / "run", iter(range(1, 100))
    whole = record(train(c, tiny, folder=tmp_path / "whole", verbose=False).folder)
    fsync, replace = os.fsync, os.replace
    late = 2 if name in ("last.pt", "metrics.jsonl") else 1

    def fails():
        if next(count) == late:
            raise OSError(code, os.strerror(code))

    def full_fsync(fd):
        if name == "metrics.jsonl" and os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            fails()
        fsync(fd)

    def full_replace(source, target):
        if Path(target).name == name:
            fails()
        replace(source, target)

    if name == "metrics.jsonl" and not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to know which file is written")
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full_fsync)
        patch.setattr(records.os, "replace", full_replace)
        with pytest.raises(DerkitError, match=rf"could not write .*{os.strerror(code)}.*run the same again"):
            train(c, tiny, folder=folder, verbose=False)
    assert not list(folder.glob(".*.tmp")) and not (folder / "final.json").exists()
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else ():
        json.loads(line)
    if (folder / "last.pt").exists():
        load_checkpoint(folder / "last.pt")
    assert record(train(c, tiny, folder=folder, verbose=False).folder) == whole


def test_disk_that_fills_up_in_the_middle_of_a_line(tiny, config, tmp_path, monkeypatch):
    """A real limit: the second line of metrics.jsonl fits in part. The part is taken back."""
    c, folder, original = config(epochs=3), tmp_path / "run", training.append_line
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path, row):
        limit = soft if not path.exists() or not path.stat().st_size else path.stat().st_size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            original(path, row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch, pytest.raises(DerkitError, match="free some space"):
        patch.setattr(training, "append_line", limited)
        train(c, tiny, folder=folder, verbose=False)
    assert len((folder / "metrics.jsonl").read_bytes().split(b"\n")) == 2  # one line, ended
    whole = train(c, tiny, folder=tmp_path / "whole", verbose=False)
    assert record(train(c, tiny, folder=folder, verbose=False).folder) == record(whole.folder)


def test_full_disk_at_the_first_checkpoint(tiny, config, tmp_path):
    """A real limit on the size of a file, below that of a checkpoint."""
    c, folder = config(epochs=1), tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(DerkitError, match="could not write .*File too large.*free some space"):
            train(c, tiny, folder=folder, verbose=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.glob("*.pt")) and not list(folder.glob(".*.tmp"))
    assert train(c, tiny, folder=folder, verbose=False).finished


@pytest.fixture
def read_only():
    """`with read_only(folder)`: no write into it succeeds, for root neither."""
    if not hasattr(os, "seteuid"):
        pytest.skip("needs POSIX users")
    from contextlib import contextmanager

    @contextmanager
    def protect(folder):
        folder.chmod(0o555)
        was = os.geteuid()
        if was == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            if was == 0:
                os.seteuid(0)
            folder.chmod(0o755)

    return protect


def test_read_only_folder(tiny, mini, config, read_only, trained):
    """Training and generation say so; a finished run there is still read."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        done = train(config(epochs=1), tiny, folder=place / "done", verbose=False)
        for file in [*done.folder.iterdir(), done.folder]:
            file.chmod(file.stat().st_mode | 0o555)
        half = place / "half"
        half.mkdir()
        before = {p.name: p.stat().st_mtime_ns for p in done.folder.iterdir()}
        for folder in (place, half):
            with read_only(folder), pytest.raises(DerkitError, match=r"could not write .*Permission denied.*make the folder writable"):
                train(config(epochs=1), tiny, folder=folder / "new" if folder is place else folder, verbose=False)
            with read_only(folder), pytest.raises(DerkitError, match="could not write"):
                generate(trained, mini, 4, folder=folder / "new" if folder is place else folder, init="uniform", stop="fixed",
                         steps=1, classes="0")
        with read_only(done.folder):
            assert train(config(epochs=1), tiny, folder=done.folder, verbose=False).final == done.final
        assert {p.name: p.stat().st_mtime_ns for p in done.folder.iterdir()} == before
        assert list(half.iterdir()) == []
        assert train(config(epochs=1), tiny, folder=half, verbose=False).final == done.final


def test_two_processes_on_one_run(tiny, config, tmp_path):
    """The second is told so while the first trains, and finds the finished run when it looked too early."""
    c, folder = config(epochs=1), tmp_path / "run"
    folder.mkdir()
    with records.lock_folder(folder), pytest.raises(DerkitError, match="another process is training"):
        train(c, tiny, folder=folder, verbose=False)
    original, first = run_folders.lock_folder, []

    def quicker(path):
        """Between the first look and the lock, the other process comes, trains and goes."""
        if not first:
            first.append(True)
            first.append(train(c, tiny, folder=folder, verbose=False))
        return original(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folders, "lock_folder", quicker)
        second = train(c, tiny, folder=folder, verbose=False)
    assert second.final == first[1].final
    first.clear()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DerkitError, match="another config"):
        patch.setattr(run_folders, "lock_folder", quicker)
        train(c.change(eps=0.05), tiny, folder=folder, verbose=False)
    assert Run(folder).final == second.final


# ------------------------------------------------------------------------------------------------------ NaN and Inf
class Breaks(nn.Module):
    """A linear model whose chosen output breaks from the n-th training forward on: 'loss' or 'gradient'."""

    def __init__(self, what, value, call):
        super().__init__()
        self.head, self.unused = nn.Linear(784, 10), nn.Parameter(torch.ones(3))
        nn.init.zeros_(self.head.weight)
        self.what, self.value, self.left = what, value, call

    def forward(self, x):
        out = self.head(x.flatten(1))
        self.left -= self.training
        if self.training and self.left < 0 and self.what == "loss":
            return out + self.value
        if self.training and self.left < 0:  # no effect on any output, only on the gradient of ``unused``
            return out + _Poison.apply(self.unused.sum(), self.value)
        return out

    def __repr__(self):
        return "Breaks()"


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.value), None


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_stops_the_run_and_names_the_last_good_checkpoint(what, value, tiny, config, tmp_path):
    """Also a gradient that breaks weights without touching any loss."""
    c, folder = config(epochs=4, method="standard"), tmp_path / "run"
    with pytest.raises(FloatingPointError) as error:
        train(c, tiny, model=Breaks(what, value, 5), folder=folder, verbose=False)  # two steps an epoch: breaks in the third
    assert f"{folder / 'last.pt'} (epoch 2)" in str(error.value) and "epoch 3" in str(error.value)
    assert len(read_lines(folder / "metrics.jsonl")) == 2
    for name in ("last.pt", "best.pt"):
        assert all(t.isfinite().all() for t in load_checkpoint(folder / name)["state"].values())
    healthy = train(c, tiny, model=Breaks(what, value, 10**6), folder=folder, verbose=False)  # the cause removed: it goes on
    assert healthy.final["last_epoch"] == 4 and len(healthy.epochs) == 4


def test_nan_before_any_checkpoint_says_so(tiny, config):
    with pytest.raises(FloatingPointError, match="No checkpoint was written before"):
        train(config(lr=1e30, schedule="constant", momentum=0, method="standard"), tiny, verbose=False)


# ----------------------------------------------------------------------------------------------------------- Ctrl-C
SMALL = ["train_size=64", "valid_size=32", "epochs=4", "batch_size=32", "width=4", "eval_size=16", "probe_size=8", "final_size=16",
         "final_steps=2", "eval_steps=2", "strong_size=0", "device=cpu", "precision=fp32"]


def sets(pairs):
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture
def terminal():
    """SIGINT as in a terminal, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_in_a_shell(tmp_path):
    """SIGINT to a real process: one line, status 130, and the same command goes on."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "derkit.training", "--folder", str(folder), *sets([*SMALL, "epochs=400"])]
    process = subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=ROOT)
    end = time.monotonic() + 90
    while not (folder / "last.pt").is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("interrupted: ") and err.count("\n") == 1
    assert load_checkpoint(folder / "last.pt")["epoch"] >= 1 and not (folder / "final.json").exists()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("where", ["train_step", "epoch_evaluation", "append_line", "save_checkpoint", "final_evaluation"])
def test_ctrl_c_leaves_a_resumable_run(where, tmp_path, capsys, monkeypatch):
    """At the third call of each part of a run: the same record as without it."""
    command, original = ["--folder", str(tmp_path / "run"), *sets(SMALL)], getattr(training, where)
    assert cli.main(["--folder", str(tmp_path / "whole"), *sets(SMALL)]) == 0
    count = iter(range(100))

    def pressed(*args, **kwargs):
        if next(count) == (0 if where == "final_evaluation" else 2):
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(training, where, pressed)
        assert cli.main(command) == 130
    out, err = capsys.readouterr()
    assert err.startswith("interrupted: ") and err.count("\n") == 1 and "Traceback" not in out
    assert cli.main(command) == 0
    assert record(tmp_path / "run") == record(tmp_path / "whole")


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_in_a_generation(trained, tmp_path, capsys, monkeypatch):
    from derkit import generation

    save_checkpoint(tmp_path / "m.pt", trained, TrainConfig.make("fashion_mini", train_size=400).as_dict())
    command = ["--checkpoint", str(tmp_path / "m.pt"), *sets(["n=40", "shard_size=10", "k=8", "steps=2"]), "--folder"]
    original, count = generation._range, iter(range(100))

    def pressed(*args):
        if next(count) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_range", pressed)
        assert gen_cli.main([*command, str(tmp_path / "out")]) == 130
    err = capsys.readouterr().err
    assert err.startswith("interrupted: ") and err.count("\n") == 1
    assert len(list((tmp_path / "out").glob("part_*.npz"))) == 2
    for folder in ("out", "whole"):
        assert gen_cli.main([*command, str(tmp_path / folder)]) == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole") and len(load_samples(tmp_path / "out")) == 40


# --------------------------------------------------------------------------------------------------------- the lines
def test_a_line_after_a_torn_one(tmp_path):
    """What a killed writer left of its line is dropped by the next one: the file stays readable to its end."""
    path = tmp_path / "timing.jsonl"
    append_line(path, dict(shard=0))
    whole = path.read_bytes()
    for torn in (b'{"shard": 1, "secon', b"{", '{"name": "é'.encode()[:-1], b"\x00\x00"):
        path.write_bytes(whole + torn)
        append_line(path, dict(shard=2))
        assert [r["shard"] for r in read_lines(path)] == [0, 2]
    path.write_bytes(b'{"shard"')  # the only line is torn
    append_line(path, dict(shard=3))
    assert read_lines(path) == [{"shard": 3}]


def test_run_folder_of_other_content(tiny, config):
    """A folder whose config.json is none: one clear error, nothing deleted."""
    c = config(epochs=1)
    folder = run_folder(c, tiny)
    train(c, tiny, verbose=False)
    for text in ("{", "[1, 2]", '{"train": {"no_such_field": 1}, "data_sha256": "tiny"}', "{}", "\x80"):
        (folder / "config.json").write_bytes(text.encode("latin1"))
        with pytest.raises(DerkitError, match="config.json"):
            train(c, tiny, verbose=False)
        assert (folder / "final.json").is_file() and (folder / "final.pt").is_file()
