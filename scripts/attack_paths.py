"""The loss and E(x) on the way of the training attack, at the end of runs that have records.

    python -m scripts.attack_paths [SUITE]     # writes figures/records/paths/SUITE.json

Trains the first seed of two rows again (or finds it), with the settings of its record; 500 test
images, x + u (x* - x) with x* of FGSM. `scripts/make_figures.py` draws the first figure from it.
"""

import sys

import torch

from derkit.attacks import fgsm
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis.landscape import energy_path
from derkit.records import environment, load_tested, records_folder, title
from derkit.training.loop import train
from derkit.util import choose_device, write_json

ROWS = ("fgsm", "fgsm + der norm")
SHORT = dict(strong_size=0, pgd50_size=0, autoattack_size=0, judge_best=False)


def measure(suite: str) -> dict:
    """Mean over images, (U,), of CE and E(x) for every row, and what its network reaches."""
    rows, reached = {}, {}
    for label in ROWS:
        config = TrainConfig.read(load_tested(suite)[label][0].config["train"]).change(**SHORT)
        data = load_dataset(config.dataset, train_size=config.train_size)
        run = train(config, data)
        model, test = run.model().double(), data.test.take(slice(500))
        x, y = test.floats(dtype=torch.float64), test.labels
        path = energy_path(model, x, fgsm(model, x, y, config.eps), y)
        rows[title(label)] = {"u": path["u"].tolist()} | {
            key: path[key].mean(1).round(4).tolist() for key in ("ce", "E")}
        reached[title(label)] = {key: run.final["last"][key] for key in ("clean", "fgsm", "pgd")}
    env = environment(choose_device("auto"), "fp32", "paths in float64")
    return dict(suite=suite, seed=0, images=500, data_sha256=data.sha256, env=env, runs=reached,
                paths=rows)


if __name__ == "__main__":
    name = (sys.argv[1:] or ["co_cifar10"])[0]
    write_json(records_folder() / "paths" / f"{name}.json", measure(name))
