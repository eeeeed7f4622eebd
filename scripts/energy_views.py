"""How attacks move E(x) and E(x, y), from weak to strong: standard and robust networks, seeds.

    python -m scripts.energy_views                 # writes figures/records/energy_views/NAME.json
    python -m scripts.energy_views fashion_mini    # one data set

small_cnn of width 16: standard training until it fits its images, PGD-7 training for contrast.
1,000 test images; strength: radius in units of the data set's eps, at 20 steps, and steps at eps.
"""

import sys

import pandas as pd

from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis import landscape
from derkit.records import environment, records_folder
from derkit.training.loop import train
from derkit.util import choose_device, pick, write_json

COMMON = dict(preset="fashion_mini", width=16, precision="fp32", train_size=3000, eval_size=256,
              probe_size=64, strong_size=0, epochs=40)
DATA = {"fashion_mini": COMMON | dict(eps="0.1"),
        "cifar10": COMMON | dict(dataset="cifar10", eps="8/255", train_size=5000)}
KINDS = {"standard": (dict(method="standard"), (0, 1, 2)),
         "robust": (dict(method="pgd", steps=7), (0, 1))}
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
        for kind, (own, seeds) in KINDS.items():
            for seed in seeds:
                config = TrainConfig.make(**(values | own), seed=seed)
                data = load_dataset(config.dataset, train_size=config.train_size)
                run = train(config, data)
                found = table(run.model(), data.test.take(slice(1000)), config.eps)
                parts.append(found.assign(model=kind, seed=seed).drop(columns="eps"))
                reached = {key: run.final["last"][key] for key in ("clean", "pgd")}
                reached["train_acc"] = run.epochs["train_acc"].iloc[-1]
                runs[f"{kind}, seed {seed}"] = reached
        rows = pd.concat(parts).round(4)
        env = environment(choose_device("auto"), "fp32", "set in the script")
        write_json(records_folder() / "energy_views" / f"{name}.json", dict(
            config=values | dict(kinds=KINDS), data_sha256=data.sha256, env=env, runs=runs,
            rows=rows.astype(object).where(rows.notna(), None).to_dict("records")))
        print(rows.groupby(["model", "attack", "radius", "steps"])["dE(x)"].mean().to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
