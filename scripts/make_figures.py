"""Draw the reference figures of figures/ from the records of figures/records/ and the models that
come with the kit (no training).

    python scripts/make_figures.py [--out FOLDER]

Figures of suites that have no records yet are skipped, with a line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

matplotlib.use("Agg")

from derkit import plots  # noqa: E402
from derkit.checkpoint import load_pretrained  # noqa: E402
from derkit.config import GenerateConfig  # noqa: E402
from derkit.data import SPECS  # noqa: E402
from derkit.diagnosis.overfitting import co_alarms, summary  # noqa: E402
from derkit.generation.metrics import FLOOR, generation_summary, load_generation  # noqa: E402
from derkit.generation.sampler import sample  # noqa: E402
from derkit.records import load_tested, records_folder, title  # noqa: E402
from derkit.util import read_json  # noqa: E402

ROWS = ("fgsm", "fgsm + der norm", "fgsm + der ball")
CURVES = {  # file: suite, kind of overfitting, runs (co: the first seed of each, ro: all seeds)
    "collapse_fashion_mini": ("co_fashion_mini", "co", ROWS),
    "collapse_cifar10": ("co_cifar10", "co", ROWS),
    "collapse_preact": ("co_preact", "co", ("fgsm", "rs_fgsm", "rs_fgsm + der norm", "n_fgsm")),
    "ro_fashion_mini": ("ro_fashion_mini", "ro", ("pgd", "pgd + der norm", "trades")),
}
COLLAPSES = {"co_fashion_mini": "bundled images, eps 40/255", "co_cifar10": "CIFAR-10, eps 10/255",
             "co_cifar100": "CIFAR-100, eps 10/255",
             "co_preact": "CIFAR-10, PreActResNet-18, eps 16/255"}
GRIDS = {"fashion_mini": {"local": "local PCA, quantile stop",
                          "eccv24": "ECCV'24, eta 0.8, 20 steps"},
         "cifar10": {"noise": "noise, 60 steps", "blur": "PCA as published, 20 steps",
                     "local": "local PCA, tau .7, 20 steps"}}

FAILURES = {"cifar10": ("cat", "frog")}  # the classes that come out worst, by eye


def hero(folder: Path, suite: str = "co_cifar10") -> None:
    """Collapse and cure: accuracies and dE(x) of two runs on one axis, and in an inset the loss on
    the way of the training attack at their end (scripts/attack_paths.py)."""
    paths = read_json(records_folder() / "paths" / f"{suite}.json")["paths"]
    words = ("FGSM training collapses: by its own attack\nit seems to improve, and PGD breaks it",
             "The same training with DER (norm):\nthe two accuracies stay together")
    axes = plt.subplots(1, 2, figsize=(10.4, 4.1), sharey=True)[1]
    for axis, label, text in zip(axes, ROWS, words, strict=False):
        epochs, other = load_tested(suite)[label][0].epochs, axis.twinx()
        at, lines = epochs["epoch"], {
            "accuracy under FGSM, the training attack": (axis, "valid_fgsm", 0, "-"),
            "accuracy under PGD": (axis, "valid_pgd", 1, "--"),
            "mean dE(x) under PGD (right axis)": (other, "valid_pgd_dE", 3, ":")}
        drawn = [place.plot(at, epochs[column], style, color=plots.COLORS[i], lw=2, label=name)[0]
                 for name, (place, column, i, style) in lines.items()]
        axis.set(title=text, xlabel="epoch", ylim=(-0.02, 1.02))
        other.set(ylim=(-0.3, 15.3), ylabel="mean dE(x) = E(x) - E(x*)")
        other.grid(False)
        inset, path = axis.inset_axes([0.1, 0.39, 0.26, 0.28]), paths[title(label)]
        inset.plot(path["u"], np.subtract(path["ce"], path["ce"][0]), color="0.1")
        inset.axhline(0, color="0.5", lw=0.8)
        inset.set_title("change of the loss\nfrom x to x*, last epoch", fontsize=8)
        inset.set_ylim(-1.6, 0.6)
        inset.set_xticks([0, 1], ["x", "x*"])
        inset.tick_params(labelsize=8, pad=0)
    axes[0].set_ylabel("accuracy, validation images")
    axes[1].legend(handles=drawn, loc="upper right", fontsize=8)
    plt.savefig(folder / "collapse_and_cure.png")
    plt.close()


def tested(suite: str) -> dict[str, list]:
    """`load_tested`; nothing for a suite without records."""
    return load_tested(suite) if (records_folder() / suite).is_dir() else {}


def training(folder: Path) -> None:
    """Curves of single runs; all methods on all data sets; the alarms of all runs."""
    for file, (suite, kind, labels) in CURVES.items():
        groups = tested(suite)
        missing = [label for label in labels if label not in groups]
        if missing:
            print(f"skipped {file}.png: no records of {suite}: {', '.join(missing)}")
            continue
        runs = {title(label): groups[label] if kind == "ro" else groups[label][0]
                for label in labels}
        plots.overfitting_curves(runs, kind, save=folder / f"{file}.png")
    groups = {name: tested(suite) for suite, name in COLLAPSES.items() if tested(suite)}
    tables = {name: summary(runs) for name, runs in groups.items()}
    for suite, name in COLLAPSES.items():
        if name in tables:
            table = {name: tables[name]}
            plots.scoreboard(table, save=folder / f"scoreboard_{suite.removeprefix('co_')}.png")
    alarms = {name: pd.concat(co_alarms(run) for runs in group.values() for run in runs)
              for name, group in groups.items()}
    plots.alarm_leads(alarms, save=folder / "alarms.png")


def from_noise(folder: Path) -> None:
    """Ten chains from noise down E(x, y) of the CIFAR-10 model that comes with the kit."""
    labels, names = torch.arange(10), SPECS["cifar10"].classes
    noise = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    walk = GenerateConfig(stop="fixed", steps=60, eta=0.5, momentum=0.0)
    model = load_pretrained("cifar10-generator")
    chains = sample(model, noise, labels, labels, walk, frames_every=15)
    rows = {f"step {t}": x for t, x in zip(chains.frame_steps, chains.frames, strict=True)}
    plots.compare_sets(rows, labels, names, save=folder / "generation_from_noise_cifar10.png")


def curve(folder: Path, dataset: str = "cifar10") -> None:
    """Quality against variety: one dial at a time, from a base that is named once."""
    table = generation_summary(load_generation("curve", f"generation_{dataset}")).loc["L2"]
    base = "tau=1.0"
    dials = {"local PCA, tau": {"tau=0.4": "0.4", "tau=0.7": "0.7", base: "", "tau=1.3": "1.3"},
             "local PCA, k": {"k=8": "8", base: "", "k=128": "128"},
             "guidance w": {"w=0.0": "0", base: "tau 1, k 32, w 1", "w=10.0": "10"},
             "fixed steps": {f"fixed {n}": str(n) for n in (1, 4, 8, 16)},
             "global PCA, scale": {f"PCA scale={s}": str(s) for s in (0.5, 0.7, 1.0)}}
    curves = {name: table.loc[list(keys)].assign(setting=list(keys.values()))
              for name, keys in dials.items()}
    plots.trade_off(curves, "pairwise L2", "CFD", "setting", table.loc[FLOOR],
                    save=folder / f"generation_curve_{dataset}.png")


def two_classifiers(folder: Path, dataset: str = "cifar10") -> None:
    """The same starts, moved by a robust classifier and by a standard one."""
    found = {}
    for name, suffix in (("robust", ""), ("standard", "_standard")):
        file = records_folder() / f"generation_{dataset}" / f"pictures{suffix}.npz"
        if not file.is_file():
            return print(f"skipped generation_two_classifiers_{dataset}.png: no {file.name}")
        with np.load(file, allow_pickle=False) as arrays:
            found[name] = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    rows, labels = {}, found["robust"]["labels"]
    for word, key in (("noise", "noise, 60 steps"), ("local", "local PCA, tau .7, 20 steps")):
        rows[f"{word}: start"] = found["robust"][f"{key}: x0 only"]
        rows |= {f"{word}: {name}": images[key] for name, images in found.items()}
    plots.compare_sets(rows, labels, SPECS[dataset].classes,
                       save=folder / f"generation_two_classifiers_{dataset}.png")


def generation(folder: Path) -> None:
    """Sample grids from the images that scripts/generation_ablation.py --pictures keeps."""
    for dataset, grids in GRIDS.items():
        file = records_folder() / f"generation_{dataset}" / "pictures.npz"
        if not file.is_file():
            print(f"skipped generation_*_{dataset}.png: no pictures")
            continue
        with np.load(file, allow_pickle=False) as arrays:
            images = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        labels, names = images.pop("labels"), SPECS[dataset].classes
        path = {name: images.pop(name) for name in [*images] if name.startswith("between")}
        if path:
            rows = ("two horses, starts", "results", "horse and truck, starts", "results ")
            path = dict(zip(rows, path.values(), strict=True))
            words = [f"{i}/8" for i in range(9)]
            between = folder / f"generation_between_{dataset}.png"
            plots.compare_sets(path, torch.arange(9), words, save=between)
        compared = folder / f"generation_compare_{dataset}.png"
        plots.compare_sets(images, labels, names, save=compared)
        if dataset in FAILURES:
            worst = [names.index(name) for name in FAILURES[dataset]]
            few = torch.cat([(labels == c).nonzero()[:5, 0] for c in worst])
            words = [names[c] for c in labels[few]]
            rows = {key: images[key][few] for key in images if "x0" not in key}
            save = folder / f"generation_failures_{dataset}.png"
            plots.compare_sets(rows, torch.arange(len(few)), words, save=save)
        for name, key in grids.items():
            grid = folder / f"generation_{name}_{dataset}.png"
            plots.sample_grid(images[key], labels, names, title=key, save=grid)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=records_folder().parent)
    folder = parser.parse_args(argv).out
    plots.use_style()
    hero(folder)
    training(folder)
    from_noise(folder)
    generation(folder)
    two_classifiers(folder)
    curve(folder)
    print(*sorted(path.name for path in folder.glob("*.png")), sep="\n")


if __name__ == "__main__":
    main()
