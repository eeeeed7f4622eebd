"""The command line: help, a whole life of a run, one-line errors with exit status 2."""

import json
import os
import shlex
import subprocess
import sys
import time

import pytest

import derkit.__main__ as cli
from derkit.checkpoint import save_checkpoint
from derkit.config import PRESETS, GenerateConfig, TrainConfig
from derkit.generation.generate import load_samples
from derkit.records import Run
from derkit.training.loop import train

TOY = shlex.split("--train-size 40 --batch-size 20 --width 4 --eval-size 16 --probe-size 8 "
                  "--final-size 16 --final_steps 2 --eval_steps 2 --strong-size 0 --epochs 1")


def shell(*arguments):
    return subprocess.run([sys.executable, "-m", "derkit", *arguments], text=True, timeout=120,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("command, config",
                         [("train", TrainConfig.make()), ("generate", GenerateConfig())])
def test_help_lists_every_field(command, config, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    out, err = capsys.readouterr()
    words = " ".join(out.replace("│", " ").split())
    assert end.value.code == 0 and err == ""
    for name, field in type(config).model_fields.items():
        assert f"--{name.replace('_', '-')} " in words
        assert f"{field.description} (default: {getattr(config, name)})" in words, name
    assert all(name in words for name in PRESETS) or command == "generate"


def test_help_is_quick():
    """In CPU time, as other work may hold the machine; nothing is written on stderr."""
    before, result, after = os.times(), shell("train", "--help"), os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 12  # of the child; about 4 where this was written
    assert result.returncode == 0 and result.stderr == ""
    assert "derkit results FOLDER" in shell().stdout


def test_train_evaluate_generate_results(home, tmp_path, capsys):
    """The run of the shell is the run of a notebook; its checkpoint feeds the other commands."""
    result = shell("train", *TOY, "--seed", "3", "--method=fgsm")
    assert result.returncode == 0, result.stderr
    first, _, rest = result.stdout.partition("\n")
    run = Run(first.removeprefix("run folder: "))
    assert run.folder.parent == home / "runs" and json.loads(rest) == run.final
    given = dict(zip((w[2:].replace("-", "_") for w in TOY[::2]), TOY[1::2], strict=True))
    config = TrainConfig.make(**given, seed=3, method="fgsm")
    assert train(config, verbose=False).folder == run.folder

    source = ["--checkpoint", str(run.folder / "final.safetensors"), "--device", "cpu"]
    assert cli.main(["evaluate", *source, "--eps", "0.1", "--images", "8", "--strong=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["eps"], found["images"], found["strong_images"]) == (0.1, 8, 8)
    assert all(0 <= found[name] <= 1 for name in ("clean", "fgsm", "pgd", "strong"))

    bare = ["evaluate", "--checkpoint", str(tmp_path / "b"), "--dataset=fashion_mini"]
    save_checkpoint(bare[2], run.model().half())
    assert cli.main(bare) == 2 and "add --eps" in capsys.readouterr().err
    assert cli.main([*bare, "--eps", "0.1", "--images", "8", "--strong=8"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 8
    job = [*source, *shlex.split("--n 4 --shard_size 2 --init uniform --stop fixed --steps 1")]
    assert cli.main(["generate", *job, "--folder", str(tmp_path / "a"), "--part", "2/2"]) == 0
    assert "samples:" not in capsys.readouterr().out  # the other part is not there yet
    assert cli.main(["generate", *job, "--folder", str(tmp_path / "a"), "--part", "1/2"]) == 0
    assert f"samples: {tmp_path / 'a'}" in capsys.readouterr().out
    assert len(load_samples(tmp_path / "a")) == 4
    assert cli.main(["generate", *job]) == 0 and len([*(home / "generated").iterdir()]) == 1

    os.rename(run.folder, run.folder.with_name("toy-s3"))
    table, results = tmp_path / "table.csv", ["results", str(home / "runs")]
    assert cli.main([*results, "--csv", str(table)]) == 0
    assert table.read_text().splitlines()[1].startswith("toy,1,")
    assert cli.main([*results, "--which", "best"]) == 0 and "toy" in capsys.readouterr().out


def test_folder_and_fresh(tmp_path, capsys):
    arguments = ["train", "--folder", str(tmp_path / "here"), *TOY]
    written = lambda: (tmp_path / "here" / "final.json").stat().st_mtime_ns  # noqa: E731
    assert cli.main(arguments) == 0
    first = written()
    assert cli.main(arguments) == 0 and written() == first
    assert "loaded the finished run" in capsys.readouterr().out
    assert cli.main([*arguments, "--eps", "0.3"]) == 2
    assert "another config" in capsys.readouterr().err
    assert cli.main([*arguments, "--fresh"]) == 0 and written() > first


@pytest.mark.parametrize("arguments, message", [
    ("trian", "unknown command 'trian'. Did you mean 'train'"),
    ("train --metod fgsm", "unknown flag '--metod'. Did you mean '--method'"),
    ("train fgsm", "unknown flag 'fgsm'"),
    ("train --method rs_fgm", "unknown method 'rs_fgm'. Did you mean 'rs_fgsm'"),
    ("train --preset rice2002", "Did you mean 'rice2020'"),
    ("train --epochs", "epochs must be a valid integer, found ''"),
    ("train --eps 8", "Did you mean 8/255"),
    ("train --eps -0.1", "found '-0.1'"),
    ("train --train-size 5000", "4000"),
    ("train --dataset cifar10 --data-dir /nowhere/at/all", "does not exist"),
    ("train --device cuda:99", "not usable"),
    ("generate --n 4", "--checkpoint FILE is missing"),
    ("generate --checkpoint /nowhere.safetensors", "does not exist"),
    ("generate --inti pca", "Did you mean '--init'"),
    ("generate --init pcaa", "Did you mean 'pca'"),
    ("generate --part 1x4", "--part is I/N such as 1/4"),
    ("evaluate --checkpoint derkit/assets/extractor_fashion.safetensors", "add --dataset NAME"),
    ("results . --which lats", "Did you mean 'last'"),
])
def test_errors_are_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_loss_that_breaks(capsys):
    assert cli.main(["train", *TOY, "--lr=1e30", "--schedule=constant", "--precision=fp32"]) == 2
    assert capsys.readouterr().err.startswith("error: the ")


def test_other_processes_are_quiet(capsys, monkeypatch):
    """Under torchrun, process 0 alone says what is wrong."""
    place = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert cli.main(["train", "--epochs", "0"]) == 2 and capsys.readouterr().err == ""
    assert cli.main(["generate", "--part", "1/2"]) == 2
