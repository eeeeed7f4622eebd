"""Cost of a training step of every run of a suite, relative to the first one, on this machine.

    python -m scripts.measure_cost co_fashion_mini

Steps of all methods take turns, so that a busy machine slows all of them alike; the median of the
CPU time per step on one thread is compared. Writes figures/records/<suite>/cost.json.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from derkit.config import TrainConfig
from derkit.data import Dataset, load_dataset
from derkit.records import environment, records_folder
from derkit.training.loop import model_from_config, train_step
from derkit.training.objectives import Objective, make_regularizer
from derkit.util import make_generator, write_json
from experiments.suites import planned

ROUNDS, BATCH = 15, 128


def stepper(config: TrainConfig, data: Dataset) -> Callable[[], float]:
    """A function that takes one training step of the config and returns its CPU seconds."""
    model = model_from_config(config, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = next(data.train.batches(BATCH))
    parts = Objective(config), make_regularizer(config, model), config.strength

    def step() -> float:
        began = time.process_time()
        loss, _ = train_step(model, x, y, *parts, make_generator("cpu", 0), awp=config.awp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.process_time() - began

    return step


def main(suite: str) -> None:
    torch.set_num_threads(1)
    configs = {run.label: run.config for run in planned(suite) if run.group != "tune"}
    data = load_dataset(next(iter(configs.values())).dataset)
    steppers = {label: stepper(config, data) for label, config in configs.items()}
    times: dict[str, list[float]] = {label: [] for label in steppers}
    for _ in range(ROUNDS + 2):
        for label, step in steppers.items():
            times[label].append(step())
    medians = {label: statistics.median(t[2:]) for label, t in times.items()}
    base = next(iter(medians.values()))
    ratios = {label: round(median / base, 2) for label, median in medians.items()}
    env = environment(torch.device("cpu"), "fp32", "the suite's")
    write_json(records_folder() / suite / "cost.json", dict(
        ratio=ratios, rounds=ROUNDS, batch=BATCH, clock="CPU time, one thread", env=env))
    print(f"{env['cpu']}: {ratios}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
