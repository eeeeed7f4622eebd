"""Regularisers that combine with every training method: DER and its variants, GradAlign, ELLE.

One signature: ``value(logits, step) -> scalar``, plus the names of the extra points whose logits it needs. The points join
the method's own in a single forward. Adding one: a function under ``@regularizer`` (or ``@variant`` for a form of DER).

DER, our reading. The body of arXiv 2505.22486 could not be obtained; its abstract says that the Delta Energy Regularizer
is "designed to smoothen the energy landscape during training". What follows is a family of forms with that aim, compared
by measurement; none of them is quoted from the paper:

    L = L_AT(x*, y) + lambda mean_b R(d_b),   R(d) = |d|, d^2 or Huber,   d = a difference of energies (the variant)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from derkit.attacks import attack_mode
from derkit.config import TrainConfig
from derkit.energy import cross_entropy, delta_energy, joint_energy, loss_linearity, marginal_energy
from derkit.errors import pick
from derkit.losses import Logits, Step

# -------------------------------------------------------------------------------------------------------- points


def _on_segment(step: Step) -> Tensor:
    """x_u = x + u (x* - x), u ~ U(0, 1) per sample."""
    step.u = step.rand(len(step.x))
    return torch.lerp(step.x, step.x_adv, step.u.view(-1, 1, 1, 1))


def _in_ball(step: Step) -> Tensor:
    """x + U(-eps, eps), not clipped (as GradAlign and ELLE do)."""
    return step.x + (2 * step.rand(*step.x.shape) - 1) * step.config.eps


POINTS: dict[str, Callable[[Step], Tensor]] = {
    "adv": lambda step: step.x_adv,
    "nat": lambda step: step.x,
    "mid": _on_segment,
    "ball": _in_ball,
    "ball_b": _in_ball,
}


def make_points(step: Step, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The named points of a step. 'ball_c' lies between 'ball' and 'ball_b', at step.u."""
    points = {name: POINTS[name](step) for name in dict.fromkeys(names) if name != "ball_c"}
    if "ball_c" in names:
        step.u = step.rand(len(step.x))
        points["ball_c"] = torch.lerp(points["ball"], points["ball_b"], step.u.view(-1, 1, 1, 1))
    return points


# ----------------------------------------------------------------------------------------------------------- DER
@dataclass(frozen=True)
class Variant:
    """A form of DER: the points it needs, and the differences that are driven to zero (a tuple of (B,) tensors)."""

    points: tuple[str, ...]
    differences: Callable[[Logits, Step], tuple[Tensor, ...]]


VARIANTS: dict[str, Variant] = {}


def variant(*points: str):
    """Register a form of DER under the function's name (a trailing underscore is dropped)."""

    def register(fn: Callable[[Logits, Step], tuple[Tensor, ...]]):
        VARIANTS[fn.__name__.rstrip("_")] = Variant(points, fn)
        return fn

    return register


@variant("nat")
def marginal(f: Logits, step: Step):
    """dE(x)."""
    return (delta_energy(f["nat"], f["adv"]),)


@variant("nat")
def joint(f: Logits, step: Step):
    """dE(x, y)."""
    return (delta_energy(f["nat"], f["adv"], step.y),)


@variant("nat")
def both(f: Logits, step: Step):
    """dE(x) and dE(x, y)."""
    return delta_energy(f["nat"], f["adv"]), delta_energy(f["nat"], f["adv"], step.y)


@variant("nat")
def abnormal(f: Logits, step: Step):
    """relu(CE(x) - CE(x*)): acts on abnormal adversarial examples only."""
    return (F.relu(cross_entropy(f["nat"], step.y) - cross_entropy(f["adv"], step.y)),)


@variant("nat")
def hinge(f: Logits, step: Step):
    """relu(dE(x) - m), m a running mean of dE(x) (decay 0.99): acts on jumps of the delta energy."""
    d = delta_energy(f["nat"], f["adv"])
    mean = step.mean(d)
    m = step.state.get("hinge_mean", mean)
    step.state["hinge_mean"] = 0.99 * m + 0.01 * mean
    return (F.relu(d - m),)


@variant("nat", "mid")
def segment(f: Logits, step: Step):
    """E(x) - E(x_u): the marginal energy is smooth along the attack path."""
    return (marginal_energy(f["nat"]) - marginal_energy(f["mid"]),)


@variant("nat", "mid")
def segment_joint(f: Logits, step: Step):
    """E(x, y) - E(x_u, y)."""
    return (joint_energy(f["nat"], step.y) - joint_energy(f["mid"], step.y),)


@variant("nat", "mid")
def segment_ce(f: Logits, step: Step):
    """CE(x, y) - CE(x_u, y)."""
    return (cross_entropy(f["nat"], step.y) - cross_entropy(f["mid"], step.y),)


@variant("nat", "ball")
def ball(f: Logits, step: Step):
    """E(x) - E(x + r), r uniform in the ball: the same smoothing, away from the attack path."""
    return (marginal_energy(f["nat"]) - marginal_energy(f["ball"]),)


def _bump(energies: tuple[Tensor, Tensor, Tensor], u: Tensor) -> Tensor:
    nat, mid, adv = energies
    return mid - torch.lerp(nat, adv, u)


@variant("nat", "mid")
def linear(f: Logits, step: Step):
    """E(x_u) - (1-u) E(x) - u E(x*): no bump of the energy between x and x*."""
    return (_bump(tuple(marginal_energy(f[k]) for k in ("nat", "mid", "adv")), step.u),)


@variant("nat", "mid")
def linear_both(f: Logits, step: Step):
    """The same for E(x) and E(x, y)."""
    return (*linear(f, step), _bump(tuple(joint_energy(f[k], step.y) for k in ("nat", "mid", "adv")), step.u))


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "square": torch.square,
    "huber": lambda d: F.huber_loss(d, torch.zeros_like(d), reduction="none"),
}


# -------------------------------------------------------------------------------------------------- regularisers
@dataclass(frozen=True)
class Regularizer:
    """A row of REGULARIZERS; ``points(config)`` names the extra points. ``warms_up``: lambda rises over config.warmup."""

    value: Callable[[Logits, Step], Tensor]
    points: Callable[[TrainConfig], tuple[str, ...]]
    warms_up: bool = True


REGULARIZERS: dict[str, Regularizer] = {}


def regularizer(name: str, points=lambda config: (), warms_up: bool = True):
    """Register a regulariser."""

    def register(value: Callable[[Logits, Step], Tensor]):
        REGULARIZERS[name] = Regularizer(value, points, warms_up)
        return value

    return register


@regularizer("der", points=lambda config: pick("variant", config.variant, VARIANTS).points)
def der(logits: Logits, step: Step) -> Tensor:
    """mean_b R(differences), the variant and R (penalty) from the config. Our reading of DER: see the module's text."""
    penalty = PENALTIES[step.config.penalty]
    return sum(penalty(d).mean() for d in VARIANTS[step.config.variant].differences(logits, step))


@regularizer("elle", points=lambda config: ("ball", "ball_b", "ball_c"))
def elle(logits: Logits, step: Step) -> Tensor:
    """ELLE: mean (l(x_c) - (1-u) l(x_a) - u l(x_b))^2 on random triplets in the ball (OpenReview SZzQz8ikwg)."""
    return loss_linearity(logits["ball"], logits["ball_c"], logits["ball_b"], step.u, step.y).mean()


def input_gradients(step: Step) -> tuple[Tensor, Tensor]:
    """(grad l(x) detached, grad l(x + r) with graph), r ~ U(-eps, eps), flattened to (B, D)."""
    both = []
    with attack_mode(step.model, step.config.bn_mode):
        for x, graph in ((step.x, False), (_in_ball(step), True)):
            x = x.detach().requires_grad_(True)
            loss = cross_entropy(step.model(x), step.y).sum()
            both.append(torch.autograd.grad(loss, x, create_graph=graph)[0].flatten(1))
    return both[0].detach(), both[1]


@regularizer("gradalign", warms_up=False)
def gradalign(logits: Logits, step: Step) -> Tensor:
    """GradAlign: mean 1 - cos(grad l(x), grad l(x + r)) (arXiv 2007.02617); samples with a zero gradient count as aligned."""
    a, b = input_gradients(step)
    norms = a.norm(dim=1), b.detach().norm(dim=1)
    alive = (norms[0] > 0) & (norms[1] > 0)
    b = torch.where(alive[:, None], b, torch.ones_like(b))  # keeps NaN out of the backward of the cosine
    a = torch.where(alive[:, None], a, torch.ones_like(a))
    return (torch.where(alive, 1 - F.cosine_similarity(a, b, dim=1), 0.0)).sum() / len(a)


def strength(step: Step) -> float:
    """lambda at this moment of training: the config's weight, reached linearly over the warm-up share."""
    c = step.config
    if not REGULARIZERS[c.regularizer].warms_up or c.warmup == 0:
        return c.strength
    return c.strength * min(1.0, step.progress / c.warmup)
