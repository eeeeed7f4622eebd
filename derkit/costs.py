"""What a suite of runs costs before it is run: operations counted, seconds measured, hours on one device or several."""

from __future__ import annotations

import heapq
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from derkit.config import TrainConfig
from derkit.data import MINI_SIZE, SPECS
from derkit.errors import DerkitError
from derkit.evaluation import make_generator
from derkit.losses import Step
from derkit.manifest import Job
from derkit.models import build_model
from derkit.records import runs_folder, write_json
from derkit.regularizers import VARIANTS

PETA = 1e15
TRAIN_IMAGES = {"fashion_mnist": 60000, "cifar10": 50000, "cifar100": 50000, "svhn": 73257}  # before valid_size is held out


def cost_key(config: TrainConfig) -> str:
    """Runs with the same key cost about the same per epoch: radius, seed, lambda and number of epochs do not matter."""
    attack = f"{config.method}-{config.steps}" if config.method in ("pgd", "trades", "weat") else config.method
    points = f"({', '.join(VARIANTS[config.variant].points)})" if config.regularizer == "der" else ""
    added = f" + {config.regularizer}{points}" if config.regularizer != "none" else ""
    return f"{attack}{added}, {config.model} {config.width or ''} {config.dataset} {config.train_size or 'all'}".replace("  ", " ")


# ------------------------------------------------------------------------------------------------------ operations
class Operations(TorchDispatchMode):
    """Counts the operations of convolutions and matrix products (a multiply-add counts two). (torch's FlopCounterMode also
    follows modules, by hooks that do not work under `torch.autograd.grad`.)"""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def operations_per_image(build: Callable[[], nn.Module], x: Tensor, y: Tensor, config: TrainConfig) -> float:
    """Operations of one training step per image of the batch x (B, C, H, W), y (B,): attack, regulariser and backward included."""
    from derkit.training import train_step

    model = build().to(x.device).train()
    with Operations() as counter:
        loss, _ = train_step(Step(model, x, y, config, make_generator(x.device, 0), 1.0))
        loss.backward()
    return counter.total / len(x)


def training_images(config: TrainConfig) -> int:
    """Images of an epoch. Raises DerkitError for data that is not known by its name."""
    if config.dataset not in SPECS:
        raise DerkitError(f"the cost of a plan is known for {', '.join(SPECS)}, found {config.dataset!r}. Use --calibrate.")
    whole = MINI_SIZE["train"] if config.dataset == "fashion_mini" else TRAIN_IMAGES[config.dataset] - config.valid_size
    return min(config.train_size or whole, whole)


def epoch_operations(config: TrainConfig) -> float:
    """Operations of one epoch of training, the evaluation after it left out. Neither the data nor its labels are needed."""
    from derkit.training import model_options

    images, spec = training_images(config), SPECS[config.dataset]
    classes = spec.classes if isinstance(spec.classes, int) else len(spec.classes)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, spec.channels, spec.size, spec.size, generator=generator)
    y = torch.randint(classes, (2,), generator=generator)

    def build() -> nn.Module:
        return build_model(config.model, spec.channels, classes, spec.size, **model_options(config))

    with torch.random.fork_rng(devices=[]):  # what initialises the weights
        return images * operations_per_image(build, x, y, config.change(precision="fp32"))


# ----------------------------------------------------------------------------------------------------- calibration
def calibration_file(jobs: Sequence[Job]) -> Path:
    return runs_folder() / jobs[0].suite / "calibration.json"


def calibrate(jobs: Sequence[Job]) -> dict[str, float]:
    """Seconds per epoch, its evaluation included, for every cost key: one epoch of each is run in a temporary folder.

    The first one also pays for the start of the device. What is measured is kept for --dry-run.
    """
    from derkit.data import load_dataset
    from derkit.device import choose_device
    from derkit.training import train

    costs: dict[str, float] = {}
    data = {}
    for config in {cost_key(j.config): j.config for j in reversed(jobs)}.values():
        one = config.change(epochs=1, final_size=1, strong_size=0, pgd50_size=0, autoattack_size=0)
        key = (one.dataset, one.data_dir, one.train_size, one.valid_size, one.device)
        if key not in data:
            data[key] = load_dataset(one.dataset, one.data_dir or None, choose_device(one.device), download=one.download,
                                     train_size=one.train_size, valid_size=one.valid_size, image_size=one.image_size or None)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(one, data[key], folder=Path(folder) / "run", verbose=False)
            costs[cost_key(config)] = round(time.perf_counter() - began, 3)
        print(f"{costs[cost_key(config)]:9.1f} s an epoch: {cost_key(config)}", flush=True)
    write_json(calibration_file(jobs), costs)
    return costs


# ------------------------------------------------------------------------------------------------------------ plan
def makespan(hours: Sequence[float], devices: int) -> float:
    """Hours until the last of the runs is over, each on one device, in their order, as soon as one is free."""
    free = [0.0] * devices
    for h in hours:
        heapq.heappush(free, heapq.heappop(free) + h)
    return max(free)


def plan(jobs: Sequence[Job], costs: dict[str, float], rate: float = 0.0, devices: int = 1) -> list[str]:
    """The runs as text, one a line, and the totals of every group.

    costs: seconds per epoch by `cost_key`; where they are known, hours are shown. rate: operations per second that a device
    sustains in training; then operations are counted, and hours follow from them where no epoch was measured. devices: how
    many share the runs, each run on one.
    """
    lines, groups, counted = [], {}, {}
    for job in jobs:
        key, epochs = cost_key(job.config), job.config.epochs
        if rate and key not in counted:
            counted[key] = epoch_operations(job.config)
        work = counted.get(key, 0.0) * epochs
        seconds = costs[key] * epochs if key in costs else work / rate if rate else None
        parts = [f"{job.group + ' ' if job.group else ''}{job.slug}: {job.config.method}", job.config.regularizer]
        parts += ["lambda from its sweep"] if job.sweep else []
        parts += [f"eps {job.config.eps:.4f}", f"{epochs} epochs"]
        parts += [f"{work / PETA:.1f} P operations"] if rate else []
        parts += [f"{seconds / 3600:.2f} h"] if seconds is not None else []
        lines.append(", ".join(parts))
        groups.setdefault(job.group or "-", []).append((None if seconds is None else seconds / 3600, work))
    groups = dict(sorted(groups.items()))
    if len(groups) > 1:
        groups["all"] = [row for rows in groups.values() for row in rows]
    for group, rows in groups.items():
        hours, work = [h for h, _ in rows if h is not None], sum(w for _, w in rows)
        parts = [f"{'all' if group == 'all' else f'group {group}'}: {len(rows)} runs"]
        parts += [f"{work / PETA:.0f} P operations"] if rate else []
        if len(hours) < len(rows):
            parts += ["cost unknown (--calibrate measures it, --rate counts it)"]
        else:
            parts += [f"{sum(hours):.2f} h one at a time"]
            parts += [f"{makespan(hours, devices):.2f} h on {devices} devices"] if devices > 1 else []
            parts += ["final evaluation not counted"]
        lines.append(", ".join(parts))
    return lines
