"""Run a suite, several runs side by side: on this machine, or on SLURM through submitit.

    python -m experiments.run co_fashion_mini --jobs 2
    python -m experiments.run cifar10 --group A --dry-run           # what would be run
    python -m experiments.run cifar10 --group A --calibrate         # one epoch of each kind of run
    python -m experiments.run cifar10 --evaluate autoattack=1000    # finished runs, no training
    python -m experiments.run cifar10 --cluster slurm --jobs 50 \\
        --submitit slurm_partition=gpu gpus_per_node=1 timeout_min=600

Finished runs are skipped, interrupted ones go on; local runs take turns on the visible GPUs.
Records (all but checkpoints) are copied to figures/records/<suite>/<label>-s<seed>/, or with --set
that changes results to $DERKIT_HOME/records.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import submitit
import torch
import tyro

from derkit.config import TrainConfig
from derkit.records import runs_folder
from derkit.training.loop import train
from derkit.util import DerkitError, pick, read_json, write_json
from experiments.suites import DIVERGED, Experiment, planned, resolve

EVALUATIONS = {"autoattack": "autoattack_size", "pgd50": "pgd50_size"}
KIND = ("dataset", "train_size", "model", "width", "method", "steps", "regularizer", "variant",
        "awp", "ema")
WEEK = 7 * 24 * 60  # minutes that submitit gives a run, unless timeout_min says otherwise
Submit = Callable[[Experiment], submitit.Job]


@dataclass
class Options:
    suite: tyro.conf.Positional[str]  # name of the suite
    only: tuple[str, ...] = ()  # labels; none: all
    group: tuple[str, ...] = ()  # groups; B stands for B1, B2, ...; none: all
    seeds: tuple[int, ...] = ()  # none: all
    jobs: int = 1  # runs side by side
    threads: int = 0  # CPU threads of each run; 0: torch's choice
    set: tuple[str, ...] = ()  # key=value: override fields of every run
    dry_run: bool = False  # print the runs and stop
    calibrate: bool = False  # measure one epoch of each kind of run and stop
    evaluate: tuple[str, ...] = ()  # autoattack=1000 pgd50=1000: finished runs, no training
    cluster: Literal["local", "slurm"] = "local"  # where
    submitit: tuple[str, ...] = ()  # key=value: parameters of submitit's executor


# ------------------------------------------------------------------------------------------- a run
def work(config: dict[str, Any], folder: str, threads: int, gpu: str) -> str:
    """What a job does: train one run. Returns '', or how the training diverged."""
    if threads:
        torch.set_num_threads(threads)
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        train(TrainConfig.read(config), folder=folder)
    except FloatingPointError as error:
        return str(error)
    return ""


def collect(run: Experiment) -> None:
    """Copy the records of a finished run; label and order go into its config.json."""
    run.records.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "env.json", "final.json"):
        shutil.copyfile(run.folder / name, run.records / name)
    (run.records / DIVERGED).unlink(missing_ok=True)
    config = read_json(run.folder / "config.json")
    config["train"]["data_dir"] = ""  # a path of the machine that ran it
    write_json(run.records / "config.json", dict(label=run.label, order=run.order) | config)


def close(run: Experiment, job: submitit.Job) -> bool:
    """Keep what a job that has ended leaves behind, and say so; is its run finished?"""
    if job.exception():
        print(f"FAILED {run.slug}: see {job.paths.stdout}", flush=True)
        return False
    if problem := job.result():
        settings = run.config.change(data_dir="").as_dict()
        write_json(run.records / DIVERGED, dict(label=run.label, train=settings, error=problem))
        print(f"DIVERGED {run.slug}: {problem}", flush=True)
        return False
    collect(run)
    print(f"finished {run.slug}", flush=True)
    return True


# ---------------------------------------------------------------------------------------- all runs
def execute(runs: Sequence[Experiment], known: list[Experiment], submit: Submit, jobs: int) -> int:
    """Run them, ``jobs`` at a time; returns how many failed, which does not stop the others.

    A run whose settings are still to be chosen waits for its sweep (``known``: all runs of the
    suite) and is left out, with a line, where that is not going to be run.
    """
    waiting, running, failed = list(runs), {}, 0
    while waiting or running:
        resolved = (resolve(run, known) for run in waiting if len(running) < jobs)
        ready = next((run for run in resolved if not run.sweep), None)
        if ready:
            waiting = [run for run in waiting if run.slug != ready.slug]
            running[ready] = submit(ready).cancel_at_deletion()  # Ctrl-C deletes it
            print(f"started {ready.slug}", flush=True)
        elif running:
            time.sleep(0.3)
            for run in [run for run, job in running.items() if job.done()]:
                failed += not close(run, running.pop(run))
        else:
            for run in waiting:
                print(f"left out {run.slug}: no records yet of {run.sweep}", flush=True)
            break
    return failed


def make_submit(options: Options, folder: str) -> Submit:
    """The function that hands a run to submitit, which keeps its logs in ``folder``."""
    parameters: dict[str, Any] = dict(timeout_min=WEEK, stderr_to_stdout=True)
    for name, value in pairs("--submitit", options.submitit).items():
        parameters[name] = int(value) if value.isdigit() else value
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, AssertionError) as error:
        raise DerkitError(f"submitit refuses cluster {options.cluster}: {error}") from error
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(i) for i in range(torch.cuda.device_count())]
    gpus, given = gpus if gpus and options.cluster == "local" else [""], []

    def submit(run: Experiment) -> submitit.Job:
        """On the GPU with the fewest of our jobs."""
        busy = Counter(gpu for gpu, job in given if not job.done())
        gpu = min(gpus, key=lambda name: busy[name])
        job = executor.submit(work, run.config.as_dict(), str(run.folder), options.threads, gpu)
        given.append((gpu, job))
        return job

    return submit


def calibrate(runs: Sequence[Experiment]) -> None:
    """Train one epoch of each kind of run, and print its seconds, evaluation not counted."""
    kinds = {tuple(getattr(run.config, name) for name in KIND): run for run in reversed(runs)}
    short = dict(epochs=1, final_size=1, strong_size=0, pgd50_size=0, autoattack_size=0)
    for run in reversed(kinds.values()):
        with tempfile.TemporaryDirectory() as folder:
            trained = train(run.config.change(**short), folder=f"{folder}/run", verbose=False)
            seconds = trained.epochs["seconds"].sum()
        print(f"{seconds:8.1f} s an epoch, {run.config.epochs} epochs: {run.label}", flush=True)


# ------------------------------------------------------------------------------------ command line
def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """['eps=8/255'] -> {'eps': '8/255'}."""
    for text in texts:
        if "=" not in text:
            raise DerkitError(f"{option} takes key=value, found {text!r}.")
    return dict(text.split("=", 1) for text in texts)


def choose(runs: list[Experiment], options: Options) -> list[Experiment]:
    """The runs that the options name. A group is also the start of one: B stands for B1 and B2."""
    for label in options.only:
        pick("label", label, {run.label: run for run in runs})
    chosen = [run for run in runs if not options.only or run.label in options.only]
    chosen = [run for run in chosen if run.group.startswith(options.group or "")]
    chosen = [run for run in chosen if not options.seeds or run.config.seed in options.seeds]
    if not chosen:
        groups = ", ".join(sorted({run.group for run in runs}))
        raise DerkitError(f"no run has such a label, group and seed. Groups: {groups or 'none'}.")
    return chosen


def start(options: Options) -> int:
    """Do what the options ask for; returns the exit status."""
    known = planned(options.suite, pairs("--set", options.set))
    runs = choose(known, options)
    done = [run for run in runs if run.finished(run.folder)]
    further = {pick("evaluation", name, EVALUATIONS): size
               for name, size in pairs("--evaluate", options.evaluate).items()}
    if options.dry_run:
        for run in runs:
            c, state = run.config, ", settings from its sweep" if run.sweep else ""
            state = ", finished" if run in done else state
            print(f"{run.group} {run.slug}: {c.method}, {c.regularizer}, eps {c.eps:.4f}, "
                  f"{c.epochs} epochs{state}")
        return 0
    if options.calibrate:
        calibrate(runs)
        return 0
    for run in done:
        collect(run)
    print(f"{len(done)} of {len(runs)} runs are finished")
    runs = [run for run in runs if run not in done]
    if further:
        runs = [replace(run, config=run.config.change(**further)) for run in done]
    logs = runs_folder() / known[0].suite / f"jobs-{time.time_ns()}"
    failed = execute(runs, known, make_submit(options, str(logs)), max(options.jobs, 1))
    if not failed:
        shutil.rmtree(logs, ignore_errors=True)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, prog="python -m experiments.run", description=__doc__)
    try:
        return start(options)
    except DerkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished epochs are kept, the same command goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
