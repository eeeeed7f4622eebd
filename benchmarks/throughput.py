"""Images per second of adversarial training: a plain loop against derkit's step, switch by switch.

    python -m benchmarks.throughput            # both networks, batch 128, on this machine's device
    python -m benchmarks.throughput --quick    # does it run? a step of everything, nothing to quote
    python -m benchmarks.throughput --compile default reduce-overhead      # on a GPU

Rows take turns, so that a busy machine slows all of them alike; medians over the repetitions are
compared. derkit's rows call `train_step`, as training does. The plain loop is that of public
single-file scripts: images decoded and augmented one by one in a DataLoader, float32, gradients of
all weights in the attack, a forward per point, a value read back at every step. Images are random.
Peak: the faster of bf16 and float32 products of large matrices, measured in the same run; the share
of it counts the operations of derkit's step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.operations import operations_per_image
from derkit.config import TrainConfig
from derkit.data import Split
from derkit.energy import marginal_energy
from derkit.models import build_model
from derkit.records import environment
from derkit.training.loop import train_step
from derkit.training.objectives import Objective, make_regularizer
from derkit.util import autocast, choose_device, images_format, make_generator, write_json

METHODS = {"FGSM": dict(method="fgsm"), "RS-FGSM": dict(method="rs_fgsm"),
           "RS-FGSM + DER": dict(method="rs_fgsm", regularizer="der", variant="segment"),
           "PGD-10": dict(method="pgd", steps=10)}
synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
AUGMENT = transforms.Compose([transforms.RandomCrop(32, padding=4),
                              transforms.RandomHorizontalFlip(), transforms.ToTensor()])


def plain_loss(model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig,
               generator: torch.Generator | None = None) -> Tensor:
    """CE(x*, y) of FGSM, RS-FGSM or PGD, with DER (segment) a forward for each of its points."""
    eps, x_adv = config.eps, x.clone()
    if config.method != "fgsm":
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x_adv = (x + (noise * 2 - 1) * eps).clamp(0, 1)
    for _ in range(config.steps if config.method == "pgd" else 1):
        x_adv = x_adv.detach().requires_grad_(True)
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + config.step_size * x_adv.grad.sign()
        x_adv = torch.max(torch.min(x_adv, x + eps), x - eps).clamp(0, 1)
    model.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    if config.regularizer == "der":
        u = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        between = x + u.view(-1, 1, 1, 1) * (x_adv - x)
        change = marginal_energy(model(x)) - marginal_energy(model(between))
        loss = loss + config.strength * change.abs().mean()
    return loss


def load(items: list[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    """A batch from images as files give them: decoded, cropped and flipped one at a time."""
    images = [AUGMENT(Image.fromarray(image)) for image, _ in items]
    return torch.stack(images), torch.tensor([label for _, label in items])


class Row(NamedTuple):
    """One line of the table: which switches are on."""

    name: str
    loader: bool = False
    plain: bool = False
    channels_last: bool = False
    precision: str = "fp32"
    compile: str = ""


def rows(compile_modes: list[str]) -> list[Row]:
    """The plain loop, then one switch after the other."""
    best = dict(channels_last=True, precision="bf16")
    return [Row("plain loop", loader=True, plain=True),
            Row("+ batches on the device, nothing read back", plain=True),
            Row("+ derkit's step: input-only gradients, one forward"),
            Row("+ channels_last", channels_last=True), Row("+ bf16 autocast", **best),
            *(Row(f"+ compile, {mode}", **best, compile=mode) for mode in compile_modes)]


def endless(split: Split, row: Row, config: TrainConfig,
            generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on the split's device, from a DataLoader with workers or cut on the device."""
    device = split.images.device
    images = split.images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    loader = DataLoader(list(zip(images, split.labels.tolist(), strict=True)), config.batch_size,
                        shuffle=True, num_workers=min(4, os.cpu_count() or 1), collate_fn=load,
                        persistent_workers=True, pin_memory=device.type == "cuda")
    while True:
        batches = loader if row.loader else split.batches(config.batch_size, generator, "crop_flip")
        for x, y in batches:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def runner(row: Row, build: Callable[[], nn.Module], split: Split,
           config: TrainConfig) -> Callable[[int], None]:
    """A function that trains for a number of steps."""
    device, model = split.images.device, build().train()
    memory = images_format(model) if row.channels_last else torch.contiguous_format
    model.to(device, memory_format=memory)
    forward = torch.compile(model, mode=row.compile) if row.compile else model
    fused = True if device.type == "cuda" and not row.plain else None
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=fused)
    generator = make_generator(device, "throughput")
    batches = endless(split, row, config, generator)
    objective, regularizer = Objective(config), make_regularizer(config, forward)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        if row.plain:
            return plain_loss(forward, x, y, config, generator)
        context = partial(autocast, device, row.precision)
        return train_step(forward, x, y, objective, regularizer, config.strength, generator,
                          context=context, attack_context=context)[0]

    def train(steps: int) -> None:
        for _ in range(steps):
            x, y = next(batches)
            loss = loss_of(x.contiguous(memory_format=memory), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if row.loader:
                loss.item()
        synchronize()

    return train


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second (a multiply-add counts two) of the fastest of five matrix products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def measure(trainers: dict[str, Callable[[int], None]], images: int, steps: int,
            repetitions: int) -> dict[str, float | str]:
    """Images per second, medians over repetitions; text where a row cannot run on this machine."""
    times, failed = {name: [] for name in trainers}, {}
    for repetition in range(repetitions + 1):  # the first one warms up, and compiles
        for name in [name for name in trainers if name not in failed]:
            began = time.perf_counter()
            try:
                trainers[name](steps if repetition else 1)
            except RuntimeError as error:  # out of memory, or a compile mode that is not there
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            times[name].append(time.perf_counter() - began)
    return {name: failed.get(name) or images * steps / statistics.median(t[1:])
            for name, t in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.throughput", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    networks, add = ("preact_resnet18", "small_cnn"), parser.add_argument
    add("--model", nargs="+", choices=networks, default=networks)
    add("--method", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    add("--compile", nargs="+", default=[], metavar="MODE", help="with torch.compile as well")
    add("--batch", type=int, default=128)
    add("--device", default="auto")
    add("--quick", action="store_true", help="batch 8, one step, one repetition")
    add("--out", type=Path, help="record; default: beside this file, none with --quick")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    batch, steps, repetitions, size = options.batch, 2, 5, 2048
    if device.type == "cuda":
        steps, size = 50, 8192
    if options.quick:
        batch, steps, repetitions, size = 8, 1, 1, 512
    env = environment(device, "as in the rows", "switches of the benchmark")
    where = env["gpu"] or f"{env['cpu']}, {env['threads']} threads"
    peak = max(matmul_rate(device, dtype, size) for dtype in (torch.bfloat16, torch.float32))
    print(f"{where}: {size} x {size} matrices: {peak / 1e12:.3f} T operations/s")
    generator, count = torch.Generator().manual_seed(0), batch * 8
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split(images.to(device), torch.arange(count, device=device) % 10)
    results = []
    for name, method in product(options.model, options.method):
        config = TrainConfig.make("cifar10", model=name, batch_size=batch, **METHODS[method])
        build = partial(build_model, name, 3, 10, 32)
        flops = operations_per_image(build, *next(split.batches(4)), config)
        trainers = {row.name: runner(row, build, split, config) for row in rows(options.compile)}
        found = measure(trainers, batch, steps, repetitions)
        print(f"\n{name}, {method}, batch {batch}: {flops / 1e9:.2f} G operations an image")
        for row, rate in found.items():
            results.append(dict(model=name, method=method, row=row))
            if isinstance(rate, str):
                print(f"  {row:52s} {rate}")
                results[-1]["failed"] = rate
                continue
            ratio, share = round(rate / found["plain loop"], 3), round(rate * flops / peak, 4)
            print(f"  {row:52s} {rate:10.1f} images/s ({where}), x{ratio:5.2f}, "
                  f"{share:6.1%} of the peak", flush=True)
            results[-1] |= dict(images_per_s=rate, ratio=ratio, share_of_peak=share)
    if options.out or not options.quick:
        out = options.out or Path(__file__).parent / f"throughput-{device.type}.json"
        write_json(out, dict(results=results, batch=batch, steps=steps, repetitions=repetitions,
                             matmul_operations_per_s=round(peak), env=env))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
