"""Suites of runs: one readable manifest, one command, several runs side by side, records collected.

    python -m derkit.suite figures/suites/co_fashion_mini.json --jobs 2
    python -m derkit.suite figures/suites/cifar10.json --group A --calibrate      # one epoch of each method, then the plan
    python -m derkit.suite figures/suites/cifar10.json --group A --jobs 4
    python -m derkit.suite figures/suites/cifar10.json --evaluate autoattack=1000 # finished runs, without training

`derkit.manifest` says what a manifest holds. Each run is `python -m derkit.training`; a finished one is not trained again,
an interrupted one goes on. One seed of everything comes before the second seeds. The records (config.json, metrics.jsonl,
env.json, final.json) are copied to figures/records/<name>/<label>-s<seed>/; with --set, to $DERKIT_HOME/records instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from derkit.config import TrainConfig
from derkit.errors import DerkitError, unknown
from derkit.manifest import DIVERGED, Job, read_manifest, resolve
from derkit.records import runs_folder, write_json

EVALUATIONS = {"autoattack": "autoattack_size", "pgd50": "pgd50_size"}


# -------------------------------------------------------------------------------------------------------- running
def arguments(job: Job) -> list[str]:
    """What `python -m derkit.training` is called with for a job."""
    return ["--folder", str(job.folder), *(f"--set={k}={v}" for k, v in job.config.as_dict().items())]


def start(job: Job, threads: int) -> subprocess.Popen:
    """The training process of a job; its output goes to train.log in the run's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(job.folder / "train.log", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "derkit.training", *arguments(job)], stdout=log, stderr=subprocess.STDOUT,
                                env=environment)


def collect(job: Job) -> None:
    """Copy the records of a finished job; the manifest's label and order go into config.json."""
    for name in ("metrics.jsonl", "env.json", "final.json"):
        job.records.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.folder / name, job.records / name)
    (job.records / DIVERGED).unlink(missing_ok=True)
    config = json.loads((job.folder / "config.json").read_text())
    config["train"]["data_dir"] = ""  # a path of the machine that ran it
    write_json(job.records / "config.json", dict(label=job.label, order=job.order) | config)


def note_divergence(job: Job) -> None:
    """Where training stopped because loss or weights were not finite, that is a result: diverged.json goes into the records."""
    log = job.folder / "train.log"
    lines = log.read_text().splitlines() if log.is_file() else []
    if lines and "not finite" in lines[-1]:
        write_json(job.records / DIVERGED, dict(label=job.label, train=job.config.change(data_dir="").as_dict(), error=lines[-1]))


def run(jobs: Sequence[Job], parallel: int = 1, threads: int = 0, known: Sequence[Job] = ()) -> int:
    """Run jobs, ``parallel`` at a time; returns how many failed. A failed job does not stop the others.

    A job whose lambda is still to be chosen waits for its sweep (``known``: all jobs of the manifest) and is left out, with
    a line, where that is not going to be run.
    """
    waiting, running, failed = list(jobs), {}, 0
    while waiting or running:
        while waiting and len(running) < parallel:
            ready = next((i for i, j in enumerate(waiting) if not resolve(j, known or jobs).sweep), None)
            if ready is None:
                break
            job = resolve(waiting.pop(ready), known or jobs)
            running[start(job, threads)] = job
            print(f"started {job.slug}", flush=True)
        if waiting and not running:
            for job in waiting:
                print(f"left out {job.slug}: its lambda is chosen from runs that have no records yet: {', '.join(job.sweep)}", flush=True)
            break
        for process, job in list(running.items()):
            if process.poll() is None:
                continue
            del running[process]
            if process.returncode == 0:
                collect(job)
                print(f"finished {job.slug}", flush=True)
            else:
                failed += 1
                note_divergence(job)
                print(f"FAILED {job.slug}: see {job.folder / 'train.log'}", flush=True)
        time.sleep(0.2)
    return failed


def finished(jobs: Sequence[Job], evaluations: dict[str, int]) -> list[Job]:
    """The jobs whose run is finished here, asking for further evaluations: {'autoattack': 1000}. Nothing is trained, and
    what a run has already been evaluated by is kept."""
    out = []
    for job in jobs:
        if (job.folder / "final.json").is_file():
            config = job.config.change(**{EVALUATIONS[k]: n for k, n in evaluations.items()})
            out.append(replace(job, config=config))
    return out


# ----------------------------------------------------------------------------------------------------------- cost
def cost_key(config: TrainConfig) -> str:
    """Runs with the same key cost about the same per epoch: radius, seed, lambda and number of epochs do not matter."""
    from derkit.regularizers import VARIANTS

    attack = f"{config.method}-{config.steps}" if config.method in ("pgd", "trades", "weat") else config.method
    points = f"({', '.join(VARIANTS[config.variant].points)})" if config.regularizer == "der" else ""
    added = f" + {config.regularizer}{points}" if config.regularizer != "none" else ""
    return f"{attack}{added}, {config.model} {config.width or ''} {config.dataset} {config.train_size or 'all'}".replace("  ", " ")


def calibration_file(jobs: Sequence[Job]) -> Path:
    return runs_folder() / jobs[0].suite / "calibration.json"


def calibrate(jobs: Sequence[Job]) -> dict[str, float]:
    """Seconds per epoch, its evaluation included, for every cost key: one epoch of each is run in a temporary folder.

    The first one also pays for the start of the device. What is measured is kept for --dry-run.
    """
    from derkit.data import load_dataset
    from derkit.device import choose_device
    from derkit.training import train

    costs: dict[str, float] = {}
    data = {}
    for config in {cost_key(j.config): j.config for j in reversed(jobs)}.values():
        one = config.change(epochs=1, final_size=1, strong_size=0, pgd50_size=0, autoattack_size=0)
        key = (one.dataset, one.data_dir, one.train_size, one.valid_size, one.device)
        if key not in data:
            data[key] = load_dataset(one.dataset, one.data_dir or None, choose_device(one.device), download=one.download,
                                     train_size=one.train_size, valid_size=one.valid_size, image_size=one.image_size or None)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(one, data[key], folder=Path(folder) / "run", verbose=False)
            costs[cost_key(config)] = round(time.perf_counter() - began, 3)
        print(f"{costs[cost_key(config)]:9.1f} s an epoch: {cost_key(config)}", flush=True)
    write_json(calibration_file(jobs), costs)
    return costs


def plan(jobs: Sequence[Job], costs: dict[str, float]) -> list[str]:
    """The runs as text, one a line, with hours where the cost of an epoch is known, and the totals of every group."""
    lines, totals = [], {}
    for job in jobs:
        seconds = costs.get(cost_key(job.config))
        hours = seconds * job.config.epochs / 3600 if seconds else None
        weight = "lambda from its sweep, " if job.sweep else ""
        lines.append(f"{job.group + ' ' if job.group else ''}{job.slug}: {job.config.method}, {job.config.regularizer}, {weight}"
                     f"eps {job.config.eps:.4f}, {job.config.epochs} epochs" + (f", {hours:.2f} h" if hours is not None else ""))
        count, known, total = totals.get(job.group, (0, 0, 0.0))
        totals[job.group] = (count + 1, known + (hours is not None), total + (hours or 0))
    for group, (count, known, total) in sorted(totals.items()):
        cost = f", {total:.2f} h one at a time, final evaluation not counted" if known == count else ""
        lines.append(f"group {group or '-'}: {count} runs{cost or ', cost unknown (--calibrate measures it)'}")
    return lines


# --------------------------------------------------------------------------------------------------- command line
def choose(jobs: list[Job], only: Sequence[str], groups: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """The jobs that the options name. A group also names those that begin with it: B stands for B1 and B2."""
    labels, found = list(dict.fromkeys(j.label for j in jobs)), sorted({j.group for j in jobs if j.group})
    unknown_labels = sorted(set(only) - set(labels))
    if unknown_labels:
        raise DerkitError(f"no run is labelled {', '.join(unknown_labels)}; labels: {', '.join(labels)}.")
    for group in groups:
        if not any(g.startswith(group) for g in found):
            raise unknown("group", group, found)
    return [j for j in jobs if (not only or j.label in only) and (not seeds or j.config.seed in seeds)
            and (not groups or any(j.group.startswith(g) for g in groups))]


def parse_evaluations(pairs: Sequence[str]) -> dict[str, int]:
    """['autoattack=1000'] -> {'autoattack': 1000}."""
    out = {}
    for pair in pairs:
        name, _, size = pair.partition("=")
        if name not in EVALUATIONS:
            raise unknown("evaluation", name, EVALUATIONS)
        if not size.isdigit() or not int(size):
            raise DerkitError(f"--evaluate takes name=number of test images, such as {name}=1000, found {pair!r}.")
        out[name] = int(size)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m derkit.suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--only", action="append", default=[], help="labels to run (repeatable); default: all")
    parser.add_argument("--group", action="append", default=[], help="groups to run (repeatable); B stands for B1, B2, ...")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[], help="seeds to run, such as 0,1")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side on one device")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run; 0: torch's choice")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in every run")
    parser.add_argument("--dry-run", action="store_true", help="print the runs (with their cost after --calibrate) and stop")
    parser.add_argument("--calibrate", action="store_true", help="run one epoch of each method, print the plan with its cost, and stop")
    parser.add_argument("--evaluate", action="append", default=[], metavar="NAME=IMAGES",
                        help="evaluate finished runs further, train nothing: autoattack=1000, pgd50=1000 (repeatable)")
    options = parser.parse_args(argv)
    from derkit.cli import interrupted, parse_sets

    try:
        known = read_manifest(options.manifest, parse_sets(options.set))
        evaluations = parse_evaluations(options.evaluate)
        jobs = choose(known, options.only, options.group, options.seeds)
        if not jobs:
            raise DerkitError(f"no run has one of the seeds {options.seeds}.")
        if options.calibrate:
            calibrate(jobs)
    except DerkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run or options.calibrate:
        file = calibration_file(jobs)
        print("\n".join(plan(jobs, json.loads(file.read_text()) if file.is_file() else {})))
        return 0
    if evaluations:
        jobs = finished(jobs, evaluations)
        print(f"{len(jobs)} finished runs to evaluate")
    try:
        return 1 if run(jobs, options.jobs, options.threads, known) else 0
    except KeyboardInterrupt:  # the runs got it as well, and keep what they have
        return interrupted()


if __name__ == "__main__":
    raise SystemExit(main())
