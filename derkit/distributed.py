"""Several processes under torchrun (plain torch.distributed), and a no-op for one: no process group, the same bits.

    torchrun --nproc-per-node 4 -m derkit.training --preset rice2020

Every process draws the batches, augmentation and attack noise of the whole batch from the same generator and keeps its
rows (`Share`), so a run does not depend on the number of processes beyond rounding (and BatchNorm, see config.sync_bn).
Gradients are summed by hand, in one flat all-reduce a step, and not by DistributedDataParallel: that hooks every forward
and cannot go through a double backward (GradAlign), while here attacks and regularisers see the bare module. The price
is that communication does not overlap with the backward pass.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from derkit.errors import DerkitError

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # the others wait for the evaluations of process 0; torchrun itself ends them when one dies


# ------------------------------------------------------------------------------------------------------ processes
def launched() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says it in the environment; (0, 1) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(n in os.environ for n in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process; 0 is the one that evaluates, writes and prints."""
    return dist.get_rank() if _ready() else launched()[0]


def world() -> int:
    """Number of processes of the group; 1 before `processes` has made it, and without torchrun."""
    return dist.get_world_size() if _ready() else 1


def device_name(name: str) -> str:
    """The device of this process: with several, 'auto' and 'cuda' stand for its own GPU (LOCAL_RANK).

    Raises DerkitError where processes would have to share a GPU by accident: fewer GPUs than processes, or 'cuda:1'.
    """
    if launched()[1] == 1 or name == "cpu":
        return name
    if name not in ("auto", "cuda"):
        raise DerkitError(f"device {name!r} is one device for {launched()[1]} processes. Use device=auto (each takes a GPU of its "
                          "own), cuda or cpu.")
    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if not gpus and name == "auto":
        return "cpu"
    if here >= gpus:
        raise DerkitError(f"process {here} of this machine has no GPU of its own, found {gpus}. Start at most {gpus} processes "
                          "a machine (--nproc-per-node), or set device=cpu.")
    return f"cuda:{here}"


@contextmanager
def processes() -> Iterator[None]:
    """The process group of torchrun, for the time of the block. Nothing happens for one process or inside another block."""
    if launched()[1] == 1 or _ready():
        yield
        return
    if torch.cuda.is_available() and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(both, timeout=PATIENCE)
    try:
        yield
    except BaseException as error:
        if is_shared(error):  # all of them are here; otherwise the others may hang in a collective until torchrun ends them
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------- errors and turns
def is_shared(error: BaseException) -> bool:
    """Do all processes raise this error (so that one of them should print it)?"""
    return getattr(error, "shared", False)


def report(error: BaseException) -> None:
    """Print the error that ends this process, on stderr, once: process 0 does for all, another only for what it alone knows."""
    if rank() == 0 or _ready():  # an error of all closes the group
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # torchrun ends the others when one is gone: process 0 prints first


def everywhere(call: Callable[[], T]) -> T:
    """``call()`` on every process. Where it fails on one, all raise: no process is left waiting for another."""
    if world() == 1:
        return call()
    value, problem = None, None
    try:
        value = call()
    except Exception as error:
        problem = error
    found: list[Any] = [None] * world()
    kind = FloatingPointError if isinstance(problem, FloatingPointError) else DerkitError
    text = str(problem) if isinstance(problem, DerkitError | FloatingPointError) else f"{type(problem).__name__}: {problem}"
    dist.all_gather_object(found, problem and (kind.__name__, text))
    first = next((i for i, f in enumerate(found) if f), None)
    if first is None:
        return value
    if problem is None:
        name, text = found[first]
        where = f"process {first} of {world()}: " if first else ""
        problem = {"FloatingPointError": FloatingPointError}.get(name, DerkitError)(where + text)
    problem.shared = True
    raise problem


def first(call: Callable[[], T]) -> T:
    """``call()`` on process 0 while the others wait; all get its value (plain data), or its error."""
    value = everywhere(lambda: call() if rank() == 0 else None)
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def in_turn(call: Callable[[], T]) -> T:
    """``call()`` on one process of each machine, then on the others: what the first one downloads, they only read."""
    if world() == 1:
        return call()
    early = os.environ.get("LOCAL_RANK", "0") == "0"
    value = everywhere(lambda: call() if early else None)
    return everywhere(lambda: value if early else call())


# ------------------------------------------------------------------------------------------ shares of a batch
@dataclass(frozen=True)
class Share:
    """This process's rows of a batch. It stands in for the generator: what it draws are its rows of the whole batch's draw.

    weight: the rows' part in a mean over the batch. A batch with fewer images than processes is computed by all of them
    (exact but for the running variance of sync_bn, which then takes the repeated images for different ones).
    """

    total: int
    rows: slice
    weight: float
    generator: torch.Generator

    def draw(self, make: Callable[..., Tensor], shape, **options) -> Tensor:
        return make((self.total, *shape[1:]), generator=self.generator, **options)[self.rows]


def share(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, torch.Generator | Share]:
    """(x, y, generator) of a whole batch, (B, ...), to what this process computes of it. One process gets it all, unchanged."""
    n, total = world(), len(y)
    if n == 1:
        return x, y, generator
    if total < n:
        part = Share(total, slice(0, total), 1 / n, generator)
    else:
        rows = slice(total * rank() // n, total * (rank() + 1) // n)
        part = Share(total, rows, (rows.stop - rows.start) / total, generator)
    return x[part.rows], y[part.rows], part


def draw(make: Callable[..., Tensor], shape, generator: torch.Generator | Share | None, **options) -> Tensor:
    """``make(shape)`` (torch.rand, torch.randn) from a generator, or this process's rows of it from a `Share`."""
    if isinstance(generator, Share):
        return generator.draw(make, shape, **options)
    return make(shape, generator=generator, **options)


def weight(generator: torch.Generator | Share | None) -> float:
    """What a mean over this process's rows counts for in the mean over the batch."""
    return generator.weight if isinstance(generator, Share) else 1.0


def batch_mean(values: Tensor, generator: torch.Generator | Share | None) -> Tensor:
    """The mean over the whole batch of values (B,) that each process has for its rows; no graph."""
    mean = values.detach().mean()
    return total(mean * generator.weight) if isinstance(generator, Share) else mean


# ----------------------------------------------------------------------------------------------------- tensors
def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(model: nn.Module) -> None:
    """Every process gets the sum of all processes' gradients, in one flat all-reduce (its losses carry their weights)."""
    if world() == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = total(torch.cat([g.reshape(-1) for g in grads]))
    for g, new in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(new.view(g.shape))


def spread(model: nn.Module) -> None:
    """All processes start from the weights and buffers of process 0."""
    if world() > 1:
        for tensor in model.state_dict().values():
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def average_statistics(*models: nn.Module | None) -> None:
    """BatchNorm's running mean and variance become their mean over processes; other buffers become those of process 0."""
    if world() == 1:
        return
    for model in filter(None, models):
        running = {id(b) for m in model.modules() if isinstance(m, _BatchNorm) for b in (m.running_mean, m.running_var)}
        for buffer in model.buffers():
            if id(buffer) in running:
                total(buffer.div_(world()))
            else:
                dist.broadcast(buffer, src=0)
