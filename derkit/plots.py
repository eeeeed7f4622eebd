"""Figures from records and arrays. Each function draws one figure, shows it and returns nothing.

``save=`` also writes it, save=False leaves it open. Lines differ in style and marker, for grey."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from torch import Tensor, nn

from derkit import records
from derkit.diagnosis import landscape, overfitting
from derkit.generation import generate, metrics, sampler
from derkit.records import Run
from derkit.util import pick

Save, Names = str | Path | bool | None, Sequence[str]
COLORS = sns.color_palette("colorblind", 60)  # repeats itself, as the others do
STYLES, MARKERS = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1))] * 10, [*"os^DvX"] * 10
SIDES = (5, 4, "left"), (-6, 4, "right"), (-5, -9, "right"), (0, 6, "center"), (-6, 4, "right")
ONSET = dict(color="0.2", lw=1, ls=(0, (2, 2)))
LABELS = dict(valid_fgsm="FGSM, valid", valid_pgd="PGD, valid", valid_clean="clean, valid",
              train_aae="share of AAEs, train", train_acc="training attack, train",
              probe_pgd="PGD, train", probe="training attack, train")
CURVES = dict(co=(["valid_fgsm", "valid_pgd", "train_acc", "train_aae"],
                  ["probe_dE", "valid_pgd_dE"]),
              ro=(["probe_pgd", "valid_pgd", "valid_clean"], ["probe_pgd_dE", "valid_pgd_dE"]))


def use_style() -> None:
    """The kit's look: white grid, small fonts, colour-blind palette."""
    more = {"figure.dpi": 100, "savefig.dpi": 150, "axes.titlesize": "medium",
            "legend.frameon": True, "figure.constrained_layout.use": True}
    sns.set_theme(style="whitegrid", palette="colorblind", font_scale=0.85, rc=more)


def _finish(save: Save, axes: Sequence[plt.Axes] = (), size: int = 8) -> None:
    """Put legends on those of the axes that have labels, write the figure if asked, show it."""
    for axis in axes:
        if axis.get_legend_handles_labels()[0] and not axis.get_legend():
            axis.legend(fontsize=size)
    if save:
        Path(save).parent.mkdir(parents=True, exist_ok=True)
        plt.savefig(save)
    if save is not False:
        plt.show()
        plt.close()


@contextmanager
def _panels(save: Save, width: float, height: float, titles: Names = ("",), size: int = 8,
            legends: int = 1, sharey: bool = False, across: int = 9,
            **settings: Any) -> Iterator[np.ndarray]:
    """Axes with titles, side by side; settings, legends (on the first) and the end come last."""
    across, down = min(across, len(titles)), -(-len(titles) // across)
    whole = (width * across, height * down)
    axes = plt.subplots(down, across, figsize=whole, squeeze=False, sharey=sharey)[1].ravel()
    for axis in axes[len(titles) :]:
        axis.remove()
    axes = axes[: len(titles)]
    yield axes
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, **settings)
    _finish(save, axes[:legends], size)


def _line(axis: plt.Axes, i: int, label: str, x: Any, y: Any, *band: Any) -> None:
    """The i-th line of a figure, with a band around it if (low, high) are given."""
    axis.plot(x, y, ls=STYLES[i], color=COLORS[i], marker=MARKERS[i], ms=3.5, label=label,
              markevery=max(1, len(x) // 12))
    if band:
        axis.fill_between(x, *band, color=COLORS[i], alpha=0.15)


def overfitting_curves(runs: Mapping[str, Any], kind: str = "co", save: Save = None) -> None:
    """Accuracy and dE over epochs, a column per `Run` or per list of runs (their mean and range).
    Kind 'co' marks the onset of the first, 'ro' the best epoch."""
    parts, size = pick("kind", kind, CURVES), (4.6 * len(runs), 5.2)
    names = list(dict.fromkeys(LABELS[c.removesuffix("_dE")] for part in parts for c in part))
    axes = plt.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False, figsize=size)[1]
    for (top, bottom), (title, group) in zip(axes.T, runs.items(), strict=True):
        group = [group] if isinstance(group, Run) else group
        for axis, columns in zip((top, bottom), parts, strict=True):
            for column in columns:
                v = pd.DataFrame([run.epochs.set_index("epoch")[column] for run in group])
                label = LABELS[column.removesuffix("_dE")]
                _line(axis, names.index(label), label, v.columns, v.mean(), v.min(), v.max())
        pgd = pd.DataFrame([run.epochs.set_index("epoch")["valid_pgd"] for run in group])
        mark, word = pgd.mean().idxmax(), "best on valid"
        if kind == "co":
            mark, word = getattr(overfitting.co_onset(group[0]), "epoch", None), "CO onset"
        if mark:
            top.axvline(mark, **ONSET)
            bottom.axvline(mark, **ONSET)
            top.annotate(word, (mark, 0.03), (3, 0), textcoords="offset points", fontsize=8)
        bottom.axhline(0, color="0.4", lw=0.8)
        bottom.set(xlabel="epoch")
        top.set(title=title, ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel("accuracy" + ", share" * (kind == "co"))
    axes[1, 0].set_ylabel("mean dE(x) = E(x) - E(x*)")
    _finish(save, axes[:, 0], size=7)


def signal_curves(run: Run, alarms: pd.DataFrame, save: Save = None) -> None:
    """The CO signals of a run; a solid line where one alarms, a dotted one at the onset."""
    lead = alarms["lead"].map(lambda n: "no alarm" if pd.isna(n) else f"{n:+.0f} epochs")
    with _panels(save, 2.4, 2.6, alarms["signal"] + ": " + lead, size=7, xlabel="epoch") as axes:
        for axis, row in zip(axes, alarms.itertuples(), strict=True):
            values = run.epochs[overfitting.SIGNALS[row.signal].column]
            axis.plot(run.epochs["epoch"], values, color="0.1", marker="o", ms=3)
            if pd.notna(row.alarm):
                axis.axvline(row.alarm, color=COLORS[3], lw=1.6, label="alarm")
            if pd.notna(row.onset):
                axis.axvline(row.onset, label="CO onset", **ONSET)
        axes[0].set_ylabel("value of the signal")


def scoreboard(tables: Mapping[str, pd.DataFrame], save: Save = None) -> None:
    """Clean and AutoAttack accuracy of every row of result tables (`overfitting.summary`), a panel
    per data set, the most robust row on top; error bars: the range over seeds."""
    tables = {name: table.sort_values("aa") for name, table in tables.items()}
    most, wide = max(map(len, tables.values())), dict(xlabel="accuracy, test images", xlim=(0, 0.9))
    with _panels(save, 5.2, 1.2 + 0.36 * most, list(tables), across=2, **wide) as axes:
        for axis, table in zip(axes, tables.values(), strict=True):
            at = np.arange(len(table))
            for i, (name, word) in enumerate(dict(clean="clean", aa="AutoAttack").items()):
                ends = table[[f"{name} min", f"{name} max"]].sub(table[name], axis=0).abs()
                bars = axis.barh(at + 0.2 - 0.4 * i, table[name], 0.4, xerr=ends.T, capsize=2,
                                 color=COLORS[i], hatch=["", "///"][i], edgecolor="0.2", label=word)
            axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=7)
            axis.set_yticks(at, [records.title(name) for name in table.index])
            axis.set_ylim(len(table) - most - 0.7, len(table) + 0.5)
        axes[0].legend(loc="upper right", ncols=2, fontsize=8)


def alarm_leads(tables: Mapping[str, pd.DataFrame], save: Save = None) -> None:
    """Lead of each signal's alarm over the onset of CO, a point per collapsed run, and how often it
    was missed or false; ``tables``: `co_alarms` of many runs in one, a panel per data set."""
    wide = dict(xlabel="lead over the onset, epochs (left of 0: too late)", ylim=(-0.7, 4.7))
    with _panels(save, 6.4, 2.9, list(tables), across=1, **wide) as axes:
        for axis, table in zip(axes, tables.values(), strict=True):
            for i, name in enumerate(overfitting.SIGNALS):
                rows = table[table["signal"] == name]
                bad, good = rows[rows["onset"].notna()], rows[rows["onset"].isna()]
                leads = np.sort(bad["lead"].dropna().to_numpy(float))
                spots = i + np.linspace(-0.3, 0.3, max(len(leads), 1))[: len(leads)]
                axis.plot(leads, spots, MARKERS[i], color=COLORS[i], ms=5)
                missed, false = bad["alarm"].isna().sum(), good["alarm"].notna().sum()
                words = f"missed {missed} of {len(bad)}, false {false} of {len(good)}"
                axis.annotate(words, (1.01, i), xycoords=("axes fraction", "data"), fontsize=9,
                              va="center")
            axis.set_yticks(range(len(overfitting.SIGNALS)), overfitting.SIGNALS)
            axis.axvline(0, **ONSET)


def energy_map(panels: Mapping[str, landscape.AttackEnergies], save: Save = None) -> None:
    """(E(x), E(x, y)) of natural and adversarial samples; on the diagonal the loss is 0. Arrows
    lead from x to x* for the first forty."""
    low = min(min(r.E.min(), r.E_adv.min()) for r in panels.values())
    high = max(max(r.E.max(), r.E_adv.max()) for r in panels.values())
    names = dict(xlabel="E(x)", ylabel="E(x, y)", sharey=True)
    with _panels(save, 4.4, 3.8, list(panels), **names) as axes:
        for axis, r in zip(axes, panels.values(), strict=True):
            axis.plot([low, high], [low, high], color="0.1", lw=1, ls="--", label="CE = 0")
            axis.scatter(r.E, r.Ey, s=8, c="0.65", marker="o", label="natural", lw=0)
            axis.plot(r.E_adv, r.Ey_adv, "x", c=COLORS[3], ms=3, mew=0.8, alpha=0.5, label=r.attack)
            moves = [v[:40] for v in (r.E, r.Ey, r.E_adv - r.E, r.Ey_adv - r.Ey)]
            axis.quiver(*moves, angles="xy", scale_units="xy", scale=1, width=0.004, headwidth=5,
                        zorder=3)


def delta_by_strength(table: pd.DataFrame, save: Save = None) -> None:
    """Mean dE(x) against attack strength in units of eps, a panel per model; columns model, attack,
    strength, dE(x). Several rows of one strength (seeds): their mean, and their range as a band."""
    models, ylabel = table["model"].unique(), "mean dE(x)  (> 0: the attack lowers E(x))"
    with _panels(save, 4.8, 3.4, models, xlabel="strength, in eps", ylabel=ylabel) as axes:
        for axis, model in zip(axes, models, strict=True):
            rows = table[table["model"] == model].groupby("attack", sort=False)
            for i, (attack, part) in enumerate(rows):
                found = part.groupby("strength")["dE(x)"].agg(["mean", "min", "max"])
                _line(axis, i, attack, found.index, *found.to_numpy().T)
            axis.axhline(0, color="0.3", lw=0.8)


def roc_curves(curves: Mapping[str, tuple], save: Save = None) -> None:
    """ROC of energy-based detectors: name -> `derkit.diagnosis.landscape.detection_roc`."""
    labels = dict(xlabel="share of natural images called adversarial",
                  ylabel="share of attacked images found")
    with _panels(save, 6.6, 4.2, **labels) as (axis,):
        for i, (name, (fpr, tpr, auc)) in enumerate(curves.items()):
            _line(axis, i, f"{name}: AUC {auc:.2f}", fpr, tpr)
        axis.plot([0, 1], [0, 1], color="0.5", lw=0.8)
        axis.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)


def energy_paths(paths: Mapping[str, dict], key: str = "E", save: Save = None) -> None:
    """Energy along x + u (x* - x), relative to x: mean over images, and their middle half."""
    label = dict(E="E(x_u) - E(x)", Ey="E(x_u, y) - E(x, y)", ce="CE(x_u) - CE(x)")[key]
    with _panels(save, 5.4, 3.5, xlabel="u on the path x + u (x* - x)", ylabel=label) as (axis,):
        for i, (name, path) in enumerate(paths.items()):
            rise = path[key] - path[key][0]
            _line(axis, i, name, path["u"], rise.mean(1), *np.quantile(rise, [0.25, 0.75], axis=1))
        axis.axvline(1, color="0.4", lw=0.8)


def filters(models: Mapping[str, nn.Module], save: Save = None) -> None:
    """The filters of each model's first convolution, a row per model; red raises, blue lowers."""
    first = {name: next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.detach()
             for name, model in models.items()}
    shape = len(first), max(map(len, first.values()))
    options = dict(squeeze=False, subplot_kw=dict(xticks=[], yticks=[]))
    axes = plt.subplots(*shape, figsize=(0.9 * shape[1] + 1.4, 0.95 * shape[0]), **options)[1]
    for line, (name, weights) in zip(axes, first.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis, weight in zip(line, weights.double().cpu().numpy().mean(1), strict=False):
            most = abs(weight).max()
            axis.imshow(weight, cmap="RdBu_r", vmin=-most, vmax=most)
            for (row, column), value in np.ndenumerate(weight):  # signs, for grey
                if abs(value) > most / 4:
                    word, strong = "+" if value > 0 else "\N{MINUS SIGN}", abs(value) > most / 2
                    axis.text(column, row, word, color="white" if strong else "0.2", fontsize=8,
                              ha="center", va="center")
            axis.set_xlabel(f"{abs(weight.sum()) / abs(weight).sum():.2f}", fontsize=7, labelpad=1)
    _finish(save)


def _mosaic(save: Save, rows: Sequence[tuple[str, Tensor]], top: Names = (), under: Names = (),
            title: str = "", size: float = 0.8) -> None:
    """Rows (label, images), with words above the first row and under the last."""
    columns = max(len(images) for _, images in rows)
    height = (size + 0.16 * bool(under)) * len(rows) + 0.5 * bool(top or title)
    options = dict(squeeze=False, subplot_kw=dict(xticks=[], yticks=[], frameon=False))
    axes = plt.subplots(len(rows), columns, figsize=(size * columns + 1, height), **options)[1]
    for line, (name, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis, image in zip(line, images, strict=False):
            white = 1 if image.is_floating_point() else 255
            axis.imshow(image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=white)
    for axis, word in zip(axes[0], top, strict=False):
        axis.set_title(word, fontsize=8)
    for axis, word in zip(axes[-1], under, strict=False):
        axis.set_xlabel(word, fontsize=7, labelpad=1)
    if title:
        plt.suptitle(title, fontsize=10)
    _finish(save)


def sample_grid(x: Tensor, y: Tensor, names: Names, title: str = "", save: Save = None) -> None:
    """A row per class with its first ten images: no selection."""
    rows = [(names[c], x[y == c][:10]) for c in y.unique().tolist()]
    _mosaic(save, rows, title=title, size=0.62)


def compare_sets(sets: dict[str, Tensor], labels: Tensor, names: Names, save: Save = None,
                 under: Names = ()) -> None:
    """The first ten images of each set (a model, an init, ...), the same samples in a column."""
    rows = [(name, images[:10]) for name, images in sets.items()]
    _mosaic(save, rows, [names[c] for c in labels[:10].tolist()], under)


def nearest_neighbours(samples: generate.Samples, train: Tensor, names: Names,
                       save: Save = None) -> None:
    """The first ten samples above their nearest training images, with the L2 distance."""
    distance, index = metrics.nearest_train(samples.images[:10], train)
    rows = [("sample", samples.images[:10]), ("nearest train", train[index.to(train.device)])]
    under = [f"L2 {d:.1f}" for d in distance.tolist()]
    _mosaic(save, rows, [names[c] for c in samples.labels[:10].tolist()], under)


def film_strip(chains: sampler.Chains, names: Names, n: int = 4, save: Save = None) -> None:
    """The first n chains, a column per recorded step (`Job.run` with ``frames_every``)."""
    rows = [(names[c], chains.frames[:, i]) for i, c in enumerate(chains.labels[:n].tolist())]
    _mosaic(save, rows, [f"step {t}" for t in chains.frame_steps])


def energy_traces(chains: sampler.Chains, reference: sampler.Reference, names: Names,
                  classes: Sequence[int] | None = None, save: Save = None) -> None:
    """E(x, y) of traced chains up to their stop, a panel per class; bands: 50, 90 % of real x."""
    classes = list(chains.labels.unique().tolist() if classes is None else classes)[:5]
    with _panels(save, 3.2, 3, [names[c] for c in classes], sharey=True, xlabel="step") as axes:
        for axis, c in zip(axes, classes, strict=True):
            q = np.quantile(reference.of(c).cpu().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
            axis.axhspan(q[0], q[4], color="0.9", zorder=0)
            axis.axhspan(q[1], q[3], color="0.78", zorder=0)
            axis.axhline(q[2], color="0.3", lw=1, ls=":")
            for i in (chains.labels == c).nonzero().flatten().tolist():
                values = chains.trace[: chains.steps[i] + 1, 0, i].cpu().numpy()
                axis.plot(values, color=COLORS[0], lw=0.9, alpha=0.8)
                axis.plot(len(values) - 1, values[-1], "o", color="0.1", ms=3)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("E(x, y)")


def distributions(sets: Mapping[str, Any], xlabel: str, save: Save = None) -> None:
    """Cumulative distributions of numbers, a line per set: energies of real images and samples, or
    the steps that chains took."""
    with _panels(save, 5.4, 3.2, xlabel=xlabel, ylabel="share at or below") as (axis,):
        for i, (name, values) in enumerate(sets.items()):
            v = np.sort(np.asarray(values, dtype=float))
            _line(axis, i, name, v, np.arange(1, len(v) + 1) / len(v))


def trade_off(curves: dict, x: str, y: str, word: str, floor: pd.Series, save: Save = None) -> None:
    """Columns y (log) over x of tables, a line a dial, points named by a third; dashed: real x."""
    with _panels(save, 6.4, 4.6, xlabel=x, ylabel=f"{y}, log scale") as (axis,):
        axis.set_yscale("log")
        for i, (name, table) in enumerate(curves.items()):
            axis.plot(table[x], table[y], color=COLORS[i], marker=MARKERS[i], label=name, ms=5)
            *shift, side = SIDES[i % 5]
            words = dict(textcoords="offset points", fontsize=7, ha=side, color=COLORS[i])
            for *place, text in table[[x, y, word]].itertuples(index=False):
                axis.annotate(str(text), place, shift, **words)
        axis.axvline(floor[x], color="0.3", ls="--", label=f"real images ({y} {floor[y]:.2f})")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
