"""The scorecard: every claim of the manifests, what was published, what the records say, and a verdict.

    python -m derkit.scorecard                 # all suites
    python -m derkit.scorecard cifar10         # one of them

Verdicts: PASS and FAIL only where the records hold the metric for every seed of every run that the claim speaks of, trained
with the manifest's own settings and data; in every other case 'not run', with what there is so far. A seed whose training
diverged makes its run's claims FAIL.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from derkit.claims import Claim
from derkit.config import TrainConfig
from derkit.diagnosis import co_onset
from derkit.errors import DerkitError, pick
from derkit.manifest import Job, Manifest, diverged, load_manifest
from derkit.records import Run
from derkit.results import records_folder

COLUMNS = ("suite", "claim", "run", "condition", "published", "bar", "source", "ours", "seeds", "record", "verdict")


def suites_folder() -> Path:
    """figures/suites of the repository that this package stands in."""
    return records_folder().parent / "suites"


def load_manifests(folder: Path | None = None) -> dict[str, Manifest]:
    """Every manifest of a folder, by name."""
    found = [load_manifest(path) for path in sorted((folder or suites_folder()).glob("*.json"))]
    return {m.name: m for m in found}


# --------------------------------------------------------------------------------------------------------- values
@dataclass(frozen=True)
class Measured:
    """One metric of one run label: a value per seed that has it, and how many seeds the manifest asks for."""

    values: tuple[float, ...]
    wanted: int
    folders: tuple[str, ...]
    source: str = ""  # which copy of the data
    diverged: int = 0  # seeds whose loss stopped being finite

    @property
    def complete(self) -> bool:
        return len(self.values) == self.wanted

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def __str__(self) -> str:
        if not self.values:
            return "-"
        spread = f" [{min(self.values):.3f}, {max(self.values):.3f}]" if len(self.values) > 1 else ""
        return f"{self.mean:.3f}{spread}"


def metric_of(run: Run, metric: str, epoch: str) -> float:
    """A test metric of a run; 'collapsed' is 0 or 1, 'gap' the PGD accuracy of the best epoch minus that of the last.
    NaN where the run was not evaluated by it."""
    if metric == "collapsed":
        return float(co_onset(run) is not None)
    if metric == "gap":
        return run.final["best"]["pgd"] - run.final["last"]["pgd"]
    value = run.final[epoch].get(metric)
    return math.nan if value is None else float(value)


def _run(job: Job, root: Path) -> Run | None:
    """The finished record of a job, if it is of the job's settings."""
    folder = root / job.suite / job.slug
    if job.sweep or not (folder / "final.json").is_file():
        return None
    run = Run(folder)
    return run if job.is_of(run.config["train"]) and len(run.epochs) else None


def measure(manifest: Manifest, label: str, metric: str, epoch: str, root: Path) -> Measured:
    """What the records under ``root`` hold of a metric, over the seeds of one label."""
    jobs = [j for j in manifest.jobs if j.label == label]
    if not jobs:
        raise DerkitError(f"suite {manifest.name} has no run {label!r}; it has: {', '.join(manifest.labels)}.")
    runs = {j.slug: run for j in jobs if (run := _run(j, root)) is not None}
    values = {slug: metric_of(run, metric, epoch) for slug, run in runs.items()}
    good = {slug: v for slug, v in values.items() if math.isfinite(v)}
    source = next((run.config.get("source", "") for run in runs.values()), "")
    lost = sum(diverged(j, root / j.suite / j.slug) for j in jobs if j.slug not in runs)
    return Measured(tuple(good.values()), len(jobs), tuple(good), source, lost)


# -------------------------------------------------------------------------------------------------------- verdicts
def holds(claim: Claim, mean: float, bar: float) -> bool:
    """Does the relation of the claim hold between our mean and the bar? Tolerance widens it."""
    slack = claim.tolerance + 1e-9  # records hold six digits
    return {"about": abs(mean - bar) <= slack, ">=": mean >= bar - slack, "<=": mean <= bar + slack,
            ">": mean > bar - claim.tolerance, "<": mean < bar + claim.tolerance}[claim.relation]


def judge(claim: Claim, manifest: Manifest, manifests: Mapping[str, Manifest], root: Path) -> dict[str, str]:
    """One row of the scorecard."""
    ours = measure(manifest, claim.run, claim.metric, claim.epoch, root)
    others = {}
    for name in claim.than:
        suite, _, label = name.rpartition(": ")
        home = pick("suite", suite, dict(manifests)) if suite else manifest
        others[name] = measure(home, label, claim.metric, claim.epoch, root)
    config = next(j.config for j in manifest.jobs if j.label == claim.run)
    bars = [claim.value] if claim.value is not None else [o.mean for o in others.values() if o.values]
    verdict = "not run"
    if ours.diverged:
        verdict = "FAIL"
    elif ours.complete and all(o.complete for o in others.values()):
        verdict = "PASS" if all(holds(claim, ours.mean, bar) for bar in bars) else "FAIL"
    tolerance = f" +- {claim.tolerance:g}" if claim.tolerance else ""
    sign = "" if claim.relation == "about" else claim.relation + " "
    bar = " and ".join(f"{name} ({o})" for name, o in others.items()) or f"{claim.value:g}{tolerance}"
    seeds = f"{len(ours.values)} of {ours.wanted}" + (f", {ours.diverged} diverged" if ours.diverged else "")
    record = f"{manifest.name}/{ours.folders[0].rpartition('-s')[0]}-s*" if ours.folders else "-"
    return dict(suite=manifest.name, claim=claim.text, run=claim.run, condition=condition(config, ours.source), bar=sign + bar,
                published=f"{claim.value:g}" if claim.published else "-", source=_source(claim), ours=str(ours), seeds=seeds,
                record=record, verdict=verdict)


def _source(claim: Claim) -> str:
    text = claim.source or "goal"
    return f"{text}; {claim.note}" if claim.note else text


def condition(config: TrainConfig, source: str = "") -> str:
    """'cifar10, preact_resnet18, eps 8/255, 30 epochs', with the copy of the data where records say which."""
    bytes_ = config.eps * 255
    eps = f"{round(bytes_)}/255" if abs(bytes_ - round(bytes_)) < 1e-6 else f"{config.eps:g}"
    data = config.dataset + (f" ({source})" if source and source != "bundled" else "")
    images = f", {config.train_size} images" if config.train_size else ""
    return f"{data}, {config.model}{images}, eps {eps}, {config.epochs} epochs"


def scorecard(names: Sequence[str] = (), suites: Path | None = None, records: Path | None = None) -> pd.DataFrame:
    """One row a claim, columns `COLUMNS`: of the named suites, or of all in ``suites`` (default figures/suites).

    Raises DerkitError for an unknown suite, and for a claim that names a run which does not exist.
    """
    manifests = load_manifests(suites)
    chosen = [pick("suite", name, manifests) for name in names] or list(manifests.values())
    rows = [judge(claim, m, manifests, records or records_folder()) for m in chosen for claim in m.claims]
    return pd.DataFrame(rows, columns=COLUMNS)


def counts(table: pd.DataFrame) -> dict[str, int]:
    """How many claims have which verdict: {'PASS': n, 'FAIL': n, 'not run': n}."""
    return {verdict: int((table["verdict"] == verdict).sum()) for verdict in ("PASS", "FAIL", "not run")}


def by_claim(table: pd.DataFrame) -> pd.DataFrame:
    """The scorecard in short: a row per suite and claim, over all runs that it speaks of. Columns runs, PASS, not run, FAIL."""
    rows = [dict(suite=suite, claim=claim, runs=len(part), **counts(part))
            for (suite, claim), part in table.groupby(["suite", "claim"], sort=False)]
    return pd.DataFrame(rows, columns=["suite", "claim", "runs", "PASS", "not run", "FAIL"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m derkit.scorecard", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help="names of suites; default: all")
    parser.add_argument("--csv", help="also write the whole table to this file")
    options = parser.parse_args(argv)
    try:
        table = scorecard(options.suites)
    except DerkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with pd.option_context("display.width", 250, "display.max_colwidth", 70):
        print(table[["claim", "run", "bar", "ours", "seeds", "verdict"]].to_string(index=False))
    print(", ".join(f"{n} {verdict}" for verdict, n in counts(table).items()))
    if options.csv:
        table.to_csv(options.csv, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
