"""Suites of runs: one readable manifest, one command, several runs side by side, records collected.

    python -m derkit.suite figures/suites/co_fashion_mini.json --jobs 2
    python -m derkit.suite figures/suites/cifar10.json --group A --calibrate      # one epoch of each method, then the plan
    python -m derkit.suite figures/suites/cifar10.json --dry-run --rate 100 --gpus 8     # the plan, from counted operations
    python -m derkit.suite figures/suites/cifar10.json --group A --gpus 8               # eight runs at a time, one a GPU
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
import time
from collections.abc import Sequence
from dataclasses import replace

from derkit.costs import calibrate, calibration_file, plan
from derkit.errors import DerkitError, unknown
from derkit.manifest import DIVERGED, Job, read_manifest, resolve
from derkit.records import write_json

EVALUATIONS = {"autoattack": "autoattack_size", "pgd50": "pgd50_size"}


# -------------------------------------------------------------------------------------------------------- running
def arguments(job: Job) -> list[str]:
    """What `python -m derkit.training` is called with for a job."""
    return ["--folder", str(job.folder), *(f"--set={k}={v}" for k, v in job.config.as_dict().items())]


def gpus_to_use(number: int) -> list[str]:
    """The first GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; [] for 0 (runs choose for themselves).
    Raises DerkitError where there are fewer."""
    from torch import cuda

    if not number:
        return []
    if number < 0 or cuda.device_count() < number:
        raise DerkitError(f"--gpus {number}: found {cuda.device_count()} GPUs. Leave it out for runs that choose their device.")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (seen.split(",") if seen else [str(i) for i in range(cuda.device_count())])[:number]


def start(job: Job, threads: int, gpu: str = "") -> subprocess.Popen:
    """The training process of a job, on a GPU of its own if one is named; its output goes to train.log in the run's folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    own = dict(OMP_NUM_THREADS=str(threads) if threads else "", CUDA_VISIBLE_DEVICES=gpu)
    environment = os.environ | {k: v for k, v in own.items() if v}
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


def run(jobs: Sequence[Job], parallel: int = 1, threads: int = 0, known: Sequence[Job] = (), gpus: Sequence[str] = ()) -> int:
    """Run jobs, ``parallel`` at a time; returns how many failed. A failed job does not stop the others. With ``gpus`` a job
    takes the one that has the fewest.

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
            taken = [gpu for _, gpu in running.values()]
            gpu = min(gpus, key=taken.count, default="")
            running[start(job, threads, gpu)] = job, gpu
            print(f"started {job.slug}" + (f" on GPU {gpu}" if gpu else ""), flush=True)
        if waiting and not running:
            for job in waiting:
                print(f"left out {job.slug}: its lambda is chosen from runs that have no records yet: {', '.join(job.sweep)}", flush=True)
            break
        for process, (job, _) in list(running.items()):
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
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; default: 1, or one a GPU with --gpus")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="spread the runs over N GPUs; default: each run's own choice")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run; 0: torch's choice")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override in every run")
    parser.add_argument("--dry-run", action="store_true", help="print the runs (with their cost after --calibrate) and stop")
    parser.add_argument("--rate", type=float, default=0.0, metavar="T", help="with --dry-run: count the operations of the runs, and the "
                        "hours at T 10^12 operations a second (benchmarks/throughput.py prints what a device sustains)")
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
        if options.rate < 0 or options.jobs < 0:
            raise DerkitError(f"--rate and --jobs must not be negative, found {options.rate:g} and {options.jobs}.")
        if options.dry_run:  # for another machine, perhaps
            file = calibration_file(jobs)
            costs = json.loads(file.read_text()) if file.is_file() else {}
            print("\n".join(plan(jobs, costs, options.rate * 1e12, max(options.gpus, 1))))
            return 0
        gpus = gpus_to_use(options.gpus)
        if options.calibrate:
            print("\n".join(plan(jobs, calibrate(jobs), devices=max(options.gpus, 1))))
            return 0
    except DerkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if evaluations:
        jobs = finished(jobs, evaluations)
        print(f"{len(jobs)} finished runs to evaluate")
    try:
        return 1 if run(jobs, options.jobs or len(gpus) or 1, options.threads, known, gpus) else 0
    except KeyboardInterrupt:  # the runs got it as well, and keep what they have
        return interrupted()


if __name__ == "__main__":
    raise SystemExit(main())
