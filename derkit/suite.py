"""Suites of runs: one readable manifest, one command, several runs side by side, records collected.

    python -m derkit.suite figures/suites/co_fashion_mini.json --jobs 2
    python -m derkit.suite figures/suites/co_fashion_mini.json --only n_fgsm --dry-run

A manifest is JSON: name, about, preset, set (fields common to all), seeds, and runs: [{label, set, seeds?, published?}].
Each run is `python -m derkit.training`; a finished one is not trained again, an interrupted one goes on. The records
(config.json, metrics.jsonl, env.json, final.json) are copied to figures/records/<name>/<label>-s<seed>/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.records import runs_folder, write_json
from derkit.results import records_folder


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    suite: str
    label: str
    order: int
    config: TrainConfig

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", self.label.lower()).strip("_") + f"-s{self.config.seed}"

    @property
    def folder(self) -> Path:
        return runs_folder() / self.suite / self.slug

    @property
    def records(self) -> Path:
        return records_folder() / self.suite / self.slug


def read_manifest(path: str | os.PathLike, overrides: dict[str, Any] | None = None) -> list[Job]:
    """The jobs of a manifest, all seeds of the first run before the second. Raises DerkitError for a bad file or field."""
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(manifest["name"], str) or not re.fullmatch(r"\w[\w.-]*", manifest["name"]):  # a folder's name
            raise DerkitError(f"{path}: name must be letters, digits, _, - and ., found {manifest['name']!r}.")
        common, runs = manifest.get("set", {}), manifest["runs"]
        jobs = []
        for order, run in enumerate(runs):
            for seed in run.get("seeds", manifest.get("seeds", [0])):
                values = common | run.get("set", {}) | {"seed": seed} | (overrides or {})
                config = TrainConfig.make(run.get("preset", manifest.get("preset")), **values)
                jobs.append(Job(manifest["name"], str(run["label"]), order, config))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DerkitError(f"{path} is not a suite manifest: {error!r}.") from error
    if len({j.slug for j in jobs}) != len(jobs):
        raise DerkitError(f"{path}: two runs have the same label and seed.")
    return jobs


def start(job: Job, threads: int) -> subprocess.Popen:
    """The training process of a job; its output goes to train.log in the run's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    sets = [f"--set={k}={v}" for k, v in job.config.as_dict().items()]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(job.folder / "train.log", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "derkit.training", "--folder", str(job.folder), *sets], stdout=log,
                                stderr=subprocess.STDOUT, env=environment)


def collect(job: Job) -> None:
    """Copy the records of a finished job; the manifest's label and order go into config.json."""
    for name in ("metrics.jsonl", "env.json", "final.json"):
        job.records.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.folder / name, job.records / name)
    config = json.loads((job.folder / "config.json").read_text())
    config["train"]["data_dir"] = ""  # a path of the machine that ran it
    write_json(job.records / "config.json", dict(label=job.label, order=job.order) | config)


def run(jobs: list[Job], parallel: int = 1, threads: int = 0) -> int:
    """Run jobs, ``parallel`` at a time; returns how many failed. A failed job does not stop the others."""
    waiting, running, failed = list(jobs), {}, 0
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            running[start(job, threads)] = job
            print(f"started {job.slug}", flush=True)
        for process, job in list(running.items()):
            if process.poll() is None:
                continue
            del running[process]
            if process.returncode == 0:
                collect(job)
                print(f"finished {job.slug}", flush=True)
            else:
                failed += 1
                print(f"FAILED {job.slug}: see {job.folder / 'train.log'}", flush=True)
        time.sleep(0.2)
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m derkit.suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--only", action="append", default=[], help="labels to run (repeatable); default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on one device")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run; 0: torch's choice")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in every run")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    options = parser.parse_args(argv)
    from derkit.cli import interrupted, parse_sets

    try:
        jobs = read_manifest(options.manifest, parse_sets(options.set))
        if options.only:
            unknown = set(options.only) - {j.label for j in jobs}
            if unknown:
                labels = ", ".join(dict.fromkeys(j.label for j in jobs))
                raise DerkitError(f"no run is labelled {', '.join(sorted(unknown))}; labels: {labels}.")
            jobs = [j for j in jobs if j.label in options.only]
    except DerkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for job in jobs:
            print(f"{job.slug}: {job.config.method}, {job.config.regularizer}, eps {job.config.eps:.4f}, {job.config.epochs} epochs")
        return 0
    try:
        return 1 if run(jobs, options.jobs, options.threads) else 0
    except KeyboardInterrupt:  # the runs got it as well, and keep what they have
        return interrupted()


if __name__ == "__main__":
    raise SystemExit(main())
