"""Draw the reference figures of figures/ from the records of figures/records/ (no training).

    python scripts/make_figures.py [--out FOLDER]

Figures of suites that have no records yet are skipped, with a line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

from derkit import plots  # noqa: E402
from derkit.data import SPECS  # noqa: E402
from derkit.diagnosis.overfitting import summary  # noqa: E402
from derkit.records import by_eps, load_records, records_folder  # noqa: E402

CURVES = {  # file: suite, kind of overfitting, runs (the first seed of each)
    "co_fashion_mini": ("co_fashion_mini", "co", ("fgsm", "n_fgsm", "fgsm + der")),
    "ro_fashion_mini": ("ro_fashion_mini", "ro", ("pgd", "pgd + der")),
    "co_cifar10": ("cifar10", "co", ("fgsm eps 16/255", "n_fgsm eps 16/255",
                                     "fgsm + der segment eps 16/255")),
    "ro_cifar10": ("cifar10", "ro", ("pgd-10", "pgd-10 + der segment")),
    "co_fashion_mnist": ("fashion_mnist", "co", ("fgsm", "n_fgsm", "fgsm + der ball")),
    "ro_fashion_mnist": ("fashion_mnist", "ro", ("ro pgd-4", "ro pgd-4 + der segment")),
    "co_fashion_mnist_short": ("fashion_mnist_short", "co", ("fgsm", "n_fgsm", "fgsm + der ball")),
}
BY_EPS = {"pgd50_cifar10": ("cifar10", "pgd50", "PGD-50-10 accuracy"),
          "autoattack_cifar10": ("cifar10", "aa", "AutoAttack accuracy")}
GRIDS = {"generation_local_fashion_mini": "local PCA, quantile stop",
         "generation_eccv24_fashion_mini": "ECCV'24, eta 0.8, 20 steps"}


def records(suite: str) -> dict[str, list]:
    """The suite's runs by label; none where it has no records yet."""
    return load_records(suite) if (records_folder() / suite).is_dir() else {}


def training(folder: Path) -> None:
    """Curves of single runs, accuracies by radius, and DER beside the other methods."""
    for file, (suite, kind, labels) in CURVES.items():
        groups = records(suite)
        missing = [label for label in labels if label not in groups]
        if missing:
            print(f"skipped {file}.png: no records of {suite}: {', '.join(missing)}")
            continue
        runs = {label: groups[label][0] for label in labels}
        plots.overfitting_curves(runs, kind, save=folder / f"{file}.png")
    for file, (suite, metric, ylabel) in BY_EPS.items():
        table = by_eps(records(suite), metric)
        if table["eps"].nunique() < 2:
            print(f"skipped {file}.png: no records of {suite} with {metric} at two radii")
            continue
        plots.accuracy_by_eps(table, ylabel, save=folder / f"{file}.png")
    table = summary(load_records("co_fashion_mini"))
    plots.result_bars(table, ["clean", "pgd", "strong"], save=folder / "der_fashion_mini.png")


def generation(folder: Path) -> None:
    """Sample grids from the images that scripts/generation_ablation.py --pictures keeps."""
    file = records_folder() / "generation_fashion_mini" / "pictures.npz"
    if not file.is_file():
        print("skipped generation_*.png: no pictures in generation_fashion_mini")
        return
    with np.load(file, allow_pickle=False) as arrays:
        images = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    labels, names = images.pop("labels"), SPECS["fashion_mini"].classes
    compared = folder / "generation_compare_fashion_mini.png"
    plots.compare_sets(images, labels, names, save=compared)
    for name, key in GRIDS.items():
        plots.sample_grid(images[key], labels, names, title=key, save=folder / f"{name}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=records_folder().parent)
    folder = parser.parse_args(argv).out
    plots.use_style()
    training(folder)
    generation(folder)
    print(*sorted(path.name for path in folder.glob("*.png")), sep="\n")


if __name__ == "__main__":
    main()
