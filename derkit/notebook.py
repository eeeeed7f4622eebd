"""What every notebook needs: the guard on its parameters, one line on the environment, PASS/FAIL checks, plain tables."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch

from derkit.config import AUTO, TrainConfig, check_names
from derkit.device import choose_device, choose_precision
from derkit.errors import DerkitError, nearest
from derkit.plots import use_style


def _assigned(source: str) -> dict[str, str | None]:
    """name -> annotation of the assignments of a cell."""
    names: dict[str, str | None] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign):
            names |= {t.id: None for t in node.targets if isinstance(t, ast.Name)}
    return names


def guard(cells: Iterable[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """The notebook's parameters as a dict, after rejecting unknown names and wrong types.

    ``cells`` are the sources run so far (IPython's ``In``). The parameters cell is the first one that holds annotated
    literals only; a cell that papermill injected starts with '# Parameters'. Raises DerkitError with the nearest name.
    """
    allowed: dict[str, str | None] = {}
    injected: dict[str, str | None] = {}
    for source in cells:
        try:
            names = _assigned(source)
        except SyntaxError:  # magics
            continue
        if source.lstrip().startswith("# Parameters"):
            injected |= names
        elif not allowed and len(names) > 2 and all(names.values()):
            allowed = names
    for name in injected:
        if name not in allowed:
            raise DerkitError(f"unknown parameter {name!r}.{nearest(name, allowed)} This notebook has: {', '.join(allowed)}.")
    values = {}
    for name, annotation in allowed.items():
        values[name] = _typed(name, namespace[name], annotation)
    return values


def _typed(name: str, value: Any, annotation: str | None) -> Any:
    """A parameter's value, checked against its annotation ('str' also takes numbers: eps may be 8/255, 0.03 or auto)."""
    if annotation == "int" and (isinstance(value, bool) or not isinstance(value, int)):
        if isinstance(value, float) and value == int(value):
            return int(value)
        raise DerkitError(f"parameter {name} must be a whole number, found {value!r}.")
    if annotation == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise DerkitError(f"parameter {name} must be a number, found {value!r}.")
    if annotation == "bool" and not isinstance(value, bool):
        text = str(value).lower()
        if text not in ("true", "false"):
            raise DerkitError(f"parameter {name} must be True or False, found {value!r}.")
        return text == "true"
    return str(value) if annotation == "str" else value


def parameters(namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """`guard` on the running notebook. nbval keeps no history of cells (and injects none): there the annotations of the
    parameters cell, which Python keeps in the namespace, say what the parameters are."""
    from IPython import get_ipython

    names = get_ipython().user_ns if namespace is None else namespace
    values = guard(names.get("In", []), names)
    if not values:
        kinds = {n: getattr(t, "__name__", str(t)) for n, t in names.get("__annotations__", {}).items() if n in names}
        values = {n: _typed(n, names[n], kind) for n, kind in kinds.items()}
    if not values:
        raise DerkitError("no parameters found: run the cell with the parameters (name: type = value) first.")
    return values


CPU_EVALUATION = dict(eval_size=64, probe_size=32, final_size=100, strong_size=32,  # where a PGD step takes seconds
                      pgd50_size=0, autoattack_size=0)


def configure(values: dict[str, Any], preset: str | None = None, other: str | None = None, **overrides: Any) -> TrainConfig:
    """The config that the parameters stand for: the data set's preset, then every parameter that is not 'auto'.

    On the bundled data ``preset`` (the notebook's own recipe) and ``overrides`` apply; on other data the preset of that
    data set (or ``other``) does, so ``-p dataset cifar10`` alone selects the paper-scale one. Parameters that the config
    does not have are left to the notebook.
    """
    known = set(TrainConfig.__dataclass_fields__)
    given = {k: v for k, v in values.items() if k in known and v != AUTO and not (k == "data_dir" and not v)}
    check_names(overrides)
    bundled = given.get("dataset", "fashion_mini") == "fashion_mini"
    config = TrainConfig.make(preset if bundled else other, **((overrides if bundled else {}) | given))
    if config.model != "small_cnn" and choose_device(config.device).type == "cpu":
        print("a large model on a CPU: evaluation is cut to a few images (in Colab: Runtime > Change runtime type > GPU)")
        config = config.change(**CPU_EVALUATION)
    if config.autoattack_size and find_spec("pyautoattack") is None:
        print('AutoAttack is left out: it needs pip install "derkit[eval]"')
        config = config.change(autoattack_size=0)
    return config


def start(config: TrainConfig) -> torch.device:
    """Plot style, a quiet torch, and one line on where and how precisely the notebook runs. Returns the device."""
    use_style()
    torch.set_printoptions(sci_mode=False, precision=4)
    device = choose_device(config.device)
    precision, why = choose_precision(config, device)
    print(f"device {device.type}, precision {precision} ({why})")
    return device


def check(name: str, passed: Any) -> None:
    """Print 'PASS name' or 'FAIL name'. These lines are what nbval compares."""
    print(f"{'PASS' if bool(passed) else 'FAIL'}  {name}")


def show(table: pd.DataFrame, digits: int = 3, index: bool = False) -> None:
    """A table as text, with fixed digits."""
    with pd.option_context("display.width", 160, "display.max_columns", 30):
        print(table.to_string(index=index, float_format=lambda v: f"{v:.{digits}f}", na_rep="-"))


def say(text: str) -> None:
    """Text that holds numbers of a live training run. Shown as HTML, which nbval leaves uncompared: hundreds of adversarial
    steps amplify the last bit, which differs with the thread count and the instruction set, even in float64."""
    from html import escape

    from IPython.display import HTML, display

    display(HTML(f'<pre style="font-family: monospace">{escape(text)}</pre>'))  # else exported pages use a proportional font


def show_live(table: pd.DataFrame, digits: int = 3, title: str = "") -> None:
    """`show` for a table of live results: see `say`."""
    text = table.to_string(index=False, float_format=lambda v: f"{v:.{digits}f}", na_rep="-")
    say(f"{title}\n{text}" if title else text)


def bundled(config: TrainConfig) -> bool:
    """Is this the default data (for sentences and checks that speak of it alone)?"""
    return config.dataset == "fashion_mini"


def is_quiet() -> bool:
    """True under nbval and in logs, where bars and times would only differ from run to run."""
    return bool(os.environ.get("TQDM_DISABLE"))
