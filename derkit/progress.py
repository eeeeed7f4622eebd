"""One progress bar for the kit: a widget in notebooks that have one, a text bar on a terminal, silent in logs and nbval."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


def progress(items: Iterable, desc: str = "", **options) -> Iterable:
    """``items`` behind a bar; plain ``items`` where a bar would only clutter a log (or TQDM_DISABLE is set)."""
    other = os.environ.get("RANK", "0") != "0"  # under torchrun only the first process shows bars
    if other or os.environ.get("TQDM_DISABLE") or os.environ.get("PYTEST_CURRENT_TEST"):
        return items
    if "ipykernel" in sys.modules:
        try:  # the widget bar warns on stderr without ipywidgets
            import ipywidgets  # noqa: F401

            if not os.environ.get("DERKIT_WIDGETS"):
                return items
            from tqdm.notebook import tqdm
        except ImportError:
            return items
        return tqdm(items, desc=desc, leave=False, **options)
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=desc, leave=False, **options)
