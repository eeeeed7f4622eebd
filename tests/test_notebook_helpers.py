"""The notebooks' guard, configuration and output helpers."""

import sys
from unittest.mock import MagicMock

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from derkit import notebook, util
from derkit.util import DerkitError

CELL = """dataset: str = "fashion_mini"  # data
eps: str = "auto"\nseed: int = 0\nwarmup: float = 0.3\nfast: bool = True"""
BASE = dict(dataset="fashion_mini", eps="auto", seed=0, warmup=0.3, fast=True)


def guarded(**given):
    injected = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in given.items())
    return notebook.guard(["", "x = 1", "%magic", CELL, injected], BASE | given)


def test_guard_takes_what_papermill_gives():
    assert guarded() == BASE
    given = guarded(eps=0.03, seed=3.0, fast="false")
    assert given == BASE | dict(eps="0.03", seed=3, fast=False) and isinstance(given["seed"], int)


@pytest.mark.parametrize("given, words", [
    (dict(sede=3), "'seed'"), (dict(seed=1.5), "seed must be a whole number, found 1.5"),
    (dict(seed=True), "whole"), (dict(warmup="a"), "a number"), (dict(fast="maybe"), "True or")])
def test_guard_rejects(given, words):
    with pytest.raises(DerkitError, match=words):
        guarded(**given)


def test_parameters_with_and_without_history():
    for history in (["", CELL], [""]):  # nbval has none
        assert notebook.parameters(BASE | {"In": history, "_": 3, "os": sys}) == BASE
    with pytest.raises(DerkitError, match="no parameters found"):
        notebook.parameters({"In": [""]})


def test_configure():
    def make(other=None, **given):
        return notebook.configure(BASE | given, "fashion_ro", other, eps=0.05)

    assert (make().method, make().eps, make(eps="0.07").eps) == ("pgd", 0.05, 0.07)
    paper = make(dataset="cifar10")
    assert (paper.model, paper.epochs, paper.augment) == ("preact_resnet18", 30, "crop_flip")
    assert paper.eps == pytest.approx(8 / 255) and make("rice2020", dataset="cifar10").epochs == 200
    with pytest.raises(DerkitError, match="eps must be a number"):
        make(eps="__import__('os').system('true')")  # text stays text


def test_output(capsys, monkeypatch):
    notebook.check("it holds", 1 < 2)
    notebook.check("it does not", False)
    assert capsys.readouterr().out == "PASS  it holds\nFAIL  it does not\n"
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    table = pd.DataFrame({"a": [0.12345], "b": ["<" * 200], "c": [float("nan")]})
    notebook.show(table)
    notebook.show_live(table, title="a & b")
    assert shown[0]["text/plain"].endswith("\n0.123 " + "<" * 200 + "  -")
    assert "<td>0.123</td>" in shown[0]["text/html"] and "&lt;" * 200 in shown[0]["text/html"]
    assert shown[1].keys() == {"text/html"} and "<b>a &amp; b</b>" in shown[1]["text/html"]


@pytest.mark.parametrize("asked", [False, True])
def test_sliders_and_bars_where_a_person_looks_on(asked, monkeypatch):
    drawn, shown, items = [], [], [1, 2]
    shell = MagicMock(get_parent=lambda: {"content": {"allow_stdin": asked}})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    with monkeypatch.context() as patch:
        patch.delenv("TQDM_DISABLE")
        assert (util.progress(items) is items) is not asked
    monkeypatch.setattr("IPython.display.display", shown.append)

    def draw(value):
        drawn.append(value)
        plt.plot([0, value])

    notebook.slider(draw, "eps", [0.1, 0.25], shown=1)
    assert not plt.get_fignums() and drawn == ([0.1, 0.25] if asked else [0.25])
    assert len(shown) == asked
    if asked:
        control, image = shown[0].children
        before = image.value
        assert [name for name, _ in control.options] == ["0.1", "0.25"] and control.label == "0.25"
        control.index = 0
        assert image.value == control.value != before, "the picture follows the slider"
