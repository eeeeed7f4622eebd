"""Cost of a training step of every run of a suite, relative to the first one, on this machine.

    python scripts/measure_cost.py figures/suites/co_fashion_mini.json

Steps of all methods take turns, so that a busy machine slows all of them alike; the median of the CPU time per step on one
thread is compared. Writes figures/records/<suite>/cost.json.
"""

import statistics
import sys
import time

import torch

from derkit import losses
from derkit.data import load_dataset
from derkit.evaluation import make_generator
from derkit.manifest import read_manifest
from derkit.records import environment, write_json
from derkit.results import records_folder
from derkit.training import model_from_config, train_step

ROUNDS, BATCH = 15, 128


def stepper(config, data):
    """A function that takes one training step of the config and returns its CPU seconds."""
    model = model_from_config(config, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = next(data.train.batches(BATCH))
    state: dict = {}

    def step() -> float:
        began = time.process_time()
        loss, _ = train_step(losses.Step(model, x, y, config, make_generator("cpu", 0), 1.0, state=state))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.process_time() - began

    return step


def main(manifest: str) -> None:
    torch.set_num_threads(1)
    jobs = {job.label: job for job in sorted(read_manifest(manifest), key=lambda j: (j.order, -j.config.seed))}
    data = load_dataset(next(iter(jobs.values())).config.dataset)
    steppers = {label: stepper(job.config, data) for label, job in jobs.items()}
    times: dict[str, list[float]] = {label: [] for label in steppers}
    for _ in range(ROUNDS + 2):
        for label, step in steppers.items():
            times[label].append(step())
    medians = {label: statistics.median(t[2:]) for label, t in times.items()}
    base = next(iter(medians.values()))
    ratios = {label: round(m / base, 2) for label, m in medians.items()}
    suite = next(iter(jobs.values())).suite
    write_json(records_folder() / suite / "cost.json",
               dict(ratio=ratios, rounds=ROUNDS, batch=BATCH, clock="CPU time, one thread",
                    env=environment(torch.device("cpu"), "fp32", "the suite's")))
    print(ratios)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
