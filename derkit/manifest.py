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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from derkit.config import AUTO, TrainConfig, check_names
from derkit.data_sources import home
from derkit.errors import DerkitError, nearest, unknown
from derkit.records import Run, runs_folder
from derkit.results import METRICS, records_folder

MANIFEST_KEYS = ("name", "about", "preset", "set", "seeds", "runs", "claims")
RUN_KEYS = ("label", "group", "preset", "set", "seeds", "grid", "weight_from", "expect", "note")
CLAIM_KEYS = ("text", "run", "metric", "epoch", "relation", "value", "than", "tolerance", "source", "note")
RELATIONS = ("about", ">", ">=", "<", "<=")
CLAIM_METRICS = (*METRICS, "collapsed", "gap")  # share of seeds that collapsed; PGD accuracy, best minus last epoch
DIVERGED = "diverged.json"  # in the records of a run whose loss stopped being finite
PUBLISHED_FOR = ("cifar10", "cifar100", "svhn")  # data that published values are of; bundled data has none


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
class Claim:
    """What the mean over seeds of a test metric of one run is expected to be: near a value, or beyond a value or other runs."""

    text: str
    run: str
    metric: str
    epoch: str = "last"
    relation: str = "about"
    value: float | None = None
    than: tuple[str, ...] = ()
    tolerance: float = 0.0
    source: str = ""
    note: str = ""
    published: bool = False  # ``value`` was published by ``source``


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
        _known("manifest", content, MANIFEST_KEYS)
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
        claims = [_claim(c | {"run": _owner(c, run)}, labels, plain[_owner(c, run)]) for run in _owners(runs) for c in run["expect"]]
        claims += [_claim(c | {"run": name}, labels) for c in content.get("claims", []) for name in _matching(c["run"], labels)]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DerkitError(f"{path} is not a suite manifest: {error!r}.") from error
    if any(job.changed for job in jobs):
        claims = []
    return Manifest(content["name"], content.get("about", ""), [resolve(job, jobs) for job in jobs], claims)


# ---------------------------------------------------------------------------------------------------------- runs
def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def _known(kind: str, found: dict[str, Any], allowed: Iterable[str]) -> None:
    for key in found:
        if key not in allowed:
            raise unknown(f"key of a {kind}", key, allowed)


def _expand(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One run per combination of the grid's values, which go into 'set' and, in braces, into label and weight_from."""
    _known("run", run, RUN_KEYS)
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
    matching = set(_matching(run["weight_from"], labels))
    first: dict[str, str] = {}
    for j in jobs:
        if j.label in matching:
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


# -------------------------------------------------------------------------------------------------------- claims
def _matching(pattern: str, labels: Iterable[str]) -> list[str]:
    found = [label for label in labels if label == pattern] or [label for label in labels if fnmatchcase(label, pattern)]
    if not found:
        raise DerkitError(f"no run is labelled {pattern!r}.{nearest(pattern, labels)} Labels: {', '.join(dict.fromkeys(labels))}.")
    return list(dict.fromkeys(found))


def _owners(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that carry expectations; those of a grid stand once, for the first of its combinations."""
    seen: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.get("expect"):
            owner = seen.setdefault(run["template"], run | dict(members=[]))
            owner["members"].append(run["label"])
    return list(seen.values())


def _owner(claim: dict[str, Any], run: dict[str, Any]) -> str:
    if "run" not in claim and len(run["members"]) > 1:
        raise DerkitError(f"an expectation of the grid {run['template']!r} needs 'run', one of: {', '.join(run['members'])}.")
    return _matching(claim.get("run", run["members"][0]), run["members"])[0]


def _claim(found: dict[str, Any], labels: list[str], config: TrainConfig | None = None) -> Claim:
    """A checked claim; with a config, a published value of that run."""
    _known("claim", found, CLAIM_KEYS)
    metric, epoch = found["metric"], found.get("epoch", "last")
    if metric not in CLAIM_METRICS:
        raise unknown("metric", metric, CLAIM_METRICS)
    if epoch not in ("last", "best"):
        raise unknown("epoch", epoch, ("last", "best"))
    relation, than = found.get("relation", "about"), found.get("than", [])
    than = (than,) if isinstance(than, str) else tuple(than)
    if relation not in RELATIONS:
        raise unknown("relation", relation, RELATIONS)
    value, tolerance = found.get("value"), found.get("tolerance", 0.0)
    where = f"the claim on {metric} of {found['run']!r}"
    if (value is None) == (not than):
        raise DerkitError(f"{where} needs either 'value' or 'than', found {'neither' if value is None else 'both'}.")
    numbers = [v for v in (value, tolerance) if v is not None]
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers) or tolerance < 0:
        raise DerkitError(f"{where}: value and tolerance are numbers (shares, not per cent), found {value!r} and {tolerance!r}.")
    if value is not None and metric not in ("dE", "gap") and not 0 <= value <= 1:
        raise DerkitError(f"{where}: {metric} is a share in [0, 1], found {value!r}.")
    if relation == "about" and (than or not tolerance):
        raise DerkitError(f"{where}: relation 'about' needs a value and a tolerance; else use one of: {', '.join(RELATIONS[1:])}.")
    for other in than:
        if ": " not in other:
            _matching(other, labels)
    if config is not None:
        if config.dataset not in PUBLISHED_FOR:
            raise DerkitError(f"{where}: published values are of {', '.join(PUBLISHED_FOR)}, not of {config.dataset}; use 'claims'.")
        if not found.get("source") or value is None:
            raise DerkitError(f"{where}: an expectation needs the published 'value' and its 'source'.")
    text = found.get("text") or f"{found['run']}: {metric}, {epoch} epoch"
    return Claim(text, found["run"], metric, epoch, relation, value, than, tolerance, found.get("source", ""), found.get("note", ""),
                 config is not None)
