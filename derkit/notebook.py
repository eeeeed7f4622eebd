"""What every notebook needs: its parameters, checked; a line on the machine; PASS lines; tables."""

import ast
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from html import escape
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from pydantic import TypeAdapter, ValidationError

from derkit.config import TrainConfig
from derkit.plots import use_style
from derkit.util import AUTO, DerkitError, choose_device, choose_precision, unknown, watched

KINDS = {"int": (int, "a whole number"), "float": (float, "a number"), "str": (str, "text"),
         "bool": (bool, "True or False")}  # fmt: skip
HEADERS = dict(fgsm="FGSM", pgd="PGD", pgd50="PGD-50-10", aa="AutoAttack", dE="dE(x)")


def add_repository() -> None:
    """Let a notebook import ``experiments``, which stands in the repository, not installed."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))


def guard(cells: list[str], namespace: dict[str, Any]) -> dict[str, Any]:
    """The notebook's parameters, from the sources run so far (IPython's ``In``): the first cell of
    annotated literals only, and cells that papermill injected, which start with '# Parameters'.
    Raises DerkitError for unknown names and wrong types."""
    allowed: dict[str, str] = {}
    injected: list[str] = []
    for source in cells:
        with suppress(SyntaxError):  # of a cell that did not run
            nodes = ast.parse(source).body
            if source.lstrip().startswith("# Parameters"):
                injected += [n.targets[0].id for n in nodes if isinstance(n, ast.Assign)]
            elif not allowed and all(isinstance(n, ast.AnnAssign) for n in nodes):
                allowed = {n.target.id: n.annotation.id for n in nodes}
    for name in injected:
        if name not in allowed:
            raise unknown("parameter", name, allowed)
    values = {}
    for name, annotation in allowed.items():
        kind, words = KINDS[annotation]
        try:  # 'str' takes numbers, too (eps 0.03)
            values[name] = TypeAdapter(kind).validate_python(str(namespace[name]))
        except ValidationError:
            found = repr(namespace[name])
            raise DerkitError(f"parameter {name} must be {words}, found {found}.") from None
    return values


def parameters(namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """`guard` on the running notebook, in the cell after its parameters. nbval keeps no history of
    cells and injects none: there the plain values are the parameters."""
    from IPython import get_ipython

    names = namespace or get_ipython().user_ns
    plain = {n: v for n, v in names.items() if isinstance(v, str | int | float) and n[0] != "_"}
    values = guard(names.get("In", []), names) or plain
    if not values:
        raise DerkitError("no parameters found: run the cell with the parameters first.")
    return values


def configure(values: dict[str, Any], preset: str | None = None, other: str | None = None,
              **overrides: Any) -> TrainConfig:
    """The config that the parameters stand for: a preset, then every one that is not 'auto' and
    that the config has. On the bundled data ``preset`` and ``overrides`` apply, on other data its
    own preset (or ``other``)."""
    fields = TrainConfig.model_fields
    given = {k: v for k, v in values.items() if k in fields and v not in (AUTO, "")}
    if given.get("dataset", "fashion_mini") != "fashion_mini":
        preset, overrides = other, {}
    config = TrainConfig.make(preset, **(overrides | given))
    large = config.model in ("preact_resnet18", "wide_resnet")
    if large and choose_device(config.device).type == "cpu":
        print("a large model on a CPU: evaluation is cut to a few images (a GPU has them all)")
        config = config.change(eval_size=64, probe_size=32, final_size=100, strong_size=32,
                               pgd50_size=0, autoattack_size=0)  # fmt: skip
    if config.autoattack_size and find_spec("pyautoattack") is None:
        print('AutoAttack is left out: it needs pip install "derkit[eval]"')
        config = config.change(autoattack_size=0)
    return config


def start(config: TrainConfig) -> torch.device:
    """Set the plot style, print where and how precisely the notebook runs, return the device."""
    use_style()
    torch.set_printoptions(sci_mode=False, precision=4)
    device = choose_device(config.device)
    precision, why = choose_precision(config.precision, config.regularizer, device)
    print(f"device {device.type}, precision {precision} ({why})")
    return device


def bundled(config: TrainConfig) -> bool:
    """Is this the default data? Some checks speak of it alone."""
    return config.dataset == "fashion_mini"


def check(name: str, passed: Any) -> None:
    """Print 'PASS name' or 'FAIL name'. These lines are what nbval compares."""
    print("PASS " if passed else "FAIL ", name)


def slider(draw: Callable[[Any], None], name: str, values: Sequence[Any], shown: int = 0) -> None:
    """One picture for each value, drawn beforehand, behind a slider; ``draw(value)`` leaves a
    pyplot figure open. Where nobody can move it (papermill and nbval let no cell ask for input),
    or without ipywidgets, there is the picture of ``values[shown]`` alone."""
    from IPython import display

    if not (watched() and find_spec("ipywidgets")):
        draw(values[shown])
        plt.show()
        return plt.close()
    import ipywidgets

    frames = []
    for value in values:
        draw(value)
        plt.savefig(file := BytesIO(), format="png")
        plt.close()
        frames.append((f"{value:g}", file.getvalue()))
    control = ipywidgets.SelectionSlider(description=name, options=frames, index=shown)
    image = ipywidgets.Image(value=control.value, format="png")
    ipywidgets.dlink((control, "value"), (image, "value"))
    display.display(ipywidgets.VBox([control, image]))


def say(text: str) -> None:
    """Text with numbers of live training, as HTML: nbval would compare their last digits."""
    from IPython.display import HTML, display

    display(HTML(f'<pre style="font-family: monospace">{escape(text)}</pre>'))


def show(table: pd.DataFrame, digits: int = 3, title: str = "", live: bool = False) -> None:
    """A table with fixed digits, in the style of the page. ``live``: of live results, see `say`."""
    from IPython.display import display

    table = table.rename(columns=HEADERS)
    options = dict(index=False, float_format=f"{{:.{digits}f}}".format, na_rep="-")
    head = f"<p><b>{escape(title)}</b></p>" * bool(title)
    bundle = {"text/html": head + table.to_html(border=0, **options)}
    display(bundle if live else bundle | {"text/plain": table.to_string(**options)}, raw=True)


show_live = partial(show, live=True)
