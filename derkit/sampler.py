"""The sampler: a batch of chains descends on the guided energy, each until its own stop.

    E_w(x, y) = E(x) + w (-log p(y|x))          w = 0: E(x);  w = 1: E(x, y)
    v <- zeta v + step(grad E_w),   x <- clip(x + v + s xi, 0, 1)

Classes may be mixed. A chain that has stopped leaves the batch and stays as it was (its stop is latched). Noise is
keyed by the sample's global index, so that a result depends neither on the batch size nor on the order in which
chains finish.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from derkit import attacks, energy, keyed
from derkit.gen_config import GenerateConfig
from derkit.stops import Limits
from derkit.targets import Reference


# ---------------------------------------------------------------------------------------------------------- steps
def plain(grad: Tensor, eta: float) -> Tensor:
    """-eta/2 grad: Langevin's drift, on the model's own scale (ECCV'24)."""
    return -0.5 * eta * grad


def normalised(grad: Tensor, eta: float) -> Tensor:
    """-eta grad/||grad||_2: every image moves by eta, whatever the model's scale, so that models can be compared."""
    return -eta * grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


RULES: dict[str, Callable[[Tensor, float], Tensor]] = {"normalised": normalised, "plain": plain}


# --------------------------------------------------------------------------------------------------------- energies
def guided_energy(logits: Tensor, labels: Tensor, w: float) -> Tensor:
    """E_w(x, y) = E(x) + w (-log p(y|x)), (B,)."""
    return energy.marginal_energy(logits) + w * energy.cross_entropy(logits, labels)


def readings(logits: Tensor, labels: Tensor) -> Tensor:
    """(3, B) float64: E(x, y), E(x), p(y|x)."""
    f = energy.upcast(logits).detach().double()
    prob = (-energy.cross_entropy(f, labels)).exp()
    return torch.stack([energy.joint_energy(f, labels), energy.marginal_energy(f), prob])


# ---------------------------------------------------------------------------------------------------------- result
@dataclass
class Chains:
    """What became of a batch of chains: images (n, C, H, W) in [0, 1], everything else (n,) unless said.

    ``steps``: steps taken; ``reached``: the stop rule holds at the end; ``target``: e* (NaN without real energies);
    ``start``, ``end`` (3, n): E(x, y), E(x), p(y|x) of ``x0`` and ``x``. ``trace`` (steps + 1, 3, n): the same at every
    step, NaN once a chain has stopped. ``frames`` (F, n, C, H, W): images after ``frame_steps`` steps.
    """

    x: Tensor
    x0: Tensor
    labels: Tensor
    index: Tensor
    target: Tensor
    steps: Tensor
    reached: Tensor
    start: Tensor = field(repr=False)
    end: Tensor = field(repr=False)
    trace: Tensor | None = field(default=None, repr=False)
    frames: Tensor | None = field(default=None, repr=False)
    frame_steps: list[int] = field(default_factory=list)


@dataclass
class _Batch:
    """The rows still in the batch: which chain each is, its image, the image before the last noise, its velocity, and
    whether it has ended and only fills up."""

    rows: Tensor
    x: Tensor
    clean: Tensor
    v: Tensor
    done: Tensor

    def shrink(self, grad: Tensor, multiple: int) -> Tensor:
        """Drop ended rows, down to the next multiple; returns the gradients of the rows that stay."""
        size = -(-int((~self.done).sum()) // multiple) * multiple
        if size >= len(self.done):
            return grad
        keep = self.done.to(torch.uint8).argsort(stable=True)[:size]
        for name in ("rows", "x", "clean", "v", "done"):
            setattr(self, name, getattr(self, name)[keep])
        return grad[keep]

    def move(self, grad: Tensor, index: Tensor, config: GenerateConfig, step: int) -> None:
        """v <- zeta v + step(grad), x <- clip(x + v + s xi); no noise on the last step."""
        dtype = self.x.dtype
        self.v = config.momentum * self.v + RULES[config.rule](grad, config.eta).to(dtype)
        self.clean = self.x = (self.x + self.v).clamp(0, 1)
        if config.noise and step < config.steps - 1:
            xi = keyed.normal(index[self.rows], self.x[0].numel(), config.seed, "langevin", step, dtype)
            self.x = (self.clean + config.noise * xi.view_as(self.x)).clamp(0, 1)


class _Recorder:
    """Energy traces and frames of a run, if they were asked for."""

    def __init__(self, config: GenerateConfig, x0: Tensor, trace: bool, frames_every: int) -> None:
        shape = (config.steps + 1, 3, len(x0))
        self.trace = torch.full(shape, torch.nan, dtype=torch.float64, device=x0.device) if trace else None
        self.every, self.frames, self.at = frames_every, [], []

    def record(self, step: int, batch: _Batch, values: Tensor, x: Tensor) -> None:
        """Readings (3, B) and images of the chains that still move; ``x``: the images of those that have ended."""
        active = ~batch.done
        if self.trace is not None:
            self.trace[step][:, batch.rows[active]] = values[:, active]
        if self.every and step % self.every == 0:
            frame = x.clone()
            frame[batch.rows[active]] = batch.clean[active]
            self.frames.append(frame)
            self.at.append(step)

    def hand_over(self, out: Chains) -> None:
        """Add the end and put everything into the result."""
        if self.trace is not None:
            full = out.steps == len(self.trace) - 1
            self.trace[-1][:, full] = out.end[:, full]
        out.trace = self.trace
        if self.every:
            last = int(out.steps.max())
            keep = sum(t < last for t in self.at)  # a frame of the last step itself is replaced by the end
            out.frames, out.frame_steps = torch.stack([*self.frames[:keep], out.x]), [*self.at[:keep], last]


def sample(model: nn.Module, x0: Tensor, labels: Tensor, index: Tensor, config: GenerateConfig,
           reference: Reference | None = None, *, trace: bool = False, frames_every: int = 0,
           target: Tensor | None = None) -> Chains:
    """Run one batch of chains from x0 (n, C, H, W) in [0, 1]; ``index`` (n,) are the samples' global numbers.

    ``reference``: real energies (`reference_energies`), needed by the stops 'mean_band' and 'quantile'. ``target``
    (n,): e*, if not drawn from ``reference``. The model runs in eval mode and keeps its parameters, gradients and mode;
    energies are float32 or wider. The check of a step uses the forward pass that its gradient needs. A chain that stops
    after a noisy step is returned as it was before that noise. Batches shrink as chains end: to any size on a CPU, to
    eighths of the full size elsewhere (few shapes; ended chains fill up).
    """
    limits = Limits.make(reference, index, labels, config, target)
    every = torch.arange(len(x0), device=x0.device)
    none = torch.zeros_like(every, dtype=torch.bool)
    multiple = 1 if x0.device.type == "cpu" else max(1, len(x0) // 8)
    x, steps, start = x0.clone(), torch.full_like(labels, config.steps), None
    batch, recorder = _Batch(every, x0, x0, torch.zeros_like(x0), none), _Recorder(config, x0, trace, frames_every)
    half = torch.autocast(x0.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
    with attacks.attack_mode(model, "eval"), half:
        for t in range(config.steps):
            y = labels[batch.rows]
            grad, logits = attacks.input_gradient(model, batch.x, lambda f, y=y: guided_energy(f, y, config.w))
            values = readings(logits, y)
            start = values if start is None else start
            recorder.record(t, batch, values, x)
            now = limits.stop(values, batch.rows, t, config) & ~batch.done
            x[batch.rows[now]], steps[batch.rows[now]] = batch.clean[now], t
            batch.done = batch.done | now
            grad = batch.shrink(grad, multiple)
            if bool(batch.done.all()):
                break
            batch.move(grad, index, config, t)
        x[batch.rows[~batch.done]] = batch.clean[~batch.done]
        with torch.no_grad():
            end = readings(model(x), labels)
    reached = (steps < config.steps) | limits.stop(end, every, config.steps, config)
    out = Chains(x, x0, labels, index, limits.target, steps, reached, end if start is None else start, end)
    recorder.hand_over(out)
    return out
