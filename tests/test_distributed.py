"""Two gloo processes under torchrun against one: same weights, errors of one end all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from derkit.__main__ import main
from derkit.checkpoint import load_state, save_checkpoint
from derkit.config import TrainConfig
from derkit.records import Run
from tests import workers

DERKIT = "-m", "--", "derkit"  # without the -- torchrun takes --n for an option of its own
# FGSM from x itself, no BatchNorm: nothing is drawn, and no sample depends on another
CASES = {"plain": {}, "der": dict(regularizer="der", variant="marginal", ema=0.9, clip=0.1)}


def torchrun(*words, home):
    """(exit status, stdout, stderr) of two processes; a hang is an error after five minutes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | dict(OMP_NUM_THREADS="1", DERKIT_HOME=str(home), PYTHONPATH=path)
    done = subprocess.run([*command, "--nproc-per-node", "2", *map(str, words)], env=env,
                          capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """one/ by one process, two/ by two, of which 'more' was begun by one; and what was printed."""
    folder, more = tmp_path_factory.mktemp("runs"), CASES["der"]
    with pytest.MonkeyPatch.context() as patch:  # workers.main replaces both
        patch.setattr(workers.loop, "train_step", workers.train_step)
        patch.setattr(workers.loop, "train_epoch", workers.train_epoch)
        workers.main(json.dumps(CASES), folder / "one")
        workers.main(json.dumps({"more": more | dict(mode="half")}), folder / "two")
    assert len(Run(folder / "two" / "more").epochs) == 1
    last = {"dead": dict(mode="raise")}  # it ends all
    cases = CASES | {"nan": dict(mode="nan"), "more": more} | last
    found = torchrun(workers.__file__, json.dumps(cases), folder / "two", home=folder)
    assert "process 1 has had enough" in found[2], found[2]
    return folder, *found


def test_two_processes_equal_one(runs):
    """51 images in batches of 25 (13 + 12), the last of 1 (both compute it): weights, records."""
    ends = set()
    for name, twin, counts in (("plain", "plain", [2, 2]), ("der", "der", [2, 2]),
                               ("more", "der", [1, 2])):
        one, two = runs[0] / "one" / twin, runs[0] / "two" / name
        a, b = (load_state(folder / "last.pt") for folder in (one, two))
        for part in ("model", "ema", "optimizer"):
            torch.testing.assert_close(b.get(part), a.get(part), rtol=1e-6, atol=1e-6, msg=name)
        assert Run(two).epochs["processes"].tolist() == counts
        for column in ("train_loss", "train_acc", "valid_pgd", "probe_dE"):  # of six digits
            expected = Run(one).epochs[column].tolist()
            assert Run(two).epochs[column].tolist() == pytest.approx(expected, abs=2e-6)
        ends.add(round(b["model"]["1.head.weight"].abs().sum().item(), 6))
    assert len(ends) == 2  # equal by being left alone would be easy


def test_errors(runs):
    """What all can know is raised by all, and the next run went on; a dead process ends all."""
    folder, status, out, errors = runs
    for rank in (0, 1):
        assert out.count(f"nan, process {rank}: ") == 1
    assert out.count("the loss is not finite at epoch 1, step 1 of 3") == 2 == out.count("process")
    assert status != 0 and errors.count("RuntimeError: process 1 has had enough") == 1
    for name in ("nan", "dead"):
        assert not (folder / "two" / name / "final.json").exists()


def test_the_command_line(net, tmp_path):
    """Generation gives the bytes of one process; what both processes find is printed once."""
    file, options = tmp_path / "net.safetensors", dict(n=20, init="pca", shard_size=5, steps=2)
    save_checkpoint(file, net(), TrainConfig.make("fashion_mini", train_size=400).as_dict())
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words = ["generate", "--checkpoint", str(file), "--device=cpu", "--stop=fixed", *words]
    status, out, errors = torchrun(*DERKIT, *words, "--folder", tmp_path / "two", home=tmp_path)
    assert status == 0 and out.count("samples: ") == 1, errors
    assert main([*words, "--folder", str(tmp_path / "one")]) == 0
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("part_*.npz")}
                for name in ("one", "two"))
    assert len(one) == 4 and one == two
    words = "train", "--method", "fgsm", "--regularizer", "gradalign", "--device", "cpu"
    status, out, errors = torchrun(*DERKIT, *words, home=tmp_path)
    assert status != 0 and out == "" and errors.count("error: gradalign's double backward") == 1
