"""Figures from records and arrays. Each function draws one figure, shows it and returns nothing (``save=`` writes a PNG).

Lines differ in style and marker as well as in colour, so that every figure reads in greyscale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from derkit.diagnosis import AttackEnergies, co_onset
from derkit.records import Run

STYLES = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "X"]
COLORS = sns.color_palette("colorblind")


def use_style() -> None:
    """The kit's look: white grid, small fonts, colour-blind palette."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.titlesize": "medium", "legend.frameon": True,
                         "figure.constrained_layout.use": True})


def _finish(figure: plt.Figure, save: str | Path | None) -> None:
    if save:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(save)
    plt.show()
    plt.close(figure)


def _line(axis: plt.Axes, x, y, i: int, label: str, **options) -> None:
    axis.plot(x, y, ls=STYLES[i % len(STYLES)], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ms=3.5,
              markevery=max(1, len(x) // 12), label=label, **options)


# ------------------------------------------------------------------------------------------------------- training
def overfitting_curves(runs: Mapping[str, Run], kind: str = "co", save: str | Path | None = None) -> None:
    """Accuracy and dE on one time axis, a column per run: the form of the paper's main figure.

    kind 'co': PGD and FGSM accuracy (validation), running adversarial training accuracy, dE(x) of the training attack.
    kind 'ro': PGD accuracy on training (probe) and validation images, and dE(x) of PGD on both.
    """
    top = {"co": [("valid_fgsm", "FGSM, valid"), ("valid_pgd", "PGD, valid"), ("train_acc", "training attack, train")],
           "ro": [("probe_pgd", "PGD, train"), ("valid_pgd", "PGD, valid"), ("valid_clean", "clean, valid")]}[kind]
    bottom = {"co": [("probe_dE", "training attack, train"), ("valid_pgd_dE", "PGD, valid")],
              "ro": [("probe_pgd_dE", "PGD, train"), ("valid_pgd_dE", "PGD, valid")]}[kind]
    figure, axes = plt.subplots(2, len(runs), figsize=(4.6 * len(runs), 5.2), sharex="col", sharey="row", squeeze=False)
    for column, (title, run) in enumerate(runs.items()):
        rows = run.epochs
        for axis, lines in ((axes[0, column], top), (axes[1, column], bottom)):
            for i, (key, label) in enumerate(lines):
                _line(axis, rows["epoch"], rows[key], i, label)
        axes[0, column].set(title=title, ylim=(-0.02, 1.02))
        axes[1, column].axhline(0, color="0.4", lw=0.8)
        axes[1, column].set(xlabel="epoch")
        onset = co_onset(run) if kind == "co" else None
        marks = [(onset.epoch, "CO onset")] if onset else []
        if kind == "ro":
            marks = [(int(rows["valid_pgd"].to_numpy().argmax()) + 1, "best on valid")]
        for epoch, text in marks:
            for axis in axes[:, column]:
                axis.axvline(epoch, color="0.2", lw=1, ls=(0, (2, 2)))
            axes[0, column].annotate(text, (epoch, 0.03), xytext=(3, 0), textcoords="offset points", fontsize=8)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("mean dE(x) = E(x) - E(x*)")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    _finish(figure, save)


def signal_curves(run: Run, alarms: pd.DataFrame, save: str | Path | None = None) -> None:
    """The four CO signals of a run over epochs; a solid vertical line where one alarms, a dotted one at the onset."""
    from derkit.alarms import SIGNALS

    figure, axes = plt.subplots(1, len(SIGNALS), figsize=(3.1 * len(SIGNALS), 2.7), sharex=True)
    for axis, (name, signal), (_, row) in zip(axes, SIGNALS.items(), alarms.iterrows(), strict=True):
        axis.plot(run.epochs["epoch"], run.epochs[signal.column], color="0.1", marker="o", ms=3)
        if pd.notna(row["alarm"]):
            axis.axvline(row["alarm"], color=COLORS[3], lw=1.6, label="alarm")
        if pd.notna(row["onset"]):
            axis.axvline(row["onset"], color="0.2", lw=1, ls=(0, (2, 2)), label="CO onset")
        axis.set(title=f"{name}: {row['verdict']}", xlabel="epoch")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    axes[0].set_ylabel("value")
    _finish(figure, save)


def compare_runs(groups: Mapping[str, Sequence[Run]], column: str, ylabel: str, save: str | Path | None = None) -> None:
    """One recorded column over epochs: a line per method (mean of its seeds) and a band from the lowest to the highest."""
    figure, axis = plt.subplots(figsize=(6.2, 3.6))
    for i, (name, runs) in enumerate(groups.items()):
        table = pd.concat([r.epochs.set_index("epoch")[column] for r in runs], axis=1)
        _line(axis, table.index, table.mean(axis=1), i, f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})")
        if len(runs) > 1:
            axis.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=COLORS[i % len(COLORS)], alpha=0.15)
    axis.set(xlabel="epoch", ylabel=ylabel)
    axis.legend(fontsize=8)
    _finish(figure, save)


def result_bars(table: pd.DataFrame, columns: Sequence[str], ylabel: str = "accuracy", save: str | Path | None = None) -> None:
    """Grouped bars of a result table (index: methods; columns: means, with '<column> min' and '<column> max' if there)."""
    figure, axis = plt.subplots(figsize=(1.3 + 1.2 * len(table), 3.4))
    width, hatches = 0.8 / len(columns), ["", "///", "...", "xx"]
    for i, column in enumerate(columns):
        x = np.arange(len(table)) + (i - (len(columns) - 1) / 2) * width
        values = table[column].to_numpy(float)
        error = None
        if f"{column} min" in table:
            error = np.abs(np.stack([values - table[f"{column} min"], table[f"{column} max"] - values]))
        axis.bar(x, values, width, label=column, color=COLORS[i], hatch=hatches[i % 4], edgecolor="0.2", yerr=error, capsize=3)
    axis.set_xticks(np.arange(len(table)), table.index, rotation=20, ha="right")
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8)
    _finish(figure, save)


def accuracy_by_eps(table: pd.DataFrame, ylabel: str = "accuracy", save: str | Path | None = None) -> None:
    """Accuracy against the radius, a line per method with its range over seeds; ``table`` from `derkit.results.by_eps`."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for i, (name, rows) in enumerate(table.groupby("method", sort=False)):
        _line(axis, rows["eps"].to_numpy(), rows["mean"].to_numpy(), i, name)
        axis.fill_between(rows["eps"], rows["min"], rows["max"], color=COLORS[i % len(COLORS)], alpha=0.15)
    axis.set(xlabel="eps / (1/255)", ylabel=ylabel, ylim=(-0.02, None), xticks=sorted(table["eps"].unique()))
    axis.legend(fontsize=7)
    _finish(figure, save)


# -------------------------------------------------------------------------------------------------------- energies
def energy_histograms(panels: Mapping[str, Sequence[AttackEnergies]], key: str = "E", save: str | Path | None = None) -> None:
    """Histograms of natural and adversarial energies, a panel per model; ``key`` 'E' for E(x), 'Ey' for E(x, y)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.2), squeeze=False)
    for axis, (title, results) in zip(axes[0], panels.items(), strict=True):
        series = {"natural": getattr(results[0], key)} | {r.attack: getattr(r, f"{key}_adv") for r in results}
        low, high = (np.quantile(np.concatenate(list(series.values())), q) for q in (0.002, 0.998))
        bins = np.linspace(low, high, 50)
        axis.hist(series["natural"], bins, color="0.8", label="natural", density=True)
        for i, (name, values) in enumerate(list(series.items())[1:]):
            axis.hist(values, bins, histtype="step", lw=1.6, ls=STYLES[i % 6], color=COLORS[i], label=name, density=True)
        axis.set(title=title, xlabel="E(x)" if key == "E" else "E(x, y)", ylabel="density")
    axes[0, 0].legend(fontsize=7)
    _finish(figure, save)


def energy_map(panels: Mapping[str, AttackEnergies], save: str | Path | None = None) -> None:
    """(E(x), E(x, y)) of natural and adversarial samples, a panel per model. On the diagonal the loss is 0: CE = E(x,y) - E(x)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False)
    for axis, (title, r) in zip(axes[0], panels.items(), strict=True):
        axis.scatter(r.E, r.Ey, s=8, c="0.55", marker="o", label="natural", alpha=0.6, lw=0)
        axis.scatter(r.E_adv, r.Ey_adv, s=12, c=[COLORS[3]], marker="x", label=r.attack, alpha=0.6, lw=0.8)
        ends = [min(r.E.min(), r.E_adv.min()), max(r.E.max(), r.E_adv.max())]
        axis.plot(ends, ends, color="0.1", lw=1, ls="--", label="CE = 0")
        axis.set(title=title, xlabel="E(x)", ylabel="E(x, y)")
    axes[0, 0].legend(fontsize=8)
    _finish(figure, save)


def delta_by_strength(table: pd.DataFrame, save: str | Path | None = None) -> None:
    """Mean dE(x) and dE(x, y) against eps; ``table`` has columns model, attack, eps, dE(x), dE(x,y)."""
    models = list(dict.fromkeys(table["model"]))
    figure, axes = plt.subplots(1, len(models), figsize=(4.8 * len(models), 3.4), squeeze=False)
    for axis, name in zip(axes[0], models, strict=True):
        for i, (attack, rows) in enumerate(table[table["model"] == name].groupby("attack", sort=False)):
            _line(axis, rows["eps"].to_numpy(), rows["dE(x)"].to_numpy(), i, attack)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.set(title=name, xlabel="eps", ylabel="mean dE(x)  (> 0: the attack lowers E(x))")
    axes[0, 0].legend(fontsize=8)
    _finish(figure, save)


def roc_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]], save: str | Path | None = None) -> None:
    """ROC of energy-based detectors: name -> (fpr, tpr, auc), from `derkit.diagnosis.detection_roc`."""
    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    for i, (name, (fpr, tpr, auc)) in enumerate(curves.items()):
        _line(axis, fpr, tpr, i, f"{name}: AUC {auc:.2f}")
    axis.plot([0, 1], [0, 1], color="0.5", lw=0.8)
    axis.set(xlabel="false positive rate", ylabel="true positive rate")
    axis.legend(fontsize=8)
    _finish(figure, save)


# ------------------------------------------------------------------------------------------------------ landscapes
def energy_paths(paths: Mapping[str, dict[str, np.ndarray]], key: str = "E", save: str | Path | None = None) -> None:
    """Energy along x + u (x* - x), relative to x: mean over images and the band from the 25 to the 75 % quantile."""
    figure, axis = plt.subplots(figsize=(5.4, 3.5))
    for i, (name, path) in enumerate(paths.items()):
        values = path[key] - path[key][0]
        _line(axis, path["u"], values.mean(1), i, name)
        axis.fill_between(path["u"], *np.quantile(values, [0.25, 0.75], axis=1), color=COLORS[i % len(COLORS)], alpha=0.15)
    label = {"E": "E(x_u) - E(x)", "Ey": "E(x_u, y) - E(x, y)", "ce": "CE(x_u) - CE(x)"}[key]
    axis.set(xlabel="u on the path x + u (x* - x)", ylabel=label)
    axis.axvline(1, color="0.4", lw=0.8)
    axis.legend(fontsize=8)
    _finish(figure, save)


def energy_slices(slices: Mapping[str, dict[str, np.ndarray]], key: str = "ce", save: str | Path | None = None) -> None:
    """Loss or energy on a plane around one image, a panel per model: x at the origin, x* at (1, 0)."""
    figure, axes = plt.subplots(1, len(slices), figsize=(3.9 * len(slices), 3.4), squeeze=False)
    for axis, (title, s) in zip(axes[0], slices.items(), strict=True):
        filled = axis.contourf(s["axis"], s["axis"], s[key], levels=14, cmap="viridis")
        axis.contour(s["axis"], s["axis"], s[key], levels=14, colors="k", linewidths=0.3)
        axis.plot([0, 1], [0, 0], "wo-", ms=6, mec="k", lw=1)
        axis.annotate("x", (0, 0), xytext=(-12, 6), textcoords="offset points", color="w", weight="bold")
        axis.annotate("x*", (1, 0), xytext=(5, 6), textcoords="offset points", color="w", weight="bold")
        axis.set(title=title, xlabel="along x* - x", ylabel="random sign direction")
        axis.grid(False)
        figure.colorbar(filled, ax=axis, label="CE" if key == "ce" else "E")
    _finish(figure, save)


def image_rows(rows: Mapping[str, np.ndarray], columns: int = 10, save: str | Path | None = None) -> None:
    """Rows of images (N, C, H, W) in [0, 1], a label before each row."""
    figure, axes = plt.subplots(len(rows), columns, figsize=(columns * 0.95 + 1, len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
        for axis in line:
            axis.axis("off")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    _finish(figure, save)
