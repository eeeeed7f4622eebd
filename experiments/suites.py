"""Suites: which experiments are run, in which order, with which settings. Plain Python.

An `Experiment` is a labelled config with its seeds; `planned` gives the runs, one for every seed.
The weight lambda of an experiment may come from a sweep: from the run, among those whose label
matches ``sweep``, with the highest PGD accuracy on validation images (mean of the last three
epochs). Runs that diverged are out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from derkit.config import AUTO, TrainConfig
from derkit.records import Run, records_folder, runs_folder
from derkit.util import home, pick, read_json

DIVERGED = "diverged.json"  # among the records of a run whose loss stopped being finite
FORM = dict(variant="segment")  # of DER where a label names none, whatever the config's default is
FP32 = FORM | dict(precision="fp32")
NAMED = dict(method=r"^(?:ro )?(fgsm|rs_fgsm|n_fgsm|pgd|trades)", steps=r"(?:pgd|trades)-(\d+)",
             k=r" k ([\d.]+)", regularizer=r"\+ (der|elle|gradalign)", variant=r"\+ der (\w+)",
             eps=r"eps (\d+/255)", weight=r"lambda ([\d.]+)")  # fields that a label sets


class Suite(NamedTuple):
    """Experiments that belong together."""

    about: str
    experiments: tuple[Experiment, ...]


@dataclass(frozen=True)
class Experiment:
    """A configuration with its seeds; what `planned` returns is one of its runs, with one seed.

    ``sweep``: a pattern of the labels that lambda is chosen from, '' once it is known.
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
    """The runs of a suite, one seed of everything first; each lambda resolved that can be.

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
    return [resolve(run, runs) for run in runs]


def resolve(run: Experiment, runs: list[Experiment]) -> Experiment:
    """The run with the lambda that its sweep chose; unchanged while a run of it is missing."""
    sweep = [other for other in runs if fnmatchcase(other.label, run.sweep)]
    sweep = [other for other in sweep if not other.diverged]
    records = [other.finished(other.records) for other in sweep]
    if not sweep or not all(records):
        return run
    reached = [record.epochs["valid_pgd"].tail(3).mean() for record in records]
    weight = sweep[reached.index(max(reached))].config.weight
    return replace(run, config=run.config.change(weight=weight), sweep="")


def experiment(label: str, preset: str, common: dict[str, Any], *, group: str = "",
               seeds: tuple[int, ...] = (0, 1, 2), sweep: str = "",
               **own: Any) -> Experiment:
    """An experiment from a preset, its suite's ``common`` fields, its label, and its own fields."""
    found = {name: re.search(pattern, label) for name, pattern in NAMED.items()}
    named = {name: match[1] for name, match in found.items() if match}
    config = TrainConfig.make(preset, **(common | named | own))
    return Experiment(label, config, group, seeds, sweep)


# ----------------------------------------------------------------------------- the bundled images
def co_fashion_mini() -> list[Experiment]:
    """Catastrophic overfitting on the bundled data at eps 0.22: the base method, DER, and what
    people would use instead."""
    co = partial(experiment, preset="fashion_co", common=FP32)
    labels = ("fgsm", "fgsm + der", "n_fgsm", "fgsm + elle", "fgsm + gradalign")
    return [*map(co, labels), co("pgd-5", seeds=(0,))]


def variants_fashion_mini() -> list[Experiment]:
    """Forms of DER on FGSM at eps 0.22: where the energy is smoothed."""
    return [experiment(form, "fashion_co", FP32, regularizer="der", variant=form)
            for form in ("marginal", "linear", "ball")]


def ro_fashion_mini() -> list[Experiment]:
    """Robust overfitting on the bundled data: PGD-4 training on 250 images, with and without
    DER."""
    return [experiment(label, "fashion_ro", FP32) for label in ("pgd", "pgd + der")]


# Tuning looks at validation images only: the final evaluation is on a single test image.
tune = partial(experiment, preset="fashion_co", seeds=(100,),
               common=FP32 | dict(eval_size=300, final_size=1, strong_size=0))
STEPS = {"0.5 eps": 0.11, "0.75 eps": 0.165, "eps": 0.22, "1.25 eps": 0.275}


def tune_fashion_mini() -> list[Experiment]:
    """Three strengths of every method on one seed, eps 0.22: the one with the best PGD-10 accuracy
    on 300 validation images in the last epoch goes to fashion_mnist_short."""
    rows = [*product(("der segment", "der linear", "der ball"), (2, 8, 32)),
            *product(["elle"], (10, 50, 250)), *product(["gradalign"], (0.5, 2, 8))]
    return [*(tune(f"fgsm + {name}, lambda {weight}") for name, weight in rows),
            *(tune(f"n_fgsm, alpha {step}", alpha=STEPS[step]) for step in list(STEPS)[1:])]


def tune_n_fgsm_fashion_mini() -> list[Experiment]:
    """After the comparison of fashion_mnist_short: N-FGSM with more settings than any other method,
    its noise k as well as its step alpha, on the seed and the validation images of
    tune_fashion_mini; then DER (ball) on top of its best setting."""
    low, best, full = list(STEPS)[:3]
    rows = [(1, best), (1, full), (3, best), (3, full), (2, low), (0.5, low), (0.5, best),
            (0.5, full), (1, low), (1.5, low), (1.5, best), (1.5, full)]
    with_der = (f"n_fgsm, k 0.5, alpha 0.75 eps + der ball, lambda {weight}" for weight in (2, 8))
    return [*(tune(f"n_fgsm, k {k}, alpha {step}", alpha=STEPS[step]) for k, step in rows),
            *(tune(label, alpha=STEPS[best]) for label in with_der)]


# ---------------------------------------------------------------------------------- Fashion-MNIST
def fashion_mnist_short() -> list[Experiment]:
    """Catastrophic overfitting on 20,000 images of Fashion-MNIST at eps 0.22, 6 epochs: every
    method at the strength that tune_fashion_mini chose on validation images, fresh seeds, test
    images looked at once. About half an hour on two CPU cores."""
    short = partial(experiment, preset="fashion_mnist", common=FP32 | dict(
        train_size=20000, epochs=6, eps=0.22, width=8, eval_size=250, probe_size=64,
        final_size=2000, strong_size=1000))
    tuned, six = dict(k=0.5, alpha=0.165), (0, 1, 2, 3, 4, 5)
    # Three seeds more for the two best rows, whose ranges overlapped. The two rows with tuned noise
    # were added after a look at the others: the best of 15 settings on validation images, and on
    # top of it the better of two lambdas.
    return [short("fgsm"), short("fgsm + der ball", weight=8, seeds=six),
            short("fgsm + elle", weight=50), short("fgsm + der segment", weight=32),
            short("fgsm + der linear", weight=32), short("n_fgsm", alpha=0.165),
            short("fgsm + gradalign", weight=2),
            short("n_fgsm, tuned noise", **tuned, seeds=six),
            short("n_fgsm, tuned noise + der ball", **tuned, weight=2)]


def fashion_mnist() -> list[Experiment]:
    """Fashion-MNIST from its full set, small nets, for a CPU. CO: 30,000 images, eps 0.22, 15
    epochs, two seeds. RO: 2,000 images, eps 0.1, 60 epochs, one seed. A few CPU hours in all."""
    sizes = FP32 | dict(eval_size=250, probe_size=64, pgd50_size=500, autoattack_size=200)
    co = partial(experiment, preset="fashion_mnist", group="CO", seeds=(0, 1),
                 common=sizes | dict(train_size=30000, width=8, eps=0.22))
    ro = partial(experiment, preset="fashion_ro", group="RO", seeds=(0,), common=sizes | dict(
        dataset="fashion_mnist", train_size=2000, epochs=60, eps=0.1))
    single = ("fgsm", "n_fgsm", "fgsm + der ball", "fgsm + der linear", "fgsm + der segment",
              "fgsm + elle", "fgsm + gradalign")
    several = ("ro pgd-4", "ro pgd-4 + der segment", "ro pgd-4 + der ball", "ro trades-4")
    return [*map(co, single), co("pgd-5", seeds=(0,)), *map(ro, several),
            ro("ro pgd-4, EMA", ema=0.995)]


# --------------------------------------------------------------------------------------- CIFAR-10
def cifar10() -> list[Experiment]:
    """CIFAR-10, PreActResNet-18. A: catastrophic overfitting of FGSM, RS-FGSM and N-FGSM. B1: forms
    of DER, and ELLE, with lambda swept on validation images; B2: the finalists with three seeds.
    C: robust overfitting over 200 epochs."""
    one = partial(experiment, preset="cifar10", common=FORM)
    long = partial(experiment, preset="rice2020", common=FORM | dict(final_steps=10), group="C")
    once = partial(long, seeds=(0,))
    swept = partial(one, group="B1", seeds=(0,), pgd50_size=0, autoattack_size=0)
    radii, forms = ("16/255", "12/255", "8/255"), ("ball", "linear", "segment", "marginal")
    ders = [f"{m} + der {form}" for form, m in product(forms, ("fgsm", "rs_fgsm"))]
    lambdas = dict.fromkeys(ders, (2, 8, 32)) | {"fgsm + elle": (50, 500, 4000)}

    def final(name: str, eps: str) -> Experiment:
        at = "8/255" if eps == "8/255" else "16/255"
        return one(f"{name} eps {eps}", group="B2", sweep=f"{name} eps {at} lambda *")

    return [*(one(f"{m} eps {eps}", group="A")
              for m, eps in product(("fgsm", "rs_fgsm", "n_fgsm"), radii[::-1])),
            *(swept(f"{name} eps {eps} lambda {weight}")
              for name, eps in product(lambdas, radii[::2]) for weight in lambdas[name]),
            *(final(name, eps) for name, eps in product(ders[:-2], radii[:2])),
            *(final(name, "8/255") for name in ders[:-2]),
            *(final("fgsm + elle", eps) for eps in radii),
            *(one(f"fgsm + gradalign eps {eps}", preset="gradalign2020", group="B2")
              for eps in radii),  # lambda by the published formula, recipe of its authors
            *map(long, ("pgd-10", "pgd-10 + der segment", "pgd-10 + der ball")),
            *map(once, ("trades", "trades + der segment", "trades + der ball")),
            once("pgd-10, EMA", ema=0.999)]


SUITES = {make.__name__: Suite(" ".join(make.__doc__.split()), tuple(make()))
          for make in (cifar10, co_fashion_mini, fashion_mnist, fashion_mnist_short,
                       ro_fashion_mini, tune_fashion_mini, tune_n_fgsm_fashion_mini,
                       variants_fashion_mini)}
