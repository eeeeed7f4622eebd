"""The tables of docs/results.md, written from the records.

    python -m experiments.results

Text stays; what stands between '<!-- TABLE SUITES -->' and '<!-- end -->' is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from derkit.config import AUTO, TrainConfig
from derkit.diagnosis.overfitting import SIGNALS, Signal, alarm_summary, co_onset
from derkit.generation.metrics import CEILING, FLOOR, X0, generation_summary, load_generation
from derkit.records import Run, load_costs, load_records, load_tested, records_folder, title
from derkit.util import read_json
from experiments.claims import Records, compare, counts, duels, scorecard
from experiments.suites import RO_SETTINGS, SUITES, TUNED, settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
SIGNS = dict(weight="lambda")
GENERATED = ("recipe", "cifar10", "cifar10_standard")  # parts of generation_ablation.py
DISTANCES = ("CFD", "Lite0 FD", "FID")  # shown for the starts alone, too
COLUMNS = ("agreement", "recall", "pairwise L2", "nearest-train L2", "near copies")
KERNEL, COVER = ("CKD", "Lite0 KD"), ("precision", "recall", "Lite0 precision", "Lite0 recall")


def cell(values: Sequence[float], spread: bool = False) -> str:
    """'0.45', or with its standard error and range over seeds '0.45 ± 0.01 [0.43, 0.47]'."""
    text = f"{np.mean(values):.3f}"
    if spread and len(values) > 1:
        error = np.std(values, ddof=1) / len(values) ** 0.5
        text += f" ± {error:.3f} [{min(values):.3f}, {max(values):.3f}]"
    return text


def chosen(label: str, run: Run) -> str:
    """The settings that were tuned, in words: 'lambda 2'."""
    train = run.config["train"]
    options = (settings(train["eps"]) | RO_SETTINGS).get(label.removesuffix(", tuned"), [{}])
    words = []
    for name in (name for name in TUNED if name in options[0]):
        value = TrainConfig.read(train).strength if name == "weight" else train[name]
        if value == AUTO:
            words.append("published step")
            continue
        scaled = train["eps"] if name == "alpha" else 1
        unit = " eps" if name == "alpha" else ""
        words.append(f"{SIGNS.get(name, name)} {value / scaled:.4g}{unit}")
    return ", ".join(words) or "-"


def markdown(table: pd.DataFrame) -> str:
    """A table with its index as the first column."""
    rows = [[table.index.name or "", *table.columns], ["---"] * (1 + len(table.columns))]
    rows += [[name, *map(str, row)] for name, *row in table.itertuples()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# ------------------------------------------------------------------------------------- the tables
def rows(suite: str) -> pd.DataFrame:
    """Every row of a suite, the most robust first."""
    costs, found = load_costs(suite), {}
    for label, runs in load_tested(suite).items():
        last = pd.DataFrame([run.final["last"] for run in runs])
        collapsed = sum(co_onset(run) is not None for run in runs)
        found[title(label)] = {
            "settings": chosen(label, runs[0]), "collapsed": f"{collapsed} of {len(runs)}",
            "clean": cell(last["clean"]), "PGD-50-10": cell(last["pgd50"]),
            "strong": cell(last["strong"]), "AutoAttack": cell(last["aa"], True),
            "cost": f"{costs[label]:.1f}" if label in costs else "-", "order": last["aa"].mean()}
    table = pd.DataFrame.from_dict(found, orient="index").sort_values("order", ascending=False)
    return table.drop(columns="order").rename_axis("method")


def ranking(*suites: str) -> pd.DataFrame:
    """The rows of suites in one line each, by AutoAttack: ' = ' where a row ties with the next."""
    found = {}
    for suite in suites:
        records = Records(suite)
        values = {label: records.values(label, "aa").dropna() for label in load_tested(suite)}
        order = sorted(values, key=lambda label: -values[label].mean())
        found[suite] = text = []
        for label, after in zip(order, [*order[1:], None], strict=True):
            seeds = " (one seed)" * (len(values[label]) == 1)
            tie = after and compare(values[label], values[after])[0] != "PASS"
            text.append(f"{title(label)} {values[label].mean():.3f}{seeds}{' = ' if tie else ', '}")
    lines = {suite: "".join(text).rstrip(", ") for suite, text in found.items()}
    return pd.DataFrame({"best first": lines}).rename_axis("suite")


def tuning(suite: str) -> pd.DataFrame:
    """Every setting that was tried: PGD accuracy on validation images; the best in bold."""
    tried: dict[str, dict[str, float]] = {}
    for label, runs in load_records(suite).items():
        row, _, values = label.partition(": ")
        if values:
            reached = [run.epochs["valid_pgd"].tail(3).mean() for run in runs]
            tried.setdefault(row, {})[chosen(row, runs[0])] = float(np.mean(reached))
    found = {}
    for row, values in tried.items():
        best = max(values, key=values.get)
        words = [f"**{name}: {value:.3f}**" if name == best else f"{name}: {value:.3f}"
                 for name, value in values.items()]
        found[title(row)] = {f"setting {i}": word for i, word in enumerate(words, 1)}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("method")


MARGINS = {f"dE(x), {attack}, margin {margin:g}": Signal(column, 0, margin)
           for attack, column in {"one step": "probe_dE", "PGD": "valid_pgd_dE"}.items()
           for margin in (0.5, 0.2, 0.05)}


def alarms(*suites: str, signals: dict[str, Signal] = SIGNALS) -> pd.DataFrame:
    """Lead time and false alarms of every signal, a row per data set and signal."""
    parts = []
    for suite in suites:
        runs = [run for group in load_tested(suite).values() for run in group]
        parts.append(alarm_summary(runs, signals).assign(suite=suite))
    table = pd.concat(parts).set_index("signal").rename_axis("signal")
    table["median lead"] = [f"{lead:g}" if np.isfinite(lead) else "-"
                            for lead in table["median lead"]]
    return table[["suite", "in time", "rang", "median lead", "false alarms"]]


def collapses(*suites: str) -> pd.DataFrame:
    """What became of dE(x) in every run that collapsed: mean under PGD, validation images."""
    found = []
    for suite in suites:
        for label, runs in load_tested(suite).items():
            for run, onset in ((run, co_onset(run)) for run in runs):
                if onset:
                    moved, aae = (run.epochs[name] for name in ("valid_pgd_dE", "train_aae"))
                    found.append({
                        "run": f"{title(label)}, seed {run.config['train']['seed']}",
                        "suite": suite, "PGD at its best": f"{onset.peak:.2f}",
                        "onset": onset.epoch,
                        "dE(x) 3 epochs before": f"{moved[max(onset.epoch - 4, 0)]:+.2f}",
                        "at onset": f"{moved[onset.epoch - 1]:+.2f}",
                        "at the end": f"{moved.iloc[-1]:+.2f}",
                        "AAE at the end": f"{aae.iloc[-1]:.2f}"})
    return pd.DataFrame(found).set_index("run")


def robust(suite: str) -> pd.DataFrame:
    """Best against last epoch of long PGD training, the strongest last epoch first."""
    found = {}
    for label, runs in load_tested(suite).items():
        best, last = (pd.DataFrame([run.final[name] for run in runs]) for name in ("best", "last"))
        found[title(label)] = {
            "settings": chosen(label, runs[0]), "clean": cell(last["clean"]),
            "PGD-20, best": cell(best["pgd"]), "PGD-20, last": cell(last["pgd"]),
            "strong, best": cell(best["strong"]), "strong, last": cell(last["strong"], True),
            "strong, fall": cell(best["strong"] - last["strong"], True),
            "order": last["strong"].mean()}
    table = pd.DataFrame.from_dict(found, orient="index").sort_values("order", ascending=False)
    return table.drop(columns="order").rename_axis("method")


def same(suite: str) -> pd.DataFrame:
    """The strong suite and AutoAttack on the same images, where scripts/same_images.py ran them."""
    found = {}
    every = pd.DataFrame(read_json(records_folder() / suite / "same_images.json")["rows"])
    for label, part in every.groupby("label", sort=False):
        more = (part["aa"] - part["strong"]).mean()
        found[title(label)] = {
            "seeds": len(part), "images": part["images"].iloc[0], "strong": cell(part["strong"]),
            "AutoAttack": cell(part["aa"]), "AutoAttack - strong": f"{more:+.3f}"}
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("method")


def energies(folder: str) -> pd.DataFrame:
    """dE(x) by strength at 20 steps: mean over images and seeds, with the range over seeds; and at
    the data set's eps the shares of images fooled and moved to the target."""
    found = {}
    for path in sorted((records_folder() / folder).glob("*.json")):
        every = pd.DataFrame(read_json(path)["rows"])
        every = every[every["steps"] == 20]
        for (model, attack), part in every.groupby(["model", "attack"], sort=False):
            cells = {f"{radius:g} eps": f"{v.mean():+.2f} [{v.min():+.2f}, {v.max():+.2f}]"
                     for radius, v in part.groupby("radius")["dE(x)"]}
            one = part[part["radius"] == 1]
            arrived = one["reached"].astype(float).mean()
            cells |= {"fooled": f"{one['fooled'].mean():.2f}",
                      "at the target": f"{arrived:.2f}" if np.isfinite(arrived) else "-"}
            found[f"{path.stem}, {model}, {attack}"] = cells
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("data, network, attack")


def distance(value: float) -> str:
    """Two digits behind the point, one from ten on."""
    return f"{value:.{2 if value < 10 else 1}f}"


def generation(folder: str, parts: tuple[str, ...] = GENERATED,
               distances: tuple[str, ...] = DISTANCES,
               columns: tuple[str, ...] = COLUMNS) -> pd.DataFrame:
    """Every recipe of records of generation, its starts alone beside it: distances by every judge
    (mean and range over seeds), and what tells variety from copying."""
    found = []
    for record in (load_generation(part, folder) for part in parts
                   if (records_folder() / folder / f"{part}.json").is_file()):
        means, every = generation_summary(record), pd.DataFrame(record["rows"])
        models = list(dict.fromkeys(means.index.get_level_values("model")))
        real = [(models[0], FLOOR), (models[0], CEILING)] * (not found)  # the same for all
        for model, key in [*real, *product(models, record["settings"])]:
            row = means.loc[model].loc[key]
            start = means.loc[model].loc[key if (model, key) in real else key + X0]
            cells = dict(classifier="-" if (model, key) in real else model, recipe=key)
            for judge in (name for name in distances if name in means):
                values = every.loc[(every["model"] == model) & (every["images"] == key), judge]
                ends = f" [{distance(values.min())}, {distance(values.max())}]"
                cells |= {f"{judge}, start": distance(start[judge]),
                          judge: distance(values.mean()) + ends * (len(values) > 1)}
            cells |= {name: f"{row[name]:.2f}" for name in columns}
            found.append(cells | {"steps": f"{row['steps']:.1f}".replace("nan", "-")})
    return pd.DataFrame(found).fillna("-").set_index("classifier")


def claims(*suites: str) -> pd.DataFrame:
    """The verdict of every claim of the suites."""
    table = scorecard(suites)
    table["run"] = table["run"].map(title)
    return table.set_index("claim")[["suite", "run", "ours", "verdict"]]


def gains(*suites: str) -> pd.DataFrame:
    """What the claims compare, by AutoAttack and by the strong suite: paired difference over seeds
    with its standard error, and the verdict that it would get."""
    found = {}
    for metric, name in dict(aa="AutoAttack", strong="strong").items():
        for row in duels(suites, metric).itertuples():
            text = f"{row.gain:+.4f} ± {row.bar / 2:.4f}"
            word = dict(PASS="more", TIE="tie", FAIL="less").get(row.verdict, row.verdict)
            key = row.suite, title(row.run), title(row.than)
            found.setdefault(key, {})[name] = f"{text}, {word}"
    table = pd.DataFrame.from_dict(found, orient="index").rename_axis(["suite", "run", "than"])
    return table.sort_index(level="suite", sort_remaining=False).reset_index().set_index("suite")


def verdicts() -> pd.DataFrame:
    """How many claims have which verdict, over all suites."""
    return pd.DataFrame([counts(scorecard())], index=["claims"])


TABLES = dict(ranking=ranking, rows=rows, tuning=tuning, alarms=alarms, collapses=collapses,
              robust=robust, same=same, energies=energies, generation=generation,
              claims=claims, gains=gains, verdicts=verdicts,
              curve=partial(generation, parts=("curve",)), margins=partial(alarms, signals=MARGINS),
              judges=partial(generation, distances=KERNEL, columns=COVER))
BLOCK = re.compile(rf"(<!-- ({'|'.join(TABLES)}) ?([\w ]*) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """A page with its tables written anew; those of suites without tested runs stay empty."""

    def block(match: re.Match) -> str:
        there = [name for name in match[3].split() if (records_folder() / name).is_dir()]
        suites = [name for name in there if name not in SUITES or load_tested(name)]
        if match[3] and not suites:
            return f"{match[1]}Not run yet.\n\n"
        return f"{match[1]}{markdown(TABLES[match[2]](*suites))}\n"

    return BLOCK.sub(block, text)


def main() -> None:
    text = PAGE.read_text()
    PAGE.write_text(render(text))
    print(f"{PAGE}: {len(BLOCK.findall(text))} tables")


if __name__ == "__main__":
    main()
