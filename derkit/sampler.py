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
from derkit.targets import Reference, energy_targets


# ---------------------------------------------------------------------------------------------------------- steps
def plain(grad: Tensor, eta: float) -> Tensor:
    """-eta/2 grad: Langevin's drift, on the model's own scale (ECCV'24)."""
    return -0.5 * eta * grad


def normalised(grad: Tensor, eta: float) -> Tensor:
    """-eta grad/||grad||_2: every image moves by eta, whatever the model's scale, so that models can be compared."""
    return -eta * grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


RULES: dict[str, Callable[[Tensor, float], Tensor]] = {"normalised": normalised, "plain": plain}


# ---------------------------------------------------------------------------------------------------------- stops
@dataclass(frozen=True)
class Check:
    """What a stop rule may look at, (B,) each: the energies now, and the chain's target, class mean and class
    deviation."""

    joint: Tensor
    target: Tensor
    mean: Tensor
    std: Tensor


def fixed(check: Check, config: GenerateConfig) -> Tensor:
    """Never: every chain takes config.steps steps."""
    return torch.zeros_like(check.joint, dtype=torch.bool)


def mean_band(check: Check, config: GenerateConfig) -> Tensor:
    """(E(x, y) - mean of the class)^2 small: the two-sided band of the ECCV'24 code, whose width is nowhere stated;
    ours is ``band`` class standard deviations. A chain that steps over the band never stops."""
    return (check.joint - check.mean).abs() < config.band * check.std


def quantile(check: Check, config: GenerateConfig) -> Tensor:
    """E(x, y) <= e*: the chain has come down to the energy of a real image of its class (one-sided, our reading)."""
    return check.joint <= check.target


Stop = Callable[[Check, GenerateConfig], Tensor]
STOPS: dict[str, Stop] = {"fixed": fixed, "mean_band": mean_band, "quantile": quantile}


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
    """What became of a batch of chains: images (B, C, H, W) in [0, 1], everything else (B,) unless said.

    ``steps``: steps taken; ``reached``: the stop rule holds at the end; ``joint``, ``marginal``, ``prob``: E(x, y),
    E(x), p(y|x) of ``x``, and with 0 of ``x0``; ``target``: e* (NaN without real energies). ``trace`` (steps + 1, 3,
    B): the readings of every chain at every step, NaN once it has stopped. ``frames`` (F, B, C, H, W): images at
    ``frame_steps``.
    """

    x: Tensor
    x0: Tensor
    labels: Tensor
    index: Tensor
    target: Tensor
    steps: Tensor
    reached: Tensor
    start: Tensor = field(repr=False)  # (3, B)
    end: Tensor = field(repr=False)  # (3, B)
    trace: Tensor | None = None
    frames: Tensor | None = None
    frame_steps: list[int] = field(default_factory=list)


def _limits(reference: Reference | None, index: Tensor, labels: Tensor, config: GenerateConfig) -> dict[str, Tensor]:
    if reference is None or not bool((reference.counts[labels] > 0).all()):
        nan = torch.full(labels.shape, torch.nan, dtype=torch.float64, device=labels.device)
        return dict(target=nan, mean=nan, std=nan)
    mean, std = reference.moments(labels)
    target = energy_targets(reference, index, labels, config.seed, config.low, config.high)
    return dict(target=target, mean=mean, std=std)


def sample(model: nn.Module, x0: Tensor, labels: Tensor, index: Tensor, config: GenerateConfig,
           reference: Reference | None = None, *, trace: bool = False, frames_every: int = 0,
           target: Tensor | None = None) -> Chains:
    """Run one batch of chains from x0 (B, C, H, W) in [0, 1]; ``index`` (B,) are the samples' global numbers.

    ``reference``: real energies (`reference_energies`), needed by the stops 'mean_band' and 'quantile'. ``target``:
    e*, if not drawn from ``reference``. The model runs in eval mode and keeps its parameters, gradients and mode;
    energies are float32 or wider. The check of a step uses the forward pass that its gradient needs. Batches shrink
    as chains finish: to any size on a CPU, to eighths of the full size elsewhere (few shapes; finished chains fill
    up).
    """
    limits = _limits(reference, index, labels, config) | ({} if target is None else {"target": target.double()})
    rule, stop = RULES[config.rule], STOPS[config.stop]
    n, dtype = len(x0), x0.dtype
    out = Chains(x0.clone(), x0, labels, index, limits["target"], torch.full_like(labels, config.steps),
                 torch.zeros_like(labels, dtype=torch.bool), *(torch.full((3, n), torch.nan, dtype=torch.float64,
                                                                          device=x0.device) for _ in range(2)))
    if trace:
        out.trace = out.start.new_full((config.steps + 1, 3, n), torch.nan)
    frames: list[Tensor] = []
    multiple = 1 if x0.device.type == "cpu" else max(1, n // 8)
    context = nullcontext() if config.precision != "bf16" else torch.autocast(x0.device.type, torch.bfloat16)
    rows = torch.arange(n, device=x0.device)  # which chain each row of the batch is
    x, clean, v, done = x0, x0, torch.zeros_like(x0), torch.zeros(n, dtype=torch.bool, device=x0.device)

    def may_stop(values: Tensor, which: Tensor, t: int) -> Tensor:
        if t < config.min_steps:
            return torch.zeros_like(which, dtype=torch.bool)
        check = Check(values[0], *(limits[k][which] for k in ("target", "mean", "std")))
        return stop(check, config) & (values[2] >= config.p_min)

    with attacks.attack_mode(model, "eval"), context:
        for t in range(config.steps):
            y = labels[rows]
            grad, logits = attacks.input_gradient(model, x, lambda f, y=y: guided_energy(f, y, config.w))
            values = readings(logits, y)
            if t == 0:
                out.start = values
            now = may_stop(values, rows, t) & ~done
            if frames_every and t % frames_every == 0:
                frames.append(_frame(out.x, rows[~done], clean[~done]))
                out.frame_steps.append(t)
            if trace:
                out.trace[t][:, rows[~done]] = values[:, ~done]
            out.x[rows[now]], out.steps[rows[now]] = clean[now], t
            done = done | now
            rows, x, clean, v, done, grad = _compact(multiple, done, rows, x, clean, v, done, grad)
            if bool(done.all()):
                break
            v = config.momentum * v + rule(grad, config.eta).to(dtype)
            clean = x = (x + v).clamp(0, 1)
            if config.noise and t < config.steps - 1:
                xi = keyed.normal(index[rows], x[0].numel(), config.seed, "langevin", t, dtype).view_as(x)
                x = (clean + config.noise * xi).clamp(0, 1)
        out.x[rows[~done]] = clean[~done]
        with torch.no_grad():
            out.end = readings(model(out.x), labels)
    every = torch.arange(n, device=x0.device)
    out.reached = (out.steps < config.steps) | may_stop(out.end, every, config.steps)
    if config.steps == 0:
        out.start = out.end
    last = out.steps == config.steps
    if trace:
        out.trace[config.steps][:, last] = out.end[:, last]
    if frames_every:
        out.frames, out.frame_steps = torch.stack([*frames, out.x]), [*out.frame_steps, config.steps]
    return out


def _frame(x: Tensor, rows: Tensor, now: Tensor) -> Tensor:
    frame = x.clone()
    frame[rows] = now
    return frame


def _compact(multiple: int, done: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """Drop finished chains, down to the next multiple of ``multiple``; finished ones that stay only fill up the
    batch."""
    size = -(-int((~done).sum()) // multiple) * multiple
    if size >= len(done):
        return state
    keep = done.to(torch.uint8).argsort(stable=True)[:size]
    return tuple(t[keep] for t in state)
