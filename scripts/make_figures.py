"""Draw the reference figures of figures/ from the records of figures/records/ (no training).

    python scripts/make_figures.py
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

from derkit import gen_plots, plots, results  # noqa: E402
from derkit.data import load_dataset  # noqa: E402

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def generation() -> None:
    """Sample grids from the kept images; CFD of the recipes as bars is a table in notebook 04."""
    folder = results.records_folder() / "generation_fashion_mini"
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
    generation()
    for path in sorted(FIGURES.glob("*.png")):
        print(path.name)


if __name__ == "__main__":
    main()
