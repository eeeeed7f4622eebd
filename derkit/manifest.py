"""Manifests of suites: which runs, in which order, and which claims their records are to be judged by. Plain JSON.

A manifest: name, about, preset, set (fields common to all), seeds, runs and claims. A run: label, group, preset, set, seeds,
grid, weight_from, expect, note.
  grid         {"eps": ["8/255", "16/255"], ...}: one run per combination; the label names the fields in braces.
  weight_from  a label pattern ("* der {variant} lambda *"): lambda is that of the matching run of the same suite with the highest
               PGD accuracy on validation images, known once all of them have been run.
  expect       published values of this run: {metric, epoch, value, source, tolerance or relation, note}; a run with a grid
               names its label in "run".
A claim: text, run (a label or a pattern), metric, epoch, relation, value or than (labels; "suite: label" for another suite),
tolerance, source, note. Runs come one seed of everything first, then the second seeds; inside a seed in the manifest's order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from derkit.claims import Claim, known_keys, matching, read_claims
from derkit.config import AUTO, TrainConfig, check_names
from derkit.data_sources import home
from derkit.errors import DerkitError
from derkit.records import Run, runs_folder
from derkit.results import records_folder

MANIFEST_KEYS = ("name", "about", "preset", "set", "seeds", "runs", "claims")
RUN_KEYS = ("label", "group", "preset", "set", "seeds", "grid", "weight_from", "expect", "note")
DIVERGED = "diverged.json"  # in the records of a run whose loss stopped being finite


@dataclass(frozen=True)
class Job:
    """One run of a suite. ``sweep``: slugs of the runs that its lambda is chosen from, empty when it is known."""

    suite: str
    label: str
    order: int
    config: TrainConfig
    group: str = ""
    sweep: tuple[str, ...] = ()
    changed: bool = False  # overridden on the command line: not a record of the manifest

    @property
    def slug(self) -> str:
        return f"{_slug(self.label)}-s{self.config.seed}"

    @property
    def folder(self) -> Path:
        return runs_folder() / self.suite / self.slug

    @property
    def records(self) -> Path:
        return (home() / "records" if self.changed else records_folder()) / self.suite / self.slug

    def is_of(self, train: dict[str, Any]) -> bool:
        """Are these a record's settings the job's ('auto' precision: whichever it was resolved to)?"""
        found = TrainConfig(**train)
        mine = self.config.change(precision=found.precision) if self.config.precision == AUTO else self.config
        return found.hash() == mine.hash()


@dataclass(frozen=True)
class Manifest:
    """A suite as it stands in its file."""

    name: str
    about: str
    jobs: list[Job]
    claims: list[Claim] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Labels of the runs, in the file's order."""
        return list(dict.fromkeys(j.label for j in sorted(self.jobs, key=lambda j: j.order)))


def read_manifest(path: str | os.PathLike, overrides: dict[str, Any] | None = None) -> list[Job]:
    """The jobs of `load_manifest`."""
    return load_manifest(path, overrides).jobs


def load_manifest(path: str | os.PathLike, overrides: dict[str, Any] | None = None) -> Manifest:
    """Read and check a manifest. ``overrides`` go into every run; where they change results, the suite gets another name
    and its records stay out of figures/. Raises DerkitError for a bad file, key, label, metric or field."""
    overrides = overrides or {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        known_keys("manifest", content, MANIFEST_KEYS)
        if not isinstance(content["name"], str) or not re.fullmatch(r"\w[\w.-]*", content["name"]):  # a folder's name
            raise DerkitError(f"{path}: name must be letters, digits, _, - and ., found {content['name']!r}.")
        runs = [expanded for run in content["runs"] for expanded in _expand(run)]
        labels = [run["label"] for run in runs]
        if len({_slug(label) for label in labels}) != len(labels):
            raise DerkitError(f"{path}: two runs have the same label and seed.")
        rows = [(i, run, seed, place) for i, run in enumerate(runs)
                for place, seed in enumerate(run.get("seeds", content.get("seeds", [0])))]
        jobs = [_job(content, run, i, seed, overrides) for i, run, seed, _ in sorted(rows, key=lambda row: (row[3], row[0]))]
        jobs = [_with_sweep(job, runs[job.order], jobs) for job in jobs]
        plain = {run["label"]: _job(content, run, 0, 0, {}).config for run in runs}  # published values are of these settings
        claims = read_claims(content.get("claims", []), runs, plain)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DerkitError(f"{path} is not a suite manifest: {error!r}.") from error
    if any(job.changed for job in jobs):
        claims = []
    return Manifest(content["name"], content.get("about", ""), [resolve(job, jobs) for job in jobs], claims)


# ---------------------------------------------------------------------------------------------------------- runs
def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def _expand(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One run per combination of the grid's values, which go into 'set' and, in braces, into label and weight_from."""
    known_keys("run", run, RUN_KEYS)
    grid = run.get("grid", {})
    check_names(grid)
    out = []
    for values in itertools.product(*grid.values()):
        names = dict(zip(grid, values, strict=True))
        try:
            texts = {k: run[k].format(**names) for k in ("label", "weight_from") if k in run}
        except (KeyError, IndexError, ValueError) as error:
            raise DerkitError(f"label {run['label']!r} names {error}, which is not in its grid ({', '.join(grid) or 'none'}).") from None
        out.append(run | texts | dict(set=run.get("set", {}) | names, template=run["label"]))
    return out


def _job(content: dict[str, Any], run: dict[str, Any], order: int, seed: int, overrides: dict[str, Any]) -> Job:
    values = content.get("set", {}) | run.get("set", {}) | {"seed": seed}
    preset = run.get("preset", content.get("preset"))
    plain = TrainConfig.make(preset, **values)
    config = TrainConfig.make(preset, **(values | overrides))
    changed = config.hash() != plain.hash()
    return Job(content["name"] + ("-changed" if changed else ""), run["label"], order, config, run.get("group", ""), changed=changed)


def _with_sweep(job: Job, run: dict[str, Any], jobs: list[Job]) -> Job:
    if "weight_from" not in run:
        return job
    labels = [j.label for j in jobs if j.label != job.label]
    sweep = set(matching(run["weight_from"], labels))
    first: dict[str, str] = {}
    for j in jobs:
        if j.label in sweep:
            first.setdefault(j.label, j.slug)
    return replace(job, sweep=tuple(first.values()))


def resolve(job: Job, jobs: Iterable[Job]) -> Job:
    """The job with the lambda that its sweep chose on validation images; unchanged while a run of the sweep is missing.

    Chosen: highest PGD accuracy on validation images, mean of the last three epochs (the first such run in a tie). A run
    that diverged is out.
    """
    if not job.sweep:
        return job
    best, weight = -1.0, None
    for other in (j for j in jobs if j.slug in job.sweep):
        if diverged(other, other.records):
            continue
        if not (other.records / "final.json").is_file():
            return job
        run = Run(other.records)
        if not other.is_of(run.config["train"]):
            return job
        value = float(run.epochs["valid_pgd"].tail(3).mean())
        if value > best:
            best, weight = value, other.config.weight
    return job if weight is None else replace(job, config=job.config.change(weight=weight), sweep=())


def diverged(job: Job, folder: Path) -> bool:
    """Does the records folder say that the loss of this very job stopped being finite?"""
    file = folder / DIVERGED
    return file.is_file() and job.is_of(json.loads(file.read_text(encoding="utf-8"))["train"])
