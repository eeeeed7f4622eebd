"""Nothing is lost: killed trainings, full disks, read-only folders, NaN, Ctrl-C."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from derkit import util
from derkit.checkpoint import load_checkpoint
from derkit.config import TrainConfig
from derkit.records import read_lines
from derkit.training import loop
from derkit.training.loop import train
from derkit.util import DerkitError
from tests.conftest import SMALL
from tests.survivor import record


def python(*words):
    """A process of its own, in the repository; it takes SIGINT even if we are in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=Path(__file__).parents[1], text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(tmp_path):
    """SIGKILL before and after all that trains, evaluates and writes, and in a write."""
    process = python("tests.survivor", str(tmp_path))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "survived" in out, err


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The record of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    config = TrainConfig.make("fashion_mini", **SMALL)
    return record(train(config, tiny, folder=folder, verbose=False).folder)


@pytest.mark.parametrize("name, call", [
    ("config.json", 1), ("env.json", 1), ("metrics.jsonl", 1), ("metrics.jsonl", 3), ("last.pt", 2),
    ("best.safetensors", 1), ("final.safetensors", 1), ("final.json", 1),
])  # fmt: skip
def test_a_write_that_fails(name, call, whole, tiny, config, tmp_path, monkeypatch):
    """One clear error, files stay as they were, and the same call goes on to the same record."""
    original, count = os.replace, iter(range(1, 100))

    def full(source, target):
        if Path(target).name == name and next(count) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with monkeypatch.context() as patch, pytest.raises(DerkitError) as error:
        patch.setattr(util.os, "replace", full)
        train(config(), tiny, folder=tmp_path, verbose=False)
    words = "could not write", "No space left", "free some space and run the same again"
    assert all(part in str(error.value) for part in words)
    assert not list(tmp_path.glob(".*.tmp")) and not (tmp_path / "final.json").exists()
    assert record(train(config(), tiny, folder=tmp_path, verbose=False).folder) == whole


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_a_read_only_folder(tiny, config):
    """Training says so; a finished run there is still read. Root, who may all, steps down."""
    c, user = config(epochs=1), os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # tmp_path is for its owner only
        place = Path(name)
        done = train(c, tiny, folder=place / "done", verbose=False)
        for path in (place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        os.seteuid(user or 65534)
        try:
            with pytest.raises(DerkitError, match="could not write .*make the folder writable"):
                train(c, tiny, folder=place / "new", verbose=False)
            assert train(c, tiny, folder=done.folder, verbose=False).final == done.final
        finally:
            os.seteuid(user)
            place.chmod(0o755)
            done.folder.chmod(0o755)
        assert [path.name for path in place.iterdir()] == ["done"]


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_nan_names_the_last_good_checkpoint(what, tiny, config, tmp_path, monkeypatch):
    """Two steps an epoch: the sixth breaks. With the cause removed, the same call goes on."""
    c, original, count = config(epochs=4), loop.train_step, iter(range(1, 100))

    def step(*args, **options):
        total, statistics = original(*args, **options)
        broken = torch.nan if next(count) == 6 else 1.0
        if what == "weights":  # the gradient breaks, and no loss that is recorded
            return total * broken, statistics
        return total, statistics | dict(loss=statistics["loss"] * broken)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError) as error:
        patch.setattr(loop, "train_step", step)
        train(c, tiny, folder=tmp_path, verbose=False)
    words = f"the {what} ", "not finite", "epoch 3", f"{tmp_path / 'last.pt'} (epoch 2)"
    assert all(part in str(error.value) for part in words)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    best = load_checkpoint(tmp_path / "best.safetensors")["state"]
    assert all(tensor.isfinite().all() for tensor in best.values())
    run = train(c, tiny, folder=tmp_path, verbose=False)
    assert run.final["last_epoch"] == 4 == len(run.epochs)


def test_ctrl_c_in_a_shell(tmp_path):
    """SIGINT to a real process: one line, status 130, finished epochs are kept."""
    options = SMALL | dict(train_size=64, epochs=400)
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = python("derkit", "train", "--folder", str(tmp_path / "run"), *flags)
    end = time.monotonic() + 90
    while not (tmp_path / "run" / "last.pt").is_file() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("\n") == 1
    assert err.startswith("interrupted: finished epochs and shards are kept")
    assert not (tmp_path / "run" / "final.json").exists()
