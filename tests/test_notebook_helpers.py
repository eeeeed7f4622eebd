"""The notebooks' guard, configuration and output helpers."""

import pandas as pd
import pytest

from derkit import notebook
from derkit.errors import DerkitError

CELL = """dataset: str = "fashion_mini"  # data
eps: str = "auto"  # radius
seed: int = 0  # seed
warmup: float = 0.3  # share
fast: bool = True  # quick"""
BASE = dict(dataset="fashion_mini", eps="auto", seed=0, warmup=0.3, fast=True)


def test_guard_reads_the_parameters_cell():
    assert notebook.guard(["", "import os\nx = 1", "%matplotlib inline", CELL], BASE) == BASE


@pytest.mark.parametrize("injected, value, word", [
    ("# Parameters\nsede = 3", {}, "'seed'"),
    ("# Parameters\ndatasets = 'cifar10'", {}, "'dataset'"),
    ("# Parameters\nseed = 'x'", {"seed": "x"}, "whole number"),
    ("# Parameters\nseed = 1.5", {"seed": 1.5}, "whole number"),
    ("# Parameters\nwarmup = 'a'", {"warmup": "a"}, "number"),
    ("# Parameters\nfast = 'maybe'", {"fast": "maybe"}, "True or False"),
])
def test_guard_rejects(injected, value, word):
    with pytest.raises(DerkitError, match=word):
        notebook.guard([CELL, injected], BASE | value)


def test_parameters_with_and_without_history():
    """nbval runs cells without history: the namespace's annotations stand in for the cell's source."""
    namespace: dict = {}
    exec(CELL, namespace)
    assert notebook.parameters(namespace | {"In": ["", CELL]}) == BASE
    assert notebook.parameters(namespace | {"In": [""]}) == BASE
    with pytest.raises(DerkitError, match="no parameters found"):
        notebook.parameters({"In": [""]})


def test_guard_takes_what_papermill_gives():
    values = notebook.guard([CELL, "# Parameters\neps = '8/255'\nseed = 3.0\nfast = 'false'"],
                            BASE | dict(eps="8/255", seed=3.0, fast="false"))
    assert values["eps"] == "8/255" and values["seed"] == 3 and values["fast"] is False
    assert notebook.guard([CELL, "# Parameters\neps = 0.03"], BASE | dict(eps=0.03))["eps"] == "0.03"


def test_code_in_a_parameter_stays_text():
    text = "__import__('os').system('true')"
    with pytest.raises(DerkitError, match="eps must be a number"):
        notebook.configure(BASE | dict(eps=text))


def test_configure_bundled_and_paper_scale():
    assert notebook.configure(BASE, preset="fashion_ro").method == "pgd"
    assert notebook.configure(BASE, preset="fashion_ro", eps=0.05).eps == 0.05
    assert notebook.configure(BASE | dict(eps="0.07"), preset="fashion_ro", eps=0.05).eps == 0.07
    paper = notebook.configure(BASE | dict(dataset="cifar10"), preset="fashion_ro", eps=0.05)
    assert (paper.model, paper.epochs, paper.augment) == ("preact_resnet18", 30, "crop_flip")
    assert paper.eps == pytest.approx(8 / 255)
    assert notebook.configure(BASE | dict(dataset="cifar10"), other="rice2020").epochs == 200


def test_check_and_show(capsys):
    notebook.check("it holds", 1 < 2)
    notebook.check("it does not", False)
    notebook.show(pd.DataFrame({"a": [0.12345], "b": ["x"], "c": [float("nan")]}))
    out = capsys.readouterr().out
    assert "PASS  it holds" in out and "FAIL  it does not" in out and "0.123" in out and " -" in out
