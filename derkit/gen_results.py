"""Committed generation records (figures/records/generation_*): loaded, and averaged over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from derkit.errors import DerkitError, nearest
from derkit.results import records_folder

X0 = ": x0 only"
COLUMNS = ["CFD", "CKD", "precision", "recall", "agreement", "pairwise L2", "nearest-train L2", "near copies", "steps", "s / 1000"]


def load_generation(part: str, name: str = "generation_fashion_mini", root: Path | None = None) -> dict[str, Any]:
    """One record of scripts/generation_ablation.py ('recipe', 'grid', ...). Raises DerkitError where there is none."""
    folder = (root or records_folder()) / name
    path = folder / f"{part}.json"
    if not path.is_file():
        parts = sorted(p.stem for p in folder.glob("*.json"))
        raise DerkitError(f"no record {part!r} in {folder}.{nearest(part, parts)} There are: {', '.join(parts) or 'none'}.")
    return json.loads(path.read_text(encoding="utf-8"))


def generation_summary(record: dict[str, Any]) -> pd.DataFrame:
    """Mean over seeds by (model, images), with 'CFD min', 'CFD max' and the number of seeds. Floor, ceiling and the
    x0-only rows are rows like the others."""
    rows = pd.DataFrame(record["rows"])
    groups = rows.groupby(["model", "images"], sort=False)
    out = groups[COLUMNS].mean()
    out.insert(0, "seeds", groups["seed"].nunique())
    out.insert(2, "CFD min", groups["CFD"].min())
    out.insert(3, "CFD max", groups["CFD"].max())
    return out


def init_by_stop(record: dict[str, Any], model: str, column: str = "CFD") -> pd.DataFrame:
    """The grid as a table: a row per init, its starts alone first, then a column per stop rule; mean over seeds."""
    values = generation_summary(record).loc[model][column]
    rows: dict[str, dict[str, float]] = {}
    for key in record["settings"]:
        start, stop = (word.strip() for word in key.split("|"))
        rows.setdefault(start, {"x0 only": values[key + X0]})[stop] = values[key]
    return pd.DataFrame.from_dict(rows, orient="index")


def per_class(record: dict[str, Any], model: str, column: str = "CKD") -> pd.DataFrame:
    """Mean over seeds of a per-class metric: rows (images, class), as `gen_plots.class_bars` takes it."""
    rows = pd.DataFrame(record["per_class"])
    return rows[rows["model"] == model].groupby(["images", "class"], sort=False)[[column]].mean()
