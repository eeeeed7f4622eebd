"""The Delta Energy Regularizer (DER): pure functions of logits, and the object that uses them.

The body of arXiv 2505.22486 could not be read for this kit. Its abstract says that DER is "designed
to smoothen the energy landscape during training". The form ``norm`` is the one that a third party's
public re-implementation reports as the paper's eq. (7), in single-step training on abnormal
adversarial examples only (CE(x*) < CE(x)); the other forms are our own, and none is quoted from
the paper. Forms on E(x, y) alone, on the cross-entropy, on both energies at once, on the bump of
E between x and x*, and a hinge on jumps of dE(x) were tried as well and did not help more.

    L = L_AT(x*, y) + lambda mean_b R_b        R: one of the forms below, (B,), never negative

Logits are (B, K): ``nat`` at x, ``adv`` at x*, ``mid`` at x_u = x + u (x* - x), ``near`` at x + r.
"""

import torch
from torch import Tensor

from derkit.attacks import noise_in_ball
from derkit.config import TrainConfig
from derkit.energy import abnormal_mask, delta_energy

Logits = dict[str, Tensor]


def norm(nat: Tensor, adv: Tensor, y: Tensor, gamma: float = 0.0) -> Tensor:
    """max(0, sqrt(dE(x)^2 + dE(x, y)^2) - gamma): how far the attack moves (E(x), E(x, y)), as a
    third party reports eq. (7) of arXiv 2505.22486. 1e-12 keeps the root's gradient finite at 0."""
    square = delta_energy(nat, adv).square() + delta_energy(nat, adv, y).square()
    return ((square + 1e-12).sqrt() - gamma).clamp_min(0)


def gap(nat: Tensor, other: Tensor) -> Tensor:
    """|E(x) - E(x')|: to x* (``marginal``), to a point on the way to it (``segment``), or to a
    random one of the ball (``ball``, the attack not used). Our own forms."""
    return delta_energy(nat, other).abs()


marginal = segment = ball = gap
OTHER = dict(marginal="adv", segment="mid", ball="near")  # the point x' of each


class DER:
    """DER in training: asks for the points of its form, and averages over its samples.

    "Abnormal" is decided on the logits of the step itself, in the mode in which the model trains;
    the third party's code decides it with BatchNorm in eval mode, at two more forward passes."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def points(self, x: Tensor, x_adv: Tensor, rng: torch.Generator) -> Logits:
        """The images (B, C, H, W) whose logits are needed beside those of x*, by name."""
        points = {"nat": x}
        if self.config.variant == "segment":
            u = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device, dtype=x.dtype)
            points["mid"] = torch.lerp(x, x_adv, u)
        elif self.config.variant == "ball":  # not clipped to [0, 1], as in GradAlign and ELLE
            points["near"] = x + noise_in_ball(x, self.config.eps, self.config.norm, rng)
        return points

    def penalties(self, logits: Logits, y: Tensor) -> Tensor:
        """The form's value for every sample, (B,)."""
        nat, form = logits["nat"], self.config.variant
        if form == "norm":
            return norm(nat, logits["adv"], y, self.config.gamma)
        return gap(nat, logits[OTHER[form]])

    def __call__(self, logits: Logits, y: Tensor) -> Tensor:
        """Mean over the batch or, with a mask, over its abnormal examples (0 without any)."""
        values = self.penalties(logits, y)
        if not self.config.masked:
            return values.mean()
        chosen = abnormal_mask(logits["nat"], logits["adv"], y)
        return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp_min(1)
