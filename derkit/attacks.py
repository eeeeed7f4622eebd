"""Attacks on images x (B, C, H, W) in [0, 1]; eps is in pixel units; every x* stays in [0, 1].

Gradients are taken with respect to x only (`torch.autograd.grad`): parameter gradients are untouched.
``bn_mode`` says how BatchNorm behaves during the attack and is part of every record:
``'eval'`` uses the running statistics, ``'train'`` those of the batch, and in both cases neither the statistics
nor any module's mode is changed afterwards. Dropout is always off inside an attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from derkit.attack_losses import LOSSES
from derkit.distributed import Share, draw
from derkit.energy import cross_entropy, upcast
from derkit.errors import DerkitError, pick

BN_MODES = ("eval", "train")
NORMS = ("linf", "l2")
Generator = torch.Generator | Share | None  # a Share: this process's part of a batch that several work on


# ---------------------------------------------------------------------------------------------- checks and state
def check_batch(x: Tensor, y: Tensor, model: nn.Module | None = None) -> None:
    """Raise DerkitError unless x is a float batch in [0, 1] and y holds classes of the model. Costs a host sync."""
    if x.ndim != 4 or not x.is_floating_point():
        raise DerkitError(f"x must be a float batch (B, C, H, W), found {x.dtype} of shape {tuple(x.shape)}.")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise DerkitError(f"labels must be integers of shape ({x.shape[0]},), found {y.dtype} of shape {tuple(y.shape)}.")
    if not x.numel():
        return
    low, high = x.min().item(), x.max().item()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise DerkitError(f"x must lie in [0, 1], found [{low:.4g}, {high:.4g}]. Put the normaliser inside the model "
                          "(derkit.models.Normalize), and divide byte images by 255.")
    low, high = y.min().item(), y.max().item()
    classes = math.inf if model is None else output_size(model, x)
    if low < 0 or high >= classes:
        raise DerkitError(f"labels must lie in [0, {classes}), found [{low}, {high}].")


def output_size(model: nn.Module, x: Tensor) -> int:
    """The model's number of classes: from its spec, else from the logits of one image."""
    spec = getattr(model, "spec", None)
    if spec:
        return spec["classes"]
    with torch.no_grad(), attack_mode(model):
        return model(x[:1]).shape[1]


def check_eps(eps: float, norm: str = "linf") -> float:
    """eps as a float, in [0, 1] for L_inf, or DerkitError. `derkit.config.parse_eps` reads text such as '8/255'."""
    high = 1 if norm == "linf" else math.inf
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not (0 <= eps <= high and math.isfinite(eps)):
        expected = "a number in [0, 1] (pixel units)" if norm == "linf" else "a finite number >= 0"
        raise DerkitError(f"eps must be {expected}, found {eps!r}. For 8/255 write 8 / 255.")
    return float(eps)


def _prepare(model: nn.Module, x: Tensor, y: Tensor, eps: float, check: bool, norm: str = "linf") -> Tensor:
    """x without a graph, after the checks; that of eps is free and always made."""
    check_eps(eps, norm)
    if check:
        check_batch(x, y, model)
    return x.detach()


@contextmanager
def attack_mode(model: nn.Module, bn_mode: str = "eval") -> Iterator[None]:
    """Put the model into attack mode, and restore every module's mode and BatchNorm state afterwards.

    'train': BatchNorm normalises with batch statistics and leaves its running statistics alone.
    """
    if bn_mode not in BN_MODES:
        raise DerkitError(f"bn_mode must be one of {BN_MODES}, found {bn_mode!r}.")
    modes = [(m, m.training) for m in model.modules()]
    norms = [(m, m.track_running_stats) for m in model.modules() if isinstance(m, _BatchNorm)]
    model.eval()
    if bn_mode == "train":
        for m, _ in norms:
            m.training, m.track_running_stats = True, False  # False: use batch statistics, update nothing
    try:
        yield
    finally:
        for m, tracked in norms:
            m.track_running_stats = tracked
        for m, training in modes:
            m.training = training


def input_gradient(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(d/dx sum_b loss(f(x))_b, logits), with respect to x only. The sum keeps each sample's gradient its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        grad = torch.autograd.grad(loss(logits).sum(), x)[0]
    return grad.detach(), logits.detach()


# ------------------------------------------------------------------------------------------------- single-step
def _uniform(x: Tensor, radius: float, generator: Generator) -> Tensor:
    return (draw(torch.rand, x.shape, generator, device=x.device, dtype=x.dtype) * 2 - 1) * radius


def _single_step(model, x, y, start: Tensor, step: float, bn_mode: str) -> tuple[Tensor, Tensor]:
    with attack_mode(model, bn_mode):
        grad, logits = input_gradient(model, start, lambda f: cross_entropy(f, y))
    return start + step * grad.sign(), logits


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, bn_mode: str = "eval", generator=None,
         check: bool = True, return_start: bool = False):
    """FGSM: clip(x + eps sign(grad CE(x)), 0, 1) (Goodfellow et al., arXiv 1412.6572).

    With ``return_start`` also returns the starting point and its logits, which the gradient needed anyway.
    """
    x = _prepare(model, x, y, eps, check)
    x_adv, logits = _single_step(model, x, y, x, eps, bn_mode)
    x_adv = x_adv.clamp(0, 1)
    return (x_adv, x, logits) if return_start else x_adv


def rs_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, alpha: float | None = None, bn_mode: str = "eval",
            generator: Generator = None, check: bool = True, return_start: bool = False):
    """RS-FGSM (arXiv 2001.03994): start U(-eps, eps) clipped to valid pixels, step alpha = 1.25 eps, project to the ball."""
    x = _prepare(model, x, y, eps, check)
    start = (x + _uniform(x, eps, generator)).clamp(0, 1)
    x_adv, logits = _single_step(model, x, y, start, 1.25 * eps if alpha is None else alpha, bn_mode)
    x_adv = project(x_adv, x, eps)
    return (x_adv, start, logits) if return_start else x_adv


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, alpha: float | None = None, k: float = 2.0,
           bn_mode: str = "eval", generator: Generator = None, check: bool = True,
           return_start: bool = False):
    """N-FGSM (arXiv 2202.01181): start U(-k eps, k eps) clipped to valid pixels, step alpha = eps, NO projection.

    The result may leave the eps ball (up to (k + 1) eps): use it for training, never to report robustness.
    """
    x = _prepare(model, x, y, eps, check)
    start = (x + _uniform(x, k * eps, generator)).clamp(0, 1)
    x_adv, logits = _single_step(model, x, y, start, eps if alpha is None else alpha, bn_mode)
    x_adv = x_adv.clamp(0, 1)
    return (x_adv, start, logits) if return_start else x_adv


# -------------------------------------------------------------------------------------------------------- PGD
def _flat_norm(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """x_adv into the eps ball around x and into [0, 1]."""
    if norm == "linf":
        return torch.clamp(x_adv, (x - eps).clamp_min(0), (x + eps).clamp_max(1))
    delta = x_adv - x
    return (x + delta * (eps / _flat_norm(delta)).clamp_max(1)).clamp(0, 1)


def _random_start(x: Tensor, eps: float, norm: str, generator) -> Tensor:
    if norm == "linf":
        return (x + _uniform(x, eps, generator)).clamp(0, 1)
    g = draw(torch.randn, x.shape, generator, device=x.device, dtype=x.dtype)
    r = draw(torch.rand, (x.shape[0], 1, 1, 1), generator, device=x.device, dtype=x.dtype)
    return (x + eps * r ** (1 / x[0].numel()) * g / _flat_norm(g)).clamp(0, 1)


def choose_targets(logits: Tensor, y: Tensor, targets: Tensor | str, generator=None) -> Tensor:
    """Target classes (B,): given as a tensor, 'least_likely' under the logits, or 'random' among the wrong classes."""
    if isinstance(targets, Tensor):
        if targets.shape != y.shape or (targets == y).any():
            raise DerkitError(f"targets must have shape {tuple(y.shape)} and differ from the labels.")
        return targets
    if targets == "least_likely":
        return upcast(logits).scatter(1, y.view(-1, 1), float("inf")).argmin(1)
    if targets == "random":
        k = logits.shape[1]
        return (y + torch.randint(1, k, y.shape, generator=generator, device=y.device)) % k
    raise DerkitError(f"targets must be 'least_likely', 'random' or a tensor of classes, found {targets!r}.")


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float | None = None, steps: int = 10,
        norm: str = "linf", loss: str = "ce", targeted: bool = False, restarts: int = 1, random_start: bool = True,
        bn_mode: str = "eval", generator: Generator = None, *, targets: Tensor | str = "least_likely",
        decay: bool = False, any_iterate: bool = False, check: bool = True) -> Tensor:
    """Projected gradient descent (arXiv 1706.06083), L_inf or L_2, untargeted or targeted.

    alpha: step size; default eps/4 (2/255 at eps 8/255), or 2 eps with ``decay`` (which shrinks it to 0 by a cosine).
    loss: 'ce', 'margin' (CW), 'dlr', or 'kl' (TRADES: against p(.|x), start x + 0.001 N(0, 1)).
    targeted: move towards ``targets`` ('least_likely', 'random' or a tensor) instead of away from y.
    restarts: an image counts as fooled if ANY restart fools the model; among failures the highest loss is kept.
    any_iterate: also accept a success at any intermediate step (a stronger evaluation than the last iterate).
    Returns x* (B, C, H, W) in [0, 1] and within eps of x. Raises DerkitError on bad arguments.
    """
    loss_fn = pick("attack loss", loss, LOSSES)
    if norm not in NORMS:
        raise DerkitError(f"norm must be one of {NORMS}, found {norm!r}.")
    if steps < 0 or restarts < 1:
        raise DerkitError(f"steps must be >= 0 and restarts >= 1, found {steps} and {restarts}.")
    x = _prepare(model, x, y, eps, check, norm)
    if eps == 0 or not x.numel():
        return x.clone()
    alpha = alpha if alpha is not None else (2 * eps if decay else eps / 4)
    with attack_mode(model, bn_mode):
        sign, goal, reference = 1.0, y, y
        if targeted or loss == "kl":
            with torch.no_grad():
                natural = model(x)
            if targeted:
                if loss == "kl":
                    raise DerkitError("loss 'kl' has no targeted form; use 'ce', 'margin' or 'dlr'.")
                reference = goal = choose_targets(natural, y, targets, generator)
                sign = -1.0
            else:
                reference = F.log_softmax(upcast(natural), 1)

        def success(logits: Tensor) -> Tensor:
            return (logits.argmax(1) == goal) if targeted else (logits.argmax(1) != y)

        best, best_loss, fooled = x.clone(), None, None
        for _ in range(restarts):
            x_adv = x
            if loss == "kl":  # the KL has zero gradient at x itself
                x_adv = (x + 1e-3 * draw(torch.randn, x.shape, generator, device=x.device, dtype=x.dtype)).clamp(0, 1)
                x_adv = project(x_adv, x, eps, norm)
            elif random_start:
                x_adv = _random_start(x, eps, norm, generator)
            early, early_ok = x_adv, None
            for t in range(steps):
                grad, logits = input_gradient(model, x_adv, lambda f: loss_fn(f, reference))
                if any_iterate:
                    hit = success(logits)
                    new = hit if early_ok is None else hit & ~early_ok
                    early = torch.where(new.view(-1, 1, 1, 1), x_adv, early)
                    early_ok = hit if early_ok is None else early_ok | hit
                step = alpha * (0.5 * (1 + math.cos(math.pi * t / steps)) if decay else 1.0)
                direction = grad.sign() if norm == "linf" else grad / _flat_norm(grad)
                x_adv = project(x_adv + sign * step * direction, x, eps, norm)
            if restarts == 1 and not any_iterate:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
            value, ok = sign * loss_fn(logits, reference), success(logits)
            if early_ok is not None:
                x_adv = torch.where((early_ok & ~ok).view(-1, 1, 1, 1), early, x_adv)
                ok = ok | early_ok
            if best_loss is None:
                take = torch.ones_like(ok)
                fooled, best_loss = ok, value
            else:
                take = ~fooled & (ok | (value > best_loss))
                best_loss = torch.where(take, value, best_loss)
                fooled = fooled | ok
            best = torch.where(take.view(-1, 1, 1, 1), x_adv, best)
    return best


ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "rs_fgsm": rs_fgsm, "n_fgsm": n_fgsm, "pgd": pgd}
