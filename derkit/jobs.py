"""A generation made ready: everything is checked and fitted first, then every sample is a function of its number."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from derkit import attacks
from derkit.checkpoint import state_hash
from derkit.config import AUTO
from derkit.data import Dataset
from derkit.errors import DerkitError, pick
from derkit.fits import Pool, fit_pool
from derkit.gen_config import GenerateConfig
from derkit.inits import INITS, Draw, local_parts
from derkit.sampler import Chains, sample
from derkit.stops import STOPS
from derkit.targets import Reference, energy_targets, reference_energies


@dataclass(frozen=True)
class Job:
    """Everything prepared and checked for a generation; a sample is a function of the job and its global index."""

    model: nn.Module
    dataset: Dataset
    config: GenerateConfig
    pool: Pool
    reference: Reference
    classes: tuple[int, ...]
    model_sha256: str

    def draw(self, index: Tensor, candidate: int = 0) -> Draw:
        """Label and rank of samples by their global index (B,): classes take turns."""
        index = index.to(self.pool.images.device)
        labels = torch.tensor(self.classes, device=index.device)[index % len(self.classes)]
        return Draw(index, labels, index // len(self.classes), self.config.seed, candidate)

    def starts(self, index: Tensor) -> Tensor:
        """x0 (B, C, H, W) in [0, 1]; with best_of > 1 the start whose E(x0, y) is nearest to the target."""
        best, gap = None, None
        for candidate in range(self.config.best_of):
            draw = self.draw(index, candidate)
            x = INITS[self.config.init].start(draw, self.pool, self.config).clamp(0, 1).view(-1, *self.pool.shape)
            if self.config.best_of == 1:
                return x
            with torch.no_grad(), attacks.attack_mode(self.model, "eval"):
                now = -self.model(x).double().gather(1, draw.labels[:, None]).squeeze(1)
            now = (now - self.targets(draw)).abs()
            take = torch.ones_like(now, dtype=torch.bool) if gap is None else now < gap
            best = x if best is None else torch.where(take.view(-1, 1, 1, 1), x, best)
            gap = now if gap is None else torch.where(take, now, gap)
        return best

    def targets(self, draw: Draw) -> Tensor:
        """e* per sample, (B,)."""
        c = self.config
        return energy_targets(self.reference, draw.index, draw.labels, c.seed, c.low, c.high)

    def run(self, index: Sequence[int] | Tensor, *, trace: bool = False, frames_every: int = 0) -> Chains:
        """One batch of samples by their global numbers, as floats; with energy traces and frames if asked for."""
        draw = self.draw(torch.as_tensor(index, dtype=torch.int64))
        with _reproducible():
            return sample(self.model, self.starts(draw.index), draw.labels, draw.index, self.config, self.reference,
                          trace=trace, frames_every=frames_every)

    def run_from(self, x0: Tensor, labels: Tensor, **options: Any) -> Chains:
        """The sampler from starts of your own: x0 (B, C, H, W) in [0, 1] moved towards ``labels`` (B,), numbered from 0.

        Raises DerkitError where shapes, range or labels do not fit.
        """
        x0, labels = x0.to(self.pool.images.device, self.pool.dtype), labels.to(self.pool.images.device)
        attacks.check_batch(x0, labels, self.model)
        if tuple(x0.shape[1:]) != tuple(self.pool.shape):
            raise DerkitError(f"x0 holds images of shape {tuple(x0.shape[1:])}, the data's are {tuple(self.pool.shape)}.")
        with _reproducible():
            return sample(self.model, x0, labels, torch.arange(len(x0), device=x0.device), self.config, self.reference, **options)

    def between(self, first: int, second: int, points: int = 9, **options: Any) -> Chains:
        """Interpolation of two local-PCA starts of one class, each point then sampled towards the same target.

        x0(t) = (1 - t) m_1 + t m_2 + tau (cos(a) d_1 + sin(a) d_2), a = t pi/2: between two draws of local Gaussians
        the spread stays what it is in them. Raises DerkitError for another init, or samples of two classes.
        """
        draw = self.draw(torch.tensor([first, second]))
        if self.config.init != "local_pca" or draw.labels[0] != draw.labels[1]:
            raise DerkitError("between() joins two starts of one class with init=local_pca (samples whose numbers "
                              f"differ by a multiple of {len(self.classes)}).")
        mean, deviation = local_parts(draw, self.pool, self.config)
        t = torch.linspace(0, 1, points, dtype=mean.dtype, device=mean.device)[:, None]
        angle = t * math.pi / 2
        x0 = torch.lerp(*mean, t) + self.config.tau * (angle.cos() * deviation[0] + angle.sin() * deviation[1])
        same = draw.index[:1].expand(points)
        with _reproducible():
            return sample(self.model, x0.clamp(0, 1).view(-1, *self.pool.shape), draw.labels[:1].expand(points), same,
                          self.config, self.reference, **options)


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Fixed algorithms and no TF32 on a GPU, so that a shard comes out the same when it is made again."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before


def prepare(model: nn.Module, dataset: Dataset, config: GenerateConfig | None = None, **overrides: Any) -> Job:
    """Check everything and fit the init; the work itself starts with `Job.run` or `generate`.

    model: any classifier of images in [0, 1], on the data's device; it is not changed. Raises DerkitError: unknown
    init or stop, k larger than a class, a class with no correctly classified image where energies are needed, a model
    that does not fit the data.
    """
    config = (config or GenerateConfig()).change(**overrides)
    kind = pick("init", config.init, INITS)
    pick("stop", config.stop, STOPS)
    classes = config.class_numbers(dataset.classes)
    sha256 = state_hash(model.state_dict())
    model, dtype = _at_precision(model, config.precision)
    _check_model(model, dataset, dtype)
    pca = config.kept if kind.needs == "pca" else None
    pool = fit_pool(dataset, classes, pca=pca, k=config.k if kind.needs == "near" else 0, rank=config.rank, dtype=dtype)
    reference = reference_energies(model, dataset, config.reference, f"{sha256}-{dtype}")
    if config.stop != "fixed" or config.best_of > 1:
        reference.require(classes, f"stop={config.stop}" if config.stop != "fixed" else f"best_of={config.best_of}")
    return Job(model, dataset, config, pool, reference, tuple(classes), sha256)


def _at_precision(model: nn.Module, precision: str) -> tuple[nn.Module, torch.dtype]:
    """The model (a copy, if its type has to change) and the type that images have in it."""
    own = next((p.dtype for p in model.parameters()), torch.float32)
    wanted = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}.get(precision, own)
    if precision == AUTO and own not in (torch.float32, torch.float64):
        wanted = torch.float32
    return (model if wanted == own else copy.deepcopy(model).to(wanted)), wanted


def _check_model(model: nn.Module, dataset: Dataset, dtype: torch.dtype) -> None:
    x = dataset.train.floats(0, 1, dtype)
    channels = (getattr(model, "spec", None) or {}).get("channels", dataset.channels)
    if channels != dataset.channels:  # a normaliser of 3 channels would quietly make 3 out of 1
        raise DerkitError(f"the model takes {channels} channels, {dataset.name} has {dataset.channels}.")
    try:
        with torch.no_grad(), attacks.attack_mode(model, "eval"):
            found = model(x).shape
    except RuntimeError as error:
        raise DerkitError(f"the model does not take the images of {dataset.name}, {tuple(x.shape[1:])} on {x.device}: "
                          f"{str(error).splitlines()[0]}") from error
    if found != (1, len(dataset.classes)):
        raise DerkitError(f"the model has {found[-1]} classes, {dataset.name} has {len(dataset.classes)}: a checkpoint "
                          "of another data set?")
