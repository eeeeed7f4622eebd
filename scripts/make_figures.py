"""Draw the reference figures of figures/ from the records of figures/records/ (no training).

    python scripts/make_figures.py

Figures of suites that have no records yet are skipped, with a line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

from derkit import gen_plots, plots, results  # noqa: E402
from derkit.data import load_dataset  # noqa: E402
from derkit.errors import DerkitError  # noqa: E402
from derkit.records import Run  # noqa: E402

FIGURES = Path(__file__).resolve().parents[1] / "figures"
CURVES = {  # file: suite, kind of overfitting, runs (the first seed of each)
    "co_cifar10.png": ("cifar10", "co", ("fgsm eps 16/255", "n_fgsm eps 16/255", "fgsm + der segment eps 16/255")),
    "ro_cifar10.png": ("cifar10", "ro", ("pgd-10", "pgd-10 + der segment")),
    "co_fashion_mnist.png": ("fashion_mnist", "co", ("fgsm", "n_fgsm", "fgsm + der ball")),
    "ro_fashion_mnist.png": ("fashion_mnist", "ro", ("ro pgd-4", "ro pgd-4 + der segment")),
    "co_fashion_mnist_short.png": ("fashion_mnist_short", "co", ("fgsm", "n_fgsm", "fgsm + der ball")),
}
BY_EPS = {"pgd50_cifar10.png": ("cifar10", "pgd50", "PGD-50-10 accuracy"),
          "autoattack_cifar10.png": ("cifar10", "aa", "AutoAttack accuracy")}


def records(suite: str) -> Mapping[str, Sequence[Run]]:
    try:
        return results.load_records(suite)
    except DerkitError:
        return {}


def draw_suites(groups: Mapping[str, Mapping[str, Sequence[Run]]], folder: Path) -> None:
    """Every figure of CURVES and BY_EPS whose runs are there; ``groups``: suite -> label -> runs."""
    for file, (suite, kind, labels) in CURVES.items():
        missing = [label for label in labels if label not in groups.get(suite, {})]
        if missing:
            print(f"skipped {file}: no records of {suite}: {', '.join(missing)}")
            continue
        plots.overfitting_curves({label: groups[suite][label][0] for label in labels}, kind, save=folder / file)
    for file, (suite, metric, ylabel) in BY_EPS.items():
        table = results.by_eps(groups.get(suite, {}), metric)
        if table["eps"].nunique() < 2:
            print(f"skipped {file}: no records of {suite} with {metric} at two radii")
            continue
        plots.accuracy_by_eps(table, ylabel, save=folder / file)


def generation() -> None:
    """Sample grids from the kept images; CFD of the recipes as bars is a table in notebook 04."""
    folder = results.records_folder() / "generation_fashion_mini"
    if not (folder / "pictures.npz").is_file():
        print("skipped generation_*.png: no pictures in generation_fashion_mini")
        return
    with np.load(folder / "pictures.npz", allow_pickle=False) as z:
        images = {k: torch.from_numpy(z[k]) for k in z.files}
    labels = images.pop("labels")
    names = load_dataset("fashion_mini").classes
    gen_plots.compare_sets(images, labels, names, save=FIGURES / "generation_compare_fashion_mini.png")
    for part, key in (("local", "local PCA, quantile stop"), ("eccv24", "ECCV'24, eta 0.8, 20 steps")):
        gen_plots.sample_grid(images[key], labels, names, title=key, save=FIGURES / f"generation_{part}_fashion_mini.png")


def main() -> None:
    plots.use_style()
    co = results.load_records("co_fashion_mini")
    first = {name: co[name][0] for name in ("fgsm", "n_fgsm", "fgsm + der")}
    plots.overfitting_curves(first, "co", save=FIGURES / "co_fashion_mini.png")
    plots.result_bars(results.summary(co), ["clean", "pgd", "strong"], save=FIGURES / "der_fashion_mini.png")
    ro = results.load_records("ro_fashion_mini")
    plots.overfitting_curves({name: runs[0] for name, runs in ro.items()}, "ro", save=FIGURES / "ro_fashion_mini.png")
    draw_suites({suite: records(suite) for suite in ("cifar10", "fashion_mnist", "fashion_mnist_short")}, FIGURES)
    generation()
    for path in sorted(FIGURES.glob("*.png")):
        print(path.name)


if __name__ == "__main__":
    main()
