"""Training methods: how adversarial examples are made and how they enter the loss. One signature for all of them.

A method is ``attack(step) -> (x_adv, x_start, logits_start)`` and ``loss(logits, step) -> scalar``, where ``logits`` maps
the names of the points that it asked for to their logits: "adv" (x*) always, "nat" (x) if listed in ``points``.
All points of a step go through the model in one forward. Adding a method: one loss function under ``@method``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit import attacks
from derkit.config import TrainConfig
from derkit.distributed import Share, batch_mean, draw
from derkit.energy import cross_entropy, marginal_energy, upcast

Logits = dict[str, Tensor]


@dataclass
class Step:
    """What a method or regulariser may look at in one training step. x, y: the batch; ``progress`` in [0, 1]."""

    model: nn.Module
    x: Tensor  # (B, C, H, W) in [0, 1]
    y: Tensor  # (B,)
    config: TrainConfig
    generator: torch.Generator | Share
    progress: float = 0.0
    x_adv: Tensor | None = None  # x*, after the attack
    u: Tensor | None = None  # (B,) in [0, 1): the place on a segment, drawn with the point that needs it
    state: dict[str, Tensor] = field(default_factory=dict)  # what a regulariser keeps between steps; checkpointed

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) from the step's own generator."""
        return draw(torch.rand, shape, self.generator, device=self.x.device, dtype=self.x.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (B,) over the whole batch, also where several processes share it; no graph."""
        return batch_mean(values, self.generator)


@dataclass(frozen=True)
class Method:
    """A row of METHODS."""

    attack: Callable[[Step], tuple[Tensor, Tensor | None, Tensor | None]]
    loss: Callable[[Logits, Step], Tensor]
    points: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}


# ------------------------------------------------------------------------------------------------------- attacks
def no_attack(step: Step):
    """x itself."""
    return step.x, None, None


def single_step(step: Step):
    """FGSM, RS-FGSM or N-FGSM, by the method's name; the start's logits come free with the gradient."""
    c = step.config
    options = {"fgsm": {}, "n_fgsm": dict(alpha=c.step_size, k=c.k)}.get(c.method, dict(alpha=c.step_size))
    attack = attacks.ATTACKS[c.method]
    return attack(step.model, step.x, step.y, c.eps, bn_mode=c.bn_mode, generator=step.generator, check=False,
                  return_start=True, **options)


def multi_step(step: Step, loss: str = "ce"):
    """PGD with the config's steps, step size and norm."""
    c = step.config
    x_adv = attacks.pgd(step.model, step.x, step.y, c.eps, alpha=c.step_size, steps=c.steps, norm=c.norm, loss=loss,
                        bn_mode=c.bn_mode, generator=step.generator, check=False)
    return x_adv, None, None


def method(name: str, attack: Callable, points: tuple[str, ...] = ()):
    """Register a loss function as a training method."""

    def register(loss: Callable[[Logits, Step], Tensor]):
        METHODS[name] = Method(attack, loss, points)
        return loss

    return register


# -------------------------------------------------------------------------------------------------------- losses
@method("standard", no_attack)
@method("fgsm", single_step)
@method("rs_fgsm", single_step)
@method("n_fgsm", single_step)
@method("pgd", multi_step)
def adversarial(logits: Logits, step: Step) -> Tensor:
    """L = CE(x*, y)."""
    return cross_entropy(logits["adv"], step.y).mean()


def _kl(logits: Logits) -> Tensor:
    """KL(p(.|x) || p(.|x*)), (B,), gradient through both."""
    log_p, log_q = (F.log_softmax(upcast(logits[k]), 1) for k in ("nat", "adv"))
    return (log_p.exp() * (log_p - log_q)).sum(1)


@method("trades", lambda step: multi_step(step, "kl"), points=("nat",))
def trades(logits: Logits, step: Step) -> Tensor:
    """L = CE(x, y) + beta KL(p(.|x) || p(.|x*)) (arXiv 1901.08573)."""
    return (cross_entropy(logits["nat"], step.y) + step.config.beta * _kl(logits)).mean()


@method("weat", lambda step: multi_step(step, "kl"), points=("nat",))
def weat(logits: Logits, step: Step) -> Tensor:
    """WEAT (arXiv 2407.06315): the terms of TRADES weighted per sample by 1 / log(1 + e^|E(x)|), weights detached."""
    w = 1 / F.softplus(marginal_energy(logits["nat"]).abs()).detach()
    return (w * (cross_entropy(logits["nat"], step.y) + step.config.beta * _kl(logits))).mean()
