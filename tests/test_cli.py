"""The command line: help, a run, one-line errors with exit status 2."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from derkit import cli, training
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.presets import PRESETS
from derkit.records import Run

TOY = [
    "train_size=40",
    "batch_size=20",
    "width=4",
    "eval_size=16",
    "probe_size=8",
    "final_size=16",
    "final_steps=2",
    "eval_steps=2",
    "strong_size=0",
    "device=cpu",
]


def shell(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "derkit.training", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def sets(*pairs):
    return [word for pair in (*TOY, *pairs) for word in ("--set", pair)]


def test_help_names_every_field_and_preset():
    result = shell("--help")
    assert result.returncode == 0 and result.stderr == ""
    for f in dataclasses.fields(TrainConfig):
        assert f"  {f.name}=" in result.stdout and f.metadata["help"] in result.stdout, f.name
    for name, preset in PRESETS.items():
        assert f"  {name}: {preset.about}" in result.stdout


def test_run_from_the_shell_is_the_run_of_the_notebook(home):
    """--set as in the issue, at toy size; the same call in Python then finds the finished run."""
    pairs = ("dataset=fashion_mini", "epochs=1", "method=rs_fgsm", "seed=3")
    result = shell(*sets(*pairs))
    assert result.returncode == 0, result.stderr
    first, _, rest = result.stdout.partition("\n")
    folder = first.removeprefix("run folder: ")
    run = Run(folder)
    assert folder.startswith(str(home)) and json.loads(rest) == run.final
    assert run.config["train"]["seed"] == 3 and run.config["sizes"]["train"] == 40 and len(run.epochs) == 1
    config = TrainConfig.make(**cli.parse_sets([*TOY, *pairs]))
    assert training.train(config, verbose=False).folder == run.folder and len(list(run.folder.parent.iterdir())) == 1


def test_error_from_the_shell():
    result = shell("--set", "method=rs_fgm")
    assert result.returncode == 2 and result.stdout == ""
    assert (
        result.stderr.startswith("error: unknown method 'rs_fgm'. Did you mean 'rs_fgsm'?")
        and result.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "rice2002"], "Did you mean 'rice2020'"),
        (["--set", "epoch=3"], "Did you mean 'epochs'"),
        (["--set", "epochs"], "key=value"),
        (["--set", "=3"], "key=value"),
        (["--set", "epochs="], "epochs"),
        (["--set", "eps=8"], "8/255"),
        (["--set", "eps=-0.1"], "eps"),
        (["--set", "eps=abc"], "eps"),
        (["--set", "epochs=0"], "epochs"),
        (["--set", "variant=segmnt", "--set", "regularizer=der"], "'segment'"),
        (["--set", "dataset=fashionmini"], "'fashion_mini'"),
        (["--set", "train_size=5000"], "4000"),
        (["--set", "data_dir=/nowhere/at/all"], "does not exist"),
        (["--set", "dataset=cifar10", "--set", "data_dir=/nowhere/at/all"], "does not exist"),
        (["--set", "device=cuda:99"], "not usable"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_loss_that_breaks_is_one_line(capsys):
    assert cli.main(sets("lr=1e30", "epochs=2", "schedule=constant", "precision=fp32")) == 2
    assert capsys.readouterr().err.startswith("error: the ")


def test_folder_and_fresh(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path / "here"), *sets("epochs=1")]
    assert cli.main(arguments) == 0 and (tmp_path / "here" / "final.json").is_file()
    first = (tmp_path / "here" / "final.json").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(arguments) == 0 and "loaded the finished run" in capsys.readouterr().out
    assert (tmp_path / "here" / "final.json").stat().st_mtime_ns == first
    assert cli.main([*arguments, "--fresh"]) == 0 and (tmp_path / "here" / "final.json").stat().st_mtime_ns > first
    assert cli.main([*arguments, "--set", "eps=0.3"]) == 2 and "another config" in capsys.readouterr().err


def test_parse_sets():
    assert cli.parse_sets(["eps=8/255", " seed = 3", "data_dir=/a=b"]) == {
        "eps": "8/255",
        "seed": "3",
        "data_dir": "/a=b",
    }
    with pytest.raises(DerkitError):
        cli.parse_sets(["eps"])


def test_unknown_option_shows_usage(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--epochs", "3"])
    assert error.value.code == 2 and "usage" in capsys.readouterr().err
