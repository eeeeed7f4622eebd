"""Images per second of adversarial training: a plain loop against derkit's step, its switches added one at a time.

    python benchmarks/throughput.py                      # both networks, batch 128, on this machine's device
    python benchmarks/throughput.py --quick              # does it run? a step or two of everything, nothing worth quoting
    python benchmarks/throughput.py --compile default --compile reduce-overhead   # on a GPU: torch.compile, and CUDA graphs

Rows take turns, so that a busy machine slows all of them alike; medians over the repetitions are compared. The derkit rows
call `derkit.training.train_step`, which is what training calls. The plain loop is what the public single-file scripts do:
images decoded and augmented one by one in a DataLoader, float32, loss.backward() inside the attack (which computes gradients
of all weights, too), one forward per point, a value read back at every step. Images are random: their content costs nothing.
*peak*: the bf16 rate of a large matrix product, measured in the same run; the share counts the operations of derkit's step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from derkit.config import TrainConfig
from derkit.costs import operations_per_image
from derkit.data import Split
from derkit.device import autocast, choose_device
from derkit.energy import marginal_energy
from derkit.evaluation import make_generator
from derkit.losses import Step
from derkit.models import build_model
from derkit.records import environment, write_json
from derkit.training import train_step

METHODS = {
    "FGSM": dict(method="fgsm"),
    "RS-FGSM": dict(method="rs_fgsm"),
    "RS-FGSM + DER": dict(method="rs_fgsm", regularizer="der", variant="segment"),
    "PGD-10": dict(method="pgd", steps=10),
}


# ------------------------------------------------------------------------------------------------- the plain loop
def plain_attack(model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig, generator: torch.Generator | None) -> Tensor:
    """x* (B, C, H, W) of FGSM, RS-FGSM or PGD; loss.backward() leaves gradients in all parameters."""
    eps, alpha = config.eps, config.step_size
    x_adv = x.clone()
    if config.method != "fgsm":
        noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x_adv = (x + (noise * 2 - 1) * eps).clamp(0, 1)
    for _ in range(config.steps if config.method == "pgd" else 1):
        x_adv = x_adv.detach().requires_grad_(True)
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + alpha * x_adv.grad.sign()
        x_adv = torch.max(torch.min(x_adv, x + eps), x - eps).clamp(0, 1)
    return x_adv.detach()


def plain_loss(model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig, generator: torch.Generator | None = None) -> Tensor:
    """CE(x*, y), with DER (segment) a forward for each of its points."""
    x_adv = plain_attack(model, x, y, config, generator)
    model.zero_grad()
    loss = F.cross_entropy(model(x_adv), y)
    if config.regularizer == "der":
        u = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype).view(-1, 1, 1, 1)
        energies = marginal_energy(model(x)), marginal_energy(model(x + u * (x_adv - x)))
        loss = loss + config.strength * (energies[0] - energies[1]).abs().mean()
    return loss


class Images(Dataset):
    """Images as files give them: decoded, cropped and flipped one at a time."""

    def __init__(self, split: Split) -> None:
        from torchvision import transforms

        self.images = np.ascontiguousarray(split.images.cpu().permute(0, 2, 3, 1).numpy())
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose([transforms.RandomCrop(self.images.shape[1], padding=4),
                                             transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


# ----------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
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
    return [Row("plain loop", loader=True, plain=True), Row("+ batches on the device, nothing read back", plain=True),
            Row("+ derkit's step: input-only gradients, one forward"), Row("+ channels_last", channels_last=True),
            Row("+ bf16 autocast", **best), *(Row(f"+ compile, {mode}", **best, compile=mode) for mode in compile_modes)]


def forever(make: Callable[[], Iterator]) -> Iterator:
    while True:
        yield from make()


def runner(row: Row, build: Callable[[], nn.Module], split: Split, config: TrainConfig, workers: int) -> Callable[[int], None]:
    """A function that trains for a number of steps."""
    device = split.images.device
    model = build().to(device).train()
    if row.channels_last:
        model.to(memory_format=torch.channels_last)
    forward = torch.compile(model, mode=row.compile) if row.compile else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4,
                                fused=True if device.type == "cuda" and not row.plain else None)
    generator = make_generator(device, "throughput")
    if row.loader:
        loader = DataLoader(Images(split), config.batch_size, shuffle=True, num_workers=workers, drop_last=True,
                            persistent_workers=workers > 0, pin_memory=device.type == "cuda")
        batches = forever(lambda: iter(loader))
    else:
        batches = forever(lambda: split.batches(config.batch_size, generator, "crop_flip", drop_last=True))

    def context():
        return autocast(device, row.precision)

    def train(steps: int) -> None:
        for _ in range(steps):
            x, y = next(batches)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if row.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            if row.plain:
                loss = plain_loss(forward, x, y, config, generator)
            else:
                loss, _ = train_step(Step(forward, x, y, config, generator, 1.0), context, context)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if row.loader:
                loss.item()
        wait(device)

    return train


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------ measuring
def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repetitions: int = 5) -> float:
    """Operations per second (a multiply-add counts two) of the fastest of some products of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def measure(trainers: dict[str, Callable[[int], None]], images: int, steps: int, repetitions: int) -> dict[str, float | str]:
    """Images per second, the median of repetitions that take turns; text where a row cannot run on this machine."""
    times: dict[str, list[float]] = {name: [] for name in trainers}
    failed: dict[str, str] = {}
    for repetition in range(repetitions + 1):  # the first one warms up, and compiles
        for name, train in trainers.items():
            if name in failed:
                continue
            try:
                began = time.perf_counter()
                train(1 if repetition == 0 else steps)
            except RuntimeError as error:  # out of memory, or a compile mode that the device does not have
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            if repetition:
                times[name].append(time.perf_counter() - began)
    return {name: failed.get(name) or images * steps / statistics.median(t) for name, t in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("preact_resnet18", "small_cnn"), help="repeatable; default: both")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="repeatable; default: all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="steps of a repetition; default: 50 on a GPU, 2 on a CPU")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4, help="DataLoader workers of the plain loop")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--compile", action="append", default=[], choices=("default", "reduce-overhead", "max-autotune"),
                        help="also with torch.compile in this mode (repeatable); reduce-overhead uses CUDA graphs")
    parser.add_argument("--quick", action="store_true", help="batch 8, one step, one repetition")
    parser.add_argument("--out", help="JSON record; default: benchmarks/throughput-<device>.json, none with --quick")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    batch, repetitions = (8, 1) if options.quick else (options.batch, options.repetitions)
    steps = 1 if options.quick else options.steps or (50 if gpu else 2)
    workers = 0 if options.quick else options.workers
    size = 8192 if gpu else 512 if options.quick else 2048
    peak = {name: matmul_rate(device, dtype, size) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    rates = ", ".join(f"{name} {rate / 1e12:.3f} T operations/s" for name, rate in peak.items())
    print(f"{device.type}: matrix product of {size} x {size}: {rates}")
    generator = torch.Generator().manual_seed(0)
    count = max(batch * 8, 64)
    split = Split(torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device),
                  torch.randint(0, 10, (count,), generator=generator).to(device))
    results = []
    for name in options.model or ("preact_resnet18", "small_cnn"):
        def build(name=name):
            return build_model(name, 3, 10, 32)

        for method in options.method or METHODS:
            config = TrainConfig.make("cifar10", model=name, batch_size=batch, **METHODS[method])
            flops = operations_per_image(build, *next(split.batches(4)), config)
            trainers = {r.name: runner(r, build, split, config, workers) for r in rows(options.compile)}
            rates = measure(trainers, batch, steps, repetitions)
            print(f"\n{name}, {method}, batch {batch}: {flops / 1e9:.2f} G operations per image and step")
            base = rates["plain loop"]
            for row, rate in rates.items():
                if isinstance(rate, str):
                    print(f"  {row:52s} {rate}")
                    continue
                share = rate * flops / peak["bf16"]
                print(f"  {row:52s} {rate:10.1f} images/s   x{rate / base:5.2f}   {rate * flops / 1e12:8.3f} T operations/s, "
                      f"{share:6.1%} of the bf16 peak", flush=True)
                results.append(dict(model=name, method=method, row=row, images_per_s=round(rate, 2), ratio=round(rate / base, 3),
                                    operations_per_s=round(rate * flops), share_of_peak=round(share, 4)))
            results += [dict(model=name, method=method, row=row, failed=rate) for row, rate in rates.items() if isinstance(rate, str)]
    out = options.out or (None if options.quick else Path(__file__).parent / f"throughput-{device.type}.json")
    if out:
        write_json(Path(out), dict(results=results, batch=batch, steps=steps, repetitions=repetitions, workers=workers, matmul_size=size,
                                   matmul_operations_per_s={k: round(v) for k, v in peak.items()},
                                   env=environment(device, "as in the rows", "switches of the benchmark")))
        print(f"\nwritten to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
