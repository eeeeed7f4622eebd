"""Suites: which experiments are run, in which order, with which settings. Plain Python.

An `Experiment` is a labelled config with its seeds; `planned` gives the runs, one for every seed.
The settings of an experiment (`TUNED`) may come from a sweep: from the run, among those whose label
matches ``sweep``, with the highest PGD accuracy on validation images (mean of the last three
epochs, and of all seeds). Settings with a run that diverged are out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from derkit.config import AUTO, TrainConfig
from derkit.records import Run, records_folder, runs_folder
from derkit.util import home, pick, read_json

DIVERGED = "diverged.json"  # among the records of a run whose loss stopped being finite
NAMED = dict(method=r"^(fgsm|rs_fgsm|n_fgsm|zerograd|pgd|trades)", steps=r"^pgd-(\d+)",
             regularizer=r"\+ (der|elle|gradalign|aaer)", variant=r"\+ der (\w+)",
             eps=r"eps (\d+/255)", weight=r"lambda ([\d.]+)")  # fields that a label sets


class Suite(NamedTuple):
    """Experiments that belong together."""

    about: str
    experiments: tuple[Experiment, ...]


@dataclass(frozen=True)
class Experiment:
    """A configuration with its seeds; what `planned` returns is one of its runs, with one seed.

    ``sweep``: a pattern of the labels that settings are chosen from, '' once they are known.
    """

    label: str
    config: TrainConfig
    group: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    sweep: str = ""
    suite: str = ""
    order: int = 0
    changed: bool = False  # other settings than the suite's, from the command line

    @property
    def slug(self) -> str:
        words = re.sub(r"[^a-z0-9]+", "_", self.label.lower()).strip("_")
        return f"{words}-s{self.config.seed}"

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return runs_folder() / self.suite / self.slug

    @property
    def records(self) -> Path:
        """Where its records are kept: in the repository only with the suite's own settings."""
        root = home() / "records" if self.changed else records_folder()
        return root / self.suite / self.slug

    def is_of(self, train: dict[str, Any]) -> bool:
        """Are these the settings of this run? Precision 'auto' is what it resolved to."""
        mine = self.config
        if mine.precision == AUTO:
            mine = mine.change(precision=train["precision"])
        return TrainConfig.read(train).hash() == mine.hash()

    def finished(self, folder: Path) -> Run | None:
        """The finished run in a folder, if it has these very settings."""
        if self.sweep or not (folder / "final.json").is_file():
            return None
        run = Run(folder)
        return run if self.is_of(run.config["train"]) else None

    @property
    def diverged(self) -> bool:
        """Do the records say that the loss of this very run stopped being finite?"""
        found = read_json(self.records / DIVERGED)
        return bool(found) and self.is_of(found["train"])


def planned(name: str, overrides: dict[str, Any] | None = None) -> list[Experiment]:
    """The runs of a suite, one seed of everything first; settings resolved where they can be.

    ``overrides`` go into every config. Where they change results, the suite gets another name.
    """
    runs, experiments = [], pick("suite", name, SUITES).experiments
    longest = max(len(e.seeds) for e in experiments)
    for place, (order, e) in product(range(longest), enumerate(experiments)):
        if place < len(e.seeds):
            plain = e.config.change(seed=e.seeds[place])
            config = plain.change(**(overrides or {}))
            changed = config.hash() != plain.hash()
            suite = f"{name}-changed" if changed else name
            runs.append(replace(e, config=config, suite=suite, order=order, changed=changed))
    values = {sweep: chosen(sweep, runs) for sweep in {run.sweep for run in runs}}
    return [resolve(run, runs, values[run.sweep]) for run in runs]


def chosen(sweep: str, runs: list[Experiment]) -> dict[str, Any]:
    """The settings that a sweep chose; none while a run of it is missing."""
    tried: dict[str, list[Experiment]] = {}
    for run in runs:
        if fnmatchcase(run.label, sweep):
            tried.setdefault(run.label, []).append(run)
    tried = {label: part for label, part in tried.items() if not any(p.diverged for p in part)}
    reached = {label: [p.finished(p.records) for p in part] for label, part in tried.items()}
    if not tried or not all(record for part in reached.values() for record in part):
        return {}
    best = max(reached, key=lambda label: np.mean(
        [record.epochs["valid_pgd"].tail(3).mean() for record in reached[label]]))
    return {name: getattr(tried[best][0].config, name) for name in TUNED}


def resolve(run: Experiment, runs: list[Experiment],
            values: dict[str, Any] | None = None) -> Experiment:
    """The run with the settings that its sweep chose (``values``: those, if they are known)."""
    values = chosen(run.sweep, runs) if values is None else values
    return replace(run, config=run.config.change(**values), sweep="") if values else run


def experiment(label: str, preset: str, common: dict[str, Any], *, group: str = "",
               seeds: tuple[int, ...] = (0, 1, 2), sweep: str = "",
               **own: Any) -> Experiment:
    """An experiment from a preset, its suite's ``common`` fields, its label, and its own fields."""
    found = {name: re.search(pattern, label) for name, pattern in NAMED.items()}
    named = {name: match[1] for name, match in found.items() if match}
    config = TrainConfig.make(preset, **(common | named | own))
    return Experiment(label, config, group, seeds, sweep)


# ---------------------------------------------------- catastrophic overfitting of a single layer
TUNED = ("weight", "alpha", "k", "q", "start", "ema", "awp", "beta")  # what a sweep may choose
CIFAR_ROWS = ("fgsm", "n_fgsm", "fgsm + der norm", "fgsm + der ball", "rs_fgsm, published step",
              "rs_fgsm + der norm")


def settings(eps: float, wide: bool = False) -> dict[str, list[dict[str, float]]]:
    """Four settings a row, tried on validation images, or three that lie further apart (``wide``).

    FGSM has nothing to choose, and RS-FGSM stands there at its published step, too, to which DER
    and AAER are added.
    """

    def alphas(*factors: float, **more: float) -> list[dict[str, float]]:
        return [dict(alpha=round(factor * eps, 6), **more) for factor in factors]

    steps = {"rs_fgsm": alphas(0.75, 1, 1.25, 1.5),
             "n_fgsm": [*alphas(1, k=1), *alphas(0.75, 1, k=2), *alphas(1, k=3)],
             "zerograd": [*alphas(1.25, 2, q=0.35), *alphas(1.25, 2, q=0.5)],
             "pgd-10": alphas(0.125, 0.25, 0.5, 1)}
    weights = {"fgsm + der norm": (0.5, 1, 2, 4), "rs_fgsm + der norm": (0.25, 0.5, 1, 2),
               "n_fgsm + der norm": (0.1, 0.5, 1, 2), "fgsm + der ball": (2, 4, 8, 16),
               "fgsm + der segment": (4, 8, 16, 32), "fgsm + der marginal": (1, 2, 4, 8),
               "fgsm + elle": (10, 50, 250, 1000), "fgsm + gradalign": (0.5, 1, 2, 4),
               "rs_fgsm + aaer": (0.5, 1, 2, 4)}
    if wide:
        steps = {row: values[:3] for row, values in steps.items()}
        weights = {"fgsm + der norm": (1, 4, 16), "rs_fgsm + der norm": (0.25, 1, 4),
                   "fgsm + der ball": (2, 8, 32), "fgsm + elle": (50, 500, 5000),
                   "fgsm + gradalign": (0.25, 1, 4), "rs_fgsm + aaer": (0.5, 2, 8)}
    return {"fgsm": [{}], "rs_fgsm, published step": [{}], **steps,
            **{row: [dict(weight=value) for value in values] for row, values in weights.items()}}


def tuned(preset: str, options: dict[str, list[dict[str, float]]], common: dict[str, Any],
          tuning: dict[str, Any], judged: dict[str, Any],
          fixed: dict[str, dict[str, Any]] | None = None) -> list[Experiment]:
    """For every row its settings, judged on validation images after the last epochs (group tune: a
    single test image), then the chosen one on fresh seeds (group test), whose test images are
    looked at once. ``tuning``, ``judged``, ``fixed``: fields of the first, of the others, of rows.
    """
    swept = {row: values for row, values in options.items() if len(values) > 1}
    unseen = dict(final_size=1, strong_size=0, pgd50_size=0, autoattack_size=0)
    tuning = common | unseen | tuning
    tune = partial(experiment, preset=preset, group="tune", seeds=tuning.pop("seeds"))
    test = partial(experiment, preset=preset, group="test", common=common | judged)
    fixed = fixed or {}

    def name(row: str, values: dict[str, float]) -> str:
        return f"{row}: " + ", ".join(f"{key} {value:g}" for key, value in values.items())

    return [*(tune(name(row, values), common=tuning, **values | fixed.get(row, {}))
              for row in swept for values in swept[row]),
            *(test(row, sweep=f"{row}: *" if row in swept else "", **fixed.get(row, {}))
              for row in options)]


def one_layer(preset: str, rows: tuple[str, ...] = (), wide: bool = False,
              **common: Any) -> list[Experiment]:
    """`tuned` rows of `settings`. ``wide``: three settings on one seed instead of four on two."""
    options = settings(TrainConfig.make(preset, **common).eps, wide)
    options = {row: options[row] for row in rows or options}
    tuning = dict(seeds=(100,), eval_from=0.9) if wide else dict(seeds=(100, 101))
    judged = dict(pgd50_size=1000, autoattack_size=200, judge_best=False)
    return tuned(preset, options, common, tuning, judged)


def co_fashion_mini() -> list[Experiment]:
    """Catastrophic overfitting on the bundled data: one layer of 4 filters, 3,000 images, eps
    40/255, 30 epochs. Every row at the best of four settings on validation images, three seeds."""
    return one_layer("fashion_co")


def co_cifar10() -> list[Experiment]:
    """Catastrophic overfitting on 10,000 images of CIFAR-10: one layer of 16 filters, eps
    10/255, 30 epochs. Tuned rows at the best of three settings on validation images, three
    seeds. (At 8/255 FGSM stayed healthy for 30 epochs.)"""
    return one_layer("cifar10_co", CIFAR_ROWS, wide=True)


def co_cifar100() -> list[Experiment]:
    """Catastrophic overfitting on 10,000 images of CIFAR-100, as on CIFAR-10."""
    return one_layer("cifar10_co", CIFAR_ROWS[:4], wide=True, dataset="cifar100")


def co_preact() -> list[Experiment]:
    """Catastrophic overfitting of the paper's network, narrow: PreActResNet-18 of width 16, 10,000
    images of CIFAR-10 without augmentation, eps 16/255, 10 epochs. Published settings, those that a
    third party reports for the norm form, and the default of ball, which a second row tunes: the
    best of three weights on validation images, one seed."""
    common = dict(width=16, train_size=10000, augment="none", epochs=10, lr=0.1, eps="16/255",
                  precision="fp32", eval_size=500, final_size=1000, strong_size=500,
                  judge_best=False)
    judged, tuning = dict(pgd50_size=500, autoattack_size=200), dict(seeds=(100,), eval_from=0.7)
    one = partial(experiment, preset="cifar10", common=common | judged, group="test", seeds=(0, 1))
    ball = {"fgsm + der ball, tuned": [dict(weight=value) for value in (32, 128, 512)]}
    return [one("fgsm"), one("rs_fgsm"), one("rs_fgsm + der norm", weight=0.5), one("n_fgsm"),
            one("fgsm + der ball"), one("n_fgsm + der norm", weight=0.1), one("fgsm + gradalign"),
            *(replace(row, seeds=row.seeds[:2])
              for row in tuned("cifar10", ball, common, tuning, judged))]


# ----------------------------------------------------------------------------- robust overfitting
RO_SETTINGS = {"pgd": [{}], "pgd + der norm": [
    dict(weight=6, start=0.8), *(dict(weight=weight, start=0.3) for weight in (1, 6, 18))],
    "pgd + der segment": [dict(weight=weight) for weight in (4, 8, 16, 32)],
    "pgd, EMA": [dict(ema=decay) for decay in (0.9, 0.97, 0.99, 0.997)],
    "pgd, AWP": [dict(awp=size) for size in (0.003, 0.01, 0.03, 0.1)],
    "trades": [dict(beta=beta) for beta in (3, 6, 12, 24)]}


def ro_fashion_mini() -> list[Experiment]:
    """Robust overfitting on the bundled data: PGD-4 training on 250 images, 45 epochs. Tuned rows
    at the best of four settings on validation images, three seeds."""
    common = dict(precision="fp32", eval_size=400, final_size=1000, strong_size=1000)
    reported = {"pgd + der norm": dict(gamma=0.2, mask="all", warmup=0)}
    return tuned("fashion_ro", RO_SETTINGS, common, dict(seeds=(100,), eval_from=0.9), {}, reported)


# ------------------------------------------------------------- classifiers that generate CIFAR-10
def gen_cifar10() -> list[Experiment]:
    """Classifiers to generate with: PreActResNet-18 of width 16 on all images of CIFAR-10, 10
    epochs. Robust in the L_2 ball of radius 0.5 and in the L_inf ball of 8/255, and standard."""
    common = dict(width=16, epochs=10, eval_size=500, eval_from=0.85, final_size=1000,
                  strong_size=500, pgd50_size=0, autoattack_size=0, judge_best=False)
    one = partial(experiment, preset="cifar10", common=common, seeds=(0, 1))
    return [one("pgd-1, L2", norm="l2", eps=0.5, alpha=0.5), one("n_fgsm"),
            one("standard", method="standard")]


# --------------------------------------------------------------------------------------- CIFAR-10
def cifar10() -> list[Experiment]:
    """CIFAR-10, PreActResNet-18. A: catastrophic overfitting of FGSM, RS-FGSM and N-FGSM. B1: the
    ball form of DER, and ELLE, with lambda swept on validation images; B2: those, the reported form
    of DER, and GradAlign with three seeds. C: robust overfitting over 200 epochs."""
    one = partial(experiment, preset="cifar10", common={})
    long = partial(experiment, preset="rice2020", common=dict(final_steps=10), group="C")
    once = partial(long, seeds=(0,))
    swept = partial(one, group="B1", seeds=(0,), final_size=1, strong_size=0, pgd50_size=0,
                    autoattack_size=0)
    radii = ("16/255", "12/255", "8/255")
    lambdas = {f"{m} + der ball": (2, 8, 32) for m in ("fgsm", "rs_fgsm")}
    lambdas |= {"fgsm + elle": (50, 500, 4000)}
    reported = {"rs_fgsm + der norm": 0.5, "n_fgsm + der norm": 0.1}
    late = dict(weight=6, gamma=0.2, mask="all", start=0.8)

    def final(name: str, eps: str) -> Experiment:
        at = "8/255" if eps == "8/255" else "16/255"
        return one(f"{name} eps {eps}", group="B2", sweep=f"{name} eps {at} lambda *")

    return [*(one(f"{m} eps {eps}", group="A")
              for m, eps in product(("fgsm", "rs_fgsm", "n_fgsm"), radii[::-1])),
            *(swept(f"{name} eps {eps} lambda {weight}")
              for name, eps in product(lambdas, radii[::2]) for weight in lambdas[name]),
            *(final(name, eps) for name, eps in product(lambdas, radii)),
            *(one(f"{name} eps {eps}", group="B2", weight=weight)
              for (name, weight), eps in product(reported.items(), radii)),
            *(one(f"fgsm + gradalign eps {eps}", preset="gradalign2020", group="B2")
              for eps in radii),  # lambda by the published formula, recipe of its authors
            long("pgd-10"), long("pgd-10 + der norm", **late), long("pgd-10, AWP", awp=0.01),
            once("trades"), once("trades + der norm", **late), once("pgd-10, EMA", ema=0.999)]


SUITES = {make.__name__: Suite(" ".join(make.__doc__.split()), tuple(make()))
          for make in (cifar10, co_cifar10, co_cifar100, co_fashion_mini, co_preact, gen_cifar10,
                      ro_fashion_mini)}
