"""Figures of generation, from arrays and records. Each function draws one figure, shows it and returns nothing.

``save=`` writes a file. Images are (n, C, H, W), uint8 or floats in [0, 1]; lines differ in style as well as in colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from derkit.metrics import nearest
from derkit.plots import COLORS, MARKERS, _finish, _line
from derkit.sampler import Chains
from derkit.samples import Samples
from derkit.targets import Reference

READINGS = ("E(x, y)", "E(x)", "p(y|x)")


def _picture(image: Tensor) -> np.ndarray:
    """(C, H, W) -> (H, W) or (H, W, 3), floats in [0, 1]."""
    x = image.detach().cpu()
    x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
    return (x[0] if len(x) == 1 else x.permute(1, 2, 0)).clamp(0, 1).numpy()


def _mosaic(rows: Sequence[Sequence[Tensor | None]], left: Sequence[str], top: Sequence[str] = (), title: str = "",
            size: float = 0.62, save: str | Path | None = None, under: Sequence[Sequence[str]] | None = None) -> None:
    """Rows of images, with words on the left, above, and under single images."""
    columns = max(map(len, rows))
    height = (size + 0.16 * bool(under)) * len(rows) + 0.5 * bool(top or title)
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=(size * columns + 1.0, height))
    for i, row in enumerate(rows):
        for j, axis in enumerate(axes[i]):
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if j < len(row) and row[j] is not None:
                axis.imshow(_picture(row[j]), cmap="gray", vmin=0, vmax=1)
            if i == 0 and j < len(top):
                axis.set_title(top[j], fontsize=8)
            if under and j < len(under[i]):
                axis.set_xlabel(under[i][j], fontsize=7, labelpad=1)
        axes[i, 0].set_ylabel(left[i], rotation=0, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    _finish(figure, save)


# ------------------------------------------------------------------------------------------------------- pictures
def sample_grid(images: Tensor, labels: Tensor, names: Sequence[str], columns: int = 10, title: str = "",
                save: str | Path | None = None) -> None:
    """A row per class with its first ``columns`` images: no selection."""
    classes = labels.unique().tolist()
    _mosaic([list(images[labels == c][:columns]) for c in classes], [names[c] for c in classes], title=title, save=save)


def start_and_result(samples: Samples, names: Sequence[str], n: int = 10, title: str = "",
                     save: str | Path | None = None) -> None:
    """The first n samples: x0 above, the result under it, with class and steps."""
    top, words = [names[c] for c in samples.labels[:n].tolist()], [f"{s} steps" for s in samples.steps[:n].tolist()]
    rows = [list(samples.x0[:n]), list(samples.images[:n])]
    _mosaic(rows, ["x0", "result"], top, title, size=0.8, save=save, under=[[""] * n, words])


def compare_sets(sets: Mapping[str, Tensor], labels: Tensor, names: Sequence[str], columns: int = 10, title: str = "",
                 save: str | Path | None = None) -> None:
    """A row per set of images (one model, one init, ...), the same samples in the same columns."""
    top = [names[c] for c in labels[:columns].tolist()]
    _mosaic([list(x[:columns]) for x in sets.values()], list(sets), top, title, size=0.8, save=save)


def film_strip(chains: Chains, names: Sequence[str], n: int = 4, save: str | Path | None = None) -> None:
    """Trajectories of the first n chains, a column per recorded step (`Job.run` with ``frames_every``)."""
    n = min(n, len(chains.labels))
    _mosaic([list(chains.frames[:, i]) for i in range(n)], [names[c] for c in chains.labels[:n].tolist()],
            [f"step {t}" for t in chains.frame_steps], size=0.8, save=save)


def save_gif(chains: Chains, path: str | Path, columns: int = 8, zoom: int = 3, milliseconds: int = 120) -> None:
    """The trajectories as a looping GIF, chains side by side; the last frame stays on for a second."""
    from PIL import Image

    pages = []
    for frame in chains.frames:
        tiles = [_picture(x) for x in frame]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
        sheet = np.concatenate([np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)])
        page = Image.fromarray((sheet * 255).round().astype(np.uint8))
        pages.append(page.resize((page.width * zoom, page.height * zoom), Image.Resampling.NEAREST))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    durations = [milliseconds] * (len(pages) - 1) + [1000]
    pages[0].save(path, save_all=True, append_images=pages[1:], loop=0, duration=durations)


def nearest_neighbours(samples: Samples, train: Tensor, names: Sequence[str], n: int = 10,
                       save: str | Path | None = None) -> None:
    """The first n samples above their nearest training images (L2 in pixels of [0, 1], written underneath)."""
    distance, index = nearest(samples.images[:n], train)
    top, words = [names[c] for c in samples.labels[:n].tolist()], [f"L2 {d:.1f}" for d in distance.tolist()]
    rows = [list(samples.images[:n]), list(train[index.to(train.device)])]
    _mosaic(rows, ["sample", "nearest train"], top, size=0.8, save=save, under=[[""] * n, words])


def interpolation(chains: Chains, save: str | Path | None = None) -> None:
    """`Job.between`: the starts between two local-PCA points above what they become."""
    top = [f"t={t:.2f}" for t in np.linspace(0, 1, len(chains.labels))]
    _mosaic([list(chains.x0), list(chains.x)], ["x0(t)", "result"], top, size=0.8, save=save)


# ------------------------------------------------------------------------------------------------------- energies
def energy_traces(chains: Chains, reference: Reference, names: Sequence[str], classes: Sequence[int] | None = None,
                  save: str | Path | None = None) -> None:
    """E(x, y) over the steps of every chain (`Job.run` with ``trace=True``), a panel per class, on the real
    quantiles: the dark band holds the middle half of the class's real images, the light one 90 %. A dot marks where a
    chain stopped."""
    classes = list(classes if classes is not None else chains.labels.unique().tolist())[:5]
    figure, axes = plt.subplots(1, len(classes), figsize=(3.0 * len(classes) + 0.6, 3.0), sharey=True, squeeze=False)
    trace, labels, steps = (t.cpu().numpy() for t in (chains.trace[:, 0], chains.labels, chains.steps))
    for axis, c in zip(axes[0], classes, strict=True):
        q = np.quantile(reference.of(c).cpu().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95])
        axis.axhspan(q[0], q[4], color="0.9", zorder=0)
        axis.axhspan(q[1], q[3], color="0.78", zorder=0)
        axis.axhline(q[2], color="0.3", lw=1, ls=":")
        for i in np.flatnonzero(labels == c):
            at = np.arange(steps[i] + 1)
            axis.plot(at, trace[: steps[i] + 1, i], color=COLORS[0], lw=0.9, alpha=0.8)
            axis.plot(steps[i], trace[steps[i], i], "o", color="0.1", ms=3)
        axis.set(title=names[c], xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("E(x, y)")
    _finish(figure, save)


def energy_histograms(sets: Mapping[str, np.ndarray | Tensor], xlabel: str = "E(x, y)",
                      save: str | Path | None = None) -> None:
    """Densities of energies as outlines: real images, starts, results."""
    figure, axis = plt.subplots(figsize=(5.6, 3.2))
    values = {k: np.asarray(v, dtype=float) for k, v in sets.items()}
    everything = np.concatenate(list(values.values()))
    count = int(np.clip(min(map(len, values.values())) / 12, 10, 40))  # fewer bins for few samples
    bins = np.linspace(*np.quantile(everything, [0.002, 0.998]), count)
    for i, (name, v) in enumerate(values.items()):
        density, _ = np.histogram(np.clip(v, bins[0], bins[-1]), bins, density=True)
        _line(axis, (bins[1:] + bins[:-1]) / 2, density, i, name)
    axis.set(xlabel=xlabel, ylabel="density", ylim=(0, None))
    axis.legend(fontsize=8)
    _finish(figure, save)


def steps_histogram(sets: Mapping[str, Samples], save: str | Path | None = None) -> None:
    """Share of chains that are still moving after each number of steps: what adaptive stopping saves is above the
    line."""
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    most = max(int(s.steps.max()) for s in sets.values())
    at = np.arange(most + 1)
    for i, (name, s) in enumerate(sets.items()):
        moving = [(s.steps > t).double().mean().item() for t in at]
        _line(axis, at, moving, i, f"{name}: {s.steps.double().mean():.1f} on average")
    axis.set(xlabel="step", ylabel="share of chains still moving", ylim=(-0.02, 1.02))
    axis.legend(fontsize=8)
    _finish(figure, save)


# -------------------------------------------------------------------------------------------------------- metrics
def trade_off(curves: Mapping[str, pd.DataFrame], x: str, y: str, label: str, floor: pd.Series | None = None,
              save: str | Path | None = None) -> None:
    """Quality against diversity: a line per dial (rows of a metrics table in order; column ``label`` names the
    points), with the real images' row as dashed lines."""
    figure, axis = plt.subplots(figsize=(5.8, 4.0))
    for i, (name, table) in enumerate(curves.items()):
        axis.plot(table[x], table[y], color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], label=name, ms=5)
        at, side = [((5, 4), "left"), ((5, -9), "left"), ((-5, -9), "right"), ((-5, 4), "right")][i % 4]  # lines meet: keep words apart
        for _, row in table.iterrows():
            axis.annotate(str(row[label]), (row[x], row[y]), xytext=at, textcoords="offset points", fontsize=7, ha=side,
                          color=COLORS[i % len(COLORS)])
    if floor is not None:
        axis.axvline(floor[x], color="0.3", ls="--", lw=1, label="real images")
        axis.axhline(floor[y], color="0.3", ls="--", lw=1)
    axis.set(xlabel=x, ylabel=y)
    axis.legend(fontsize=8)
    _finish(figure, save)


def class_bars(per_class: pd.DataFrame, column: str, sets: Sequence[str], save: str | Path | None = None) -> None:
    """One column of the per-class table as grouped bars."""
    classes = per_class.loc[sets[0]].index
    figure, axis = plt.subplots(figsize=(1.5 + 0.75 * len(classes), 3.2))
    width, hatches = 0.8 / len(sets), ["", "///", "...", "xx"]
    for i, name in enumerate(sets):
        at = np.arange(len(classes)) + (i - (len(sets) - 1) / 2) * width
        axis.bar(at, per_class.loc[name].loc[classes, column], width, label=name, color=COLORS[i % len(COLORS)],
                 hatch=hatches[i % 4], edgecolor="0.2")
    axis.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
    axis.set_ylabel(column)
    axis.legend(fontsize=8, ncols=len(sets), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _finish(figure, save)
