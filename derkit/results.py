"""Results over runs: committed records by name, and tables with seeds and spread.

    python -m derkit.results FOLDER --csv table.csv       # runs named <point of a grid>-s<seed>
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from derkit.diagnosis import co_onset
from derkit.errors import DerkitError, nearest
from derkit.records import Run, atomic_write, disk_errors, load_runs

METRICS = ("clean", "fgsm", "pgd", "pgd50", "strong", "aa", "dE", "aae")


def records_folder() -> Path:
    """figures/records of the repository that this package stands in."""
    return Path(__file__).resolve().parents[1] / "figures" / "records"


def label(train: dict[str, Any]) -> str:
    """'rs_fgsm + der' for a run's training config."""
    return train["method"] if train["regularizer"] == "none" else f"{train['method']} + {train['regularizer']}"


def load_records(name: str, root: Path | None = None) -> dict[str, list[Run]]:
    """Committed runs of one suite, grouped by label (the manifest's, else method + regulariser), in the manifest's order.

    Raises DerkitError where there is no such folder, with the nearest name.
    """
    root = root or records_folder()
    if not (root / name).is_dir():
        names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise DerkitError(f"no records {name!r} in {root}.{nearest(name, names)} There are: {', '.join(names) or 'none'}.")
    groups: dict[str, list[Run]] = {}
    runs = [r for r in load_runs(root / name) if r.finished]
    for run in sorted(runs, key=lambda r: (r.config.get("order", 0), r.config["train"]["seed"])):
        groups.setdefault(run.config.get("label") or label(run.config["train"]), []).append(run)
    return groups


def by_eps(groups: Mapping[str, Sequence[Run]], metric: str, which: str = "last") -> pd.DataFrame:
    """Groups labelled '<method> eps <radius>' as a table: method, eps (of 255), mean, min and max over seeds of a test metric.

    Groups with another label, and runs that were not evaluated by the metric, are left out.
    """
    rows = []
    for name, runs in groups.items():
        method, eps, radius = name.rpartition(" eps ")
        values = [r.final[which][metric] for r in runs if r.final[which].get(metric) is not None]
        if eps and values and "lambda" not in radius:
            rows.append(dict(method=method, eps=runs[0].config["train"]["eps"] * 255, mean=np.mean(values), min=np.min(values),
                             max=np.max(values), runs=len(values)))
    table = pd.DataFrame(rows, columns=["method", "eps", "mean", "min", "max", "runs"])
    return table.sort_values(["method", "eps"], kind="stable", ignore_index=True)


def load_costs(name: str, root: Path | None = None) -> pd.Series:
    """Cost of a training step by label, relative to the suite's first run (scripts/measure_cost.py)."""
    return pd.Series(json.loads(((root or records_folder()) / name / "cost.json").read_text())["ratio"], name="cost")


def summary(groups: Mapping[str, Sequence[Run]], which: str = "last") -> pd.DataFrame:
    """One row per group: number of runs, how many collapsed, mean of the test metrics ('last' or 'best' epoch) with
    '<metric> min' and '<metric> max' over seeds."""
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in groups.items():
        row: dict[str, Any] = dict(runs=len(runs), collapsed=sum(co_onset(r) is not None for r in runs))
        for metric in METRICS:
            values = [r.final[which].get(metric, np.nan) for r in runs]
            row |= {metric: np.mean(values), f"{metric} min": np.min(values), f"{metric} max": np.max(values)}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def grid(folder: Path, names: Sequence[str] = ()) -> dict[str, list[Run]]:
    """Finished runs of a folder whose names end in -s<seed>, grouped by what stands before it; ``names``: these runs only.

    Raises DerkitError where a named run is not there or not finished, and where there is none at all.
    """
    found = {run.name: run for run in load_runs(folder) if run.finished}
    for name in names:
        if name not in found:
            raise DerkitError(f"no finished run {name!r} in {folder}.{nearest(name, found)}")
    groups: dict[str, list[Run]] = {}
    for name in names or found:
        groups.setdefault(re.sub(r"-s\d+$", "", name), []).append(found[name])
    if not groups:
        raise DerkitError(f"no finished runs in {folder}.")
    return groups


def main(argv: list[str] | None = None) -> int:
    """Print the table of a folder of runs, or write it as CSV. Returns the exit status (2: bad input)."""
    parser = argparse.ArgumentParser("python -m derkit.results", description="One row per point of a grid, over its seeds.")
    parser.add_argument("folder", type=Path, help="holds run folders named <point>-s<seed>")
    parser.add_argument("--runs", nargs="*", default=[], help="these runs only; default: all finished ones")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="epoch: the last, or the best on validation")
    parser.add_argument("--csv", type=Path, help="write the table there")
    options = parser.parse_args(argv)
    try:
        table = summary(grid(options.folder, options.runs), options.which)
        if options.csv:
            with disk_errors(options.csv):
                atomic_write(options.csv, table.to_csv(index_label="run"))
        else:
            print(table.round(3).to_string())
    except DerkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
