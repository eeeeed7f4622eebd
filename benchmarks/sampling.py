"""Samples a second: the kit's sampler beside a plain loop, taking turns in one run.

    python -m benchmarks.sampling                                        # bundled data and model
    python -m benchmarks.sampling --dataset cifar10 --model cifar10-generator --n 256

The plain loop is what one would write first: every chain stays in the batch until the last has
reached its energy, images and network in the default memory format. Both take the same steps (this
is checked). Writes benchmarks/sampling-<dataset>.json: seconds, the least of several rounds, for n
and for 4 n images, and what the fits of the starts cost, once and from the cache.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from derkit.checkpoint import load_pretrained
from derkit.data import load_dataset
from derkit.energy import joint_energy
from derkit.generation.generate import Job, prepare
from derkit.records import environment
from derkit.util import write_json


def plain(model: nn.Module, job: Job, x: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The steps that every chain takes, (n,): the same descent, written down directly."""
    c, v, steps = job.config, torch.zeros_like(x), torch.zeros_like(labels)
    active = torch.ones_like(labels, dtype=torch.bool)
    for _ in range(c.steps):
        x = x.detach().requires_grad_(True)
        joint = joint_energy(model(x), labels)
        active = active & (joint > target)
        if not active.any():
            break
        grad = torch.autograd.grad(joint.sum(), x)[0]
        grad = grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        v = c.momentum * v - c.eta * grad
        x = torch.where(active.view(-1, 1, 1, 1), (x + v).clamp(0, 1), x)
        steps += active
    return steps


def seconds(call) -> tuple[float, object]:
    began = time.perf_counter()
    value = call()
    return time.perf_counter() - began, value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mini")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="fashion-robust")
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: benchmarks/sampling-<dataset>.json")
    options = parser.parse_args(argv)
    data, model = load_dataset(options.dataset, options.data_dir), load_pretrained(options.model)
    settings = dict(noise=0.0, batch_size=4 * options.n)
    fits = [seconds(lambda: prepare(model, data, **settings)) for _ in range(2)]
    job, model = fits[0][1], model.requires_grad_(False).eval()
    best = {}
    for size in (options.n, 4 * options.n):
        for _ in range(options.rounds):
            kit, chains = seconds(lambda size=size: job.run(range(size)))
            x0, labels = job.starts(range(size)), chains.labels
            loop, steps = seconds(
                lambda: plain(model, job, x0, labels, chains.target))  # noqa: B023
            same = (steps == chains.steps).double().mean().item()
            row = best.setdefault(size, dict(images=size, kit=kit, plain=loop, same_steps=same))
            row |= dict(kit=min(kit, row["kit"]), plain=min(loop, row["plain"]))
        row |= dict(ratio=row["plain"] / row["kit"], mean_steps=chains.steps.double().mean().item(),
                    longest=int(chains.steps.max()))
        print({key: round(value, 3) for key, value in row.items()}, flush=True)
    record = dict(dataset=data.name, model=options.model, config=job.config.as_dict(),
                  rows=[*best.values()], fit_seconds=[round(fit, 2) for fit, _ in fits],
                  env=environment(data.train.images.device, "fp32", "the network's"))
    out = options.out or Path(__file__).parent / f"sampling-{data.name}.json"
    write_json(out, record)


if __name__ == "__main__":
    main()
