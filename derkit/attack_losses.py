"""What attacks maximise: per-sample losses of logits (B, K) and labels (B,), in float32 or better."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from derkit.energy import cross_entropy, upcast
from derkit.errors import DerkitError


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} f_j - f_y, (B,): positive means misclassified (the CW loss)."""
    f = upcast(logits)
    others = f.scatter(1, y.view(-1, 1), float("-inf")).amax(1)
    return others - f.gather(1, y.view(-1, 1)).squeeze(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (AutoAttack): margin over the gap between the largest and third-largest logit."""
    if logits.shape[1] < 3:
        raise DerkitError(f"loss 'dlr' needs at least 3 classes, found {logits.shape[1]}; use 'margin'.")
    top = upcast(logits).topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def _kl(logits: Tensor, log_p: Tensor) -> Tensor:
    """KL(p(.|x) || p(.|x*)) against fixed natural log-probabilities."""
    return (log_p.exp() * (log_p - F.log_softmax(upcast(logits), 1))).sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "kl": _kl, "margin": margin, "dlr": dlr}
