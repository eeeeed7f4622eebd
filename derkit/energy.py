"""Energies of a classifier: pure functions of its logits.

Sign convention, stated once for the whole kit (arXiv 2505.22486):

    E(x)     = -logsumexp_k f_k(x)       marginal energy
    E(x, y)  = -f_y(x)                   joint energy
    CE(x, y) = E(x, y) - E(x)            cross-entropy
    dE       = E(natural) - E(adversarial)

Logits are (B, K), labels (B,), every result is (B,) unless said. Half-precision logits are cast
to float32 first: energies are differences of large numbers. float32 and float64 stay as they are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def upcast(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; anything wider unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def marginal_energy(logits: Tensor) -> Tensor:
    """E(x) = -logsumexp_k f_k(x). Lower means a higher unnormalised density p(x)."""
    return -torch.logsumexp(upcast(logits), dim=1)


def joint_energy(logits: Tensor, labels: Tensor) -> Tensor:
    """E(x, y) = -f_y(x)."""
    return -upcast(logits).gather(1, labels.view(-1, 1)).squeeze(1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE(x, y) = E(x, y) - E(x), per sample (computed as log-softmax, which cannot cancel)."""
    return F.cross_entropy(upcast(logits), labels, reduction="none")


def delta_energy(logits: Tensor, logits_adv: Tensor, labels: Tensor | None = None) -> Tensor:
    """dE(x) = E(x) - E(x*), with labels dE(x, y) = E(x, y) - E(x*, y): natural minus adversarial,
    so that an attack that lowers the energy gives dE > 0 (the sign of arXiv 2505.22486)."""
    if labels is None:
        return marginal_energy(logits) - marginal_energy(logits_adv)
    return joint_energy(logits, labels) - joint_energy(logits_adv, labels)


def abnormal_mask(logits_start: Tensor, logits_adv: Tensor, labels: Tensor) -> Tensor:
    """Abnormal adversarial examples (AAE, arXiv 2404.08154), bool: the attack ended on a lower loss
    than it had at its start, x itself (then dE(x) < dE(x, y)) or a noisy point. Ties are normal."""
    return cross_entropy(logits_adv, labels) < cross_entropy(logits_start, labels)


def trades_decomposition(logits: Tensor, logits_adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(kl, conditional, marginal): KL(p(.|x) || p(.|x*)) in energies (arXiv 2407.06315), the sum of
    sum_k p_k(x) [E(x*, k) - E(x, k)] and E(x) - E(x*) = dE(x)."""
    f, g = upcast(logits), upcast(logits_adv)
    conditional = (f.softmax(1) * (f - g)).sum(1)  # E(x*, k) - E(x, k) = f_k(x) - f_k(x*)
    marginal = delta_energy(logits, logits_adv)
    return conditional + marginal, conditional, marginal


def loss_linearity(logits_a: Tensor, logits_c: Tensor, logits_b: Tensor, u: Tensor,
                   labels: Tensor) -> Tensor:
    """E_lin of ELLE (OpenReview SZzQz8ikwg): (l(x_c) - (1-u) l(x_a) - u l(x_b))^2 at
    x_c = (1-u) x_a + u x_b, with l the cross-entropy."""
    chord = (1 - u) * cross_entropy(logits_a, labels) + u * cross_entropy(logits_b, labels)
    return (cross_entropy(logits_c, labels) - chord).square()
