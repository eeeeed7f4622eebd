"""Draw the reference figures of figures/ from the records of figures/records/ (no training).

    python scripts/make_figures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from derkit import plots, results  # noqa: E402

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def main() -> None:
    plots.use_style()
    co = results.load_records("co_fashion_mini")
    first = {name: co[name][0] for name in ("fgsm", "n_fgsm", "fgsm + der")}
    plots.overfitting_curves(first, "co", save=FIGURES / "co_fashion_mini.png")
    plots.result_bars(results.summary(co), ["clean", "pgd", "strong"], save=FIGURES / "der_fashion_mini.png")
    ro = results.load_records("ro_fashion_mini")
    plots.overfitting_curves({name: runs[0] for name, runs in ro.items()}, "ro", save=FIGURES / "ro_fashion_mini.png")
    for path in sorted(FIGURES.glob("*.png")):
        print(path.name)


if __name__ == "__main__":
    main()
