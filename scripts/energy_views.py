"""How attacks move E(x) and E(x, y), from weak to strong: standard and robust networks, seeds.

    python -m scripts.energy_views                 # writes figures/records/energy_views/NAME.json
    python -m scripts.energy_views fashion_mini    # one data set

One layer, 30 epochs, as in the suites of collapses: standard training, and PGD-7 for contrast,
three seeds each. 500 test images; strength: radius in units of eps at 20 steps, and steps at eps.
"""

import sys
from itertools import product

import pandas as pd

from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis import landscape
from derkit.records import environment, records_folder
from derkit.training.loop import train
from derkit.util import choose_device, pick, write_json

DATA = {"fashion_mini": dict(preset="fashion_co", eps="0.1"),
        "cifar10": dict(preset="cifar10_co")}
KINDS = dict(standard=dict(method="standard"), robust=dict(method="pgd", steps=7))
SEEDS = (0, 1, 2)
LATE = dict(eval_from=0.9, strong_size=0)
RADII, STEPS = (0.25, 0.5, 1, 2, 4), (1, 5, 100)
ATTACKS = ("FGSM", "PGD", "PGD to least likely", "PGD to random class")


def table(model, test, eps: float) -> pd.DataFrame:
    """A row for every attack, radius and number of steps."""
    grid = [(attack, radius, 20) for attack in ATTACKS for radius in RADII]
    grid += [(attack, 1, steps) for attack in ATTACKS[1:] for steps in STEPS]
    rows = []
    for attack, radius, steps in grid:
        more = {} if attack == "FGSM" else dict(steps=steps)
        found = landscape.attack_energies(model, test, radius * eps, attack, **more)
        rows.append(landscape.energy_table([found]).assign(radius=radius, steps=steps))
    return pd.concat(rows)


def main(names: list[str]) -> None:
    for name in names or DATA:
        values, parts, runs = pick("data set", name, DATA), [], {}
        for (kind, own), seed in product(KINDS.items(), SEEDS):
            config = TrainConfig.make(**(values | own | LATE), seed=seed)
            data = load_dataset(config.dataset, train_size=config.train_size)
            run = train(config, data)
            found = table(run.model().double(), data.test.take(slice(500)), config.eps)
            parts.append(found.assign(model=kind, seed=seed).drop(columns="eps"))
            reached = {key: run.final["last"][key] for key in ("clean", "pgd")}
            reached["train_acc"] = run.epochs["train_acc"].iloc[-1]
            runs[f"{kind}, seed {seed}"] = reached
        rows = pd.concat(parts).round(4)
        env = environment(choose_device("auto"), "fp32", "attacks in float64")
        write_json(records_folder() / "energy_views" / f"{name}.json", dict(
            config=values | LATE | dict(kinds=KINDS, seeds=SEEDS), data_sha256=data.sha256,
            env=env, runs=runs,
            rows=rows.astype(object).where(rows.notna(), None).to_dict("records")))
        print(rows.groupby(["model", "attack", "radius", "steps"])["dE(x)"].mean().to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
