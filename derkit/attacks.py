"""Attacks on images x (B, C, H, W) in [0, 1]; eps is in pixel units; every x* stays in [0, 1].

Gradients are taken with respect to x only (`torch.autograd.grad`): parameter gradients are
untouched. ``bn_mode`` says how BatchNorm behaves during the attack and is part of every record:
``'eval'`` uses the running statistics, ``'train'`` those of the batch, and in both cases neither
the statistics nor any module's mode is changed afterwards. Dropout is off inside an attack."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from derkit.energy import cross_entropy, upcast
from derkit.util import DerkitError, pick

BN_MODES = ("eval", "train")
NORMS = ("linf", "l2")
Generator = torch.Generator | None


# ------------------------------------------ losses: what attacks raise, (B,) from logits (B, K)
def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} f_j - f_y: positive means misclassified (the CW loss, arXiv 1608.04644)."""
    f = upcast(logits)
    others = f.scatter(1, y.view(-1, 1), float("-inf")).amax(1)
    return others - f.gather(1, y.view(-1, 1)).squeeze(1)


def kl(logits: Tensor, log_p: Tensor) -> Tensor:
    """KL(p(.|x) || p(.|x*)) against fixed natural log-probabilities (B, K)."""
    return (log_p.exp() * (log_p - F.log_softmax(upcast(logits), 1))).sum(1)


LOSSES = {"ce": cross_entropy, "kl": kl, "margin": margin}


def check_batch(x: Tensor, y: Tensor, model: nn.Module | None = None) -> None:
    """DerkitError unless x is a float batch in [0, 1] and y holds classes. Costs a host sync."""
    if x.ndim != 4 or not x.is_floating_point():
        raise DerkitError(f"x must be floats (B, C, H, W), found {x.dtype} {tuple(x.shape)}.")
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise DerkitError(f"labels must be {len(x)} int64, found {y.dtype} {tuple(y.shape)}.")
    if not x.numel():
        return
    low, high, classes = x.min().item(), x.max().item(), math.inf
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise DerkitError(f"x must lie in [0, 1], found [{low:.4g}, {high:.4g}]. Put the normaliser"
                          " into the model (derkit.models.Normalize); divide bytes by 255.")
    if model is not None:
        with torch.no_grad(), attack_mode(model):
            classes = model(x[:1]).shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise DerkitError(f"labels must lie in [0, {classes}), found [{y.min()}, {y.max()}].")


def check_eps(eps: float, norm: str = "linf") -> float:
    """eps as a float, in [0, 1] for L_inf, or DerkitError. `parse_eps` reads text as '8/255'."""
    high = 1 if norm == "linf" else math.inf
    number = isinstance(eps, Real) and not isinstance(eps, bool)
    if not number or not (0 <= eps <= high and eps < math.inf):
        raise DerkitError(f"eps must be a number in [0, {high}] (pixel units), found {eps!r}. "
                          "For 8/255 write 8 / 255.")
    return float(eps)


def check_sizes(q: float = 0, **sizes: float | None) -> None:
    """DerkitError unless each size (None: its default) is a number from 0 on, and q below 1."""
    for name, value in (sizes | dict(q=q)).items():
        high = 1 if name == "q" else math.inf
        if value is not None and not (isinstance(value, Real) and 0 <= value < high):
            raise DerkitError(f"{name} must be a number in [0, {high}), found {value!r}.")


@contextmanager
def attack_mode(model: nn.Module, bn_mode: str = "eval") -> Iterator[None]:
    """Put the model into attack mode, and restore every module's mode and state afterwards. In
    'train' BatchNorm takes the statistics of the batch and leaves its running ones alone."""
    if bn_mode not in BN_MODES:
        raise DerkitError(f"bn_mode must be one of {BN_MODES}, found {bn_mode!r}.")
    before = [(m, name, getattr(m, name)) for m in model.modules()
              for name in ("training", "track_running_stats") if hasattr(m, name)]
    model.eval()
    for m in model.modules():
        if bn_mode == "train" and isinstance(m, _BatchNorm):
            m.training, m.track_running_stats = True, False  # False: use the batch, update nothing
    try:
        yield
    finally:
        for m, name, value in before:
            setattr(m, name, value)


def input_gradient(model: nn.Module, x: Tensor, loss: Callable) -> tuple[Tensor, Tensor]:
    """(d/dx sum_b loss(f(x))_b, logits). The sum keeps each sample's gradient its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        grad = torch.autograd.grad(loss(logits).sum(), x)[0]
    return grad.detach(), logits.detach()


def _lengths(v: Tensor) -> Tensor:
    """The L_2 norm of each image, (B, 1, 1, 1), never 0."""
    return v.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]


def project(x_adv: Tensor, x: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """x_adv into the eps ball around x and into [0, 1]."""
    if norm == "linf":
        return torch.clamp(x_adv, (x - eps).clamp_min(0), (x + eps).clamp_max(1))
    delta = x_adv - x
    return (x + delta * (eps / _lengths(delta)).clamp_max(1)).clamp(0, 1)


def noise_in_ball(x: Tensor, eps: float, norm: str = "linf", generator: Generator = None) -> Tensor:
    """Noise like x (B, C, H, W), uniform in the ball of radius eps. x plus it may leave [0, 1]."""
    options = dict(generator=generator, device=x.device, dtype=x.dtype)
    if norm == "linf":
        return (torch.rand(x.shape, **options) * 2 - 1) * eps
    g = torch.randn(x.shape, **options)
    r = torch.rand((x.shape[0], 1, 1, 1), **options)
    return eps * r ** (1 / x[0].numel()) * g / _lengths(g)


def _single_step(model: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, noise: float = 0,
                 projected: bool = True, q: float = 0, *, alpha: float | None = None,
                 bn_mode: str = "eval", generator: Generator = None, check: bool = True,
                 return_start: bool = False):
    """x* of one signed step of size alpha, default ``step`` eps, from noise up to ``noise`` eps.
    The smallest share q of each gradient's entries is left out."""
    check_eps(eps)
    check_sizes(q, alpha=alpha, k=noise)
    if check:
        check_batch(x, y, model)
    x = start = x.detach()
    if noise:
        start = (x + noise_in_ball(x, noise * eps, "linf", generator)).clamp(0, 1)
    with attack_mode(model, bn_mode):
        grad, logits = input_gradient(model, start, lambda f: cross_entropy(f, y))
    if q:
        size = grad.abs().flatten(1)
        low = size.kthvalue(max(1, round(q * size.shape[1])), dim=1).values
        grad = grad * (grad.abs() > low[:, None, None, None])
    x_adv = start + (step * eps if alpha is None else alpha) * grad.sign()
    x_adv = project(x_adv, x, eps) if projected else x_adv.clamp(0, 1)
    return (x_adv, start, logits) if return_start else x_adv


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, **options):
    """FGSM: clip(x + eps sign(grad CE(x)), 0, 1) (Goodfellow et al., arXiv 1412.6572).

    Options of all single steps: alpha (step size), bn_mode='eval', generator=None, check=True,
    return_start=False (True: also the start and its logits, which the gradient needed anyway)."""
    return _single_step(model, x, y, eps, step=1, **options)


def rs_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, **options):
    """RS-FGSM (arXiv 2001.03994): start U(-eps, eps) clipped to valid pixels, step alpha
    (default 1.25 eps), projection into the ball."""
    return _single_step(model, x, y, eps, step=1.25, noise=1, **options)


def n_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, k: float = 2.0, **options):
    """N-FGSM (arXiv 2202.01181): start U(-k eps, k eps) clipped to valid pixels, step alpha
    (default eps), NO projection: up to (k + 1) eps from x. Never report robustness with it."""
    return _single_step(model, x, y, eps, step=1, noise=k, projected=False, **options)


def zerograd(model: nn.Module, x: Tensor, y: Tensor, eps: float, *, q: float = 0.35, **options):
    """ZeroGrad (arXiv 2103.15476): RS-FGSM with step alpha (default 2 eps) along the signs of the
    gradient's larger entries; the smallest share q of every image's entries is zeroed."""
    return _single_step(model, x, y, eps, step=2, noise=1, q=q, **options)


def choose_targets(logits: Tensor, y: Tensor, targets: Tensor | str, generator: Generator = None):
    """Target classes (B,): a given tensor, 'least_likely' by the logits, or 'random' wrong ones."""
    k = logits.shape[1]
    if isinstance(targets, Tensor):
        if targets.shape != y.shape or ((targets == y) | (targets < 0) | (targets >= k)).any():
            raise DerkitError(f"targets must be {len(y)} classes below {k} other than the labels.")
        return targets
    if targets == "least_likely":
        return upcast(logits).scatter(1, y.view(-1, 1), float("inf")).argmin(1)
    if targets == "random":
        return (y + torch.randint(1, k, y.shape, generator=generator, device=y.device)) % k
    raise DerkitError(f"targets: 'least_likely', 'random' or a tensor of classes, not {targets!r}.")


def _aim(model: nn.Module, x: Tensor, y: Tensor, loss: str, targets: Tensor | str | None,
         generator: Generator) -> tuple[Callable, Callable]:
    """(what the attack raises, whether it has succeeded), both functions of logits to (B,)."""
    loss_of = LOSSES[loss]
    if targets is None and loss != "kl":
        return (lambda f: loss_of(f, y)), (lambda f: f.argmax(1) != y)
    with torch.no_grad():
        natural = model(x)
    if loss == "kl":
        log_p = F.log_softmax(upcast(natural), 1)
        return (lambda f: loss_of(f, log_p)), (lambda f: f.argmax(1) != y)
    goal = choose_targets(natural, y, targets, generator)
    return (lambda f: -loss_of(f, goal)), (lambda f: f.argmax(1) == goal)


def _run(model: nn.Module, x: Tensor, start: Tensor, eps: float, norm: str, sizes: list[float],
         raised: Callable, success: Callable | None) -> tuple[Tensor, Tensor, Tensor]:
    """Steps of the given sizes: (last iterate, first iterate with success, where there is one)."""
    x_adv = early = start
    hit = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for size in sizes:
        grad, logits = input_gradient(model, x_adv, raised)
        if success is not None:
            now = success(logits)
            early = torch.where((now & ~hit)[:, None, None, None], x_adv, early)
            hit = hit | now
        direction = grad.sign() if norm == "linf" else grad / _lengths(grad)
        x_adv = project(x_adv + size * direction, x, eps, norm)
    return x_adv, early, hit


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float | None = None,
        steps: int = 10, norm: str = "linf", loss: str = "ce", targeted: bool = False,
        restarts: int = 1, random_start: bool = True, bn_mode: str = "eval",
        generator: Generator = None, *, targets: Tensor | str = "least_likely",
        decay: bool = False, any_iterate: bool = False, check: bool = True) -> Tensor:
    """Projected gradient descent (arXiv 1706.06083), L_inf or L_2, untargeted or targeted.

    alpha: step size; default eps/4, or 2 eps with ``decay`` (which shrinks it to 0 by a cosine).
    loss: 'ce', 'margin' (CW), or 'kl' (TRADES: against p(.|x), start x + 0.001 N(0, 1)).
    targeted: towards ``targets`` ('least_likely', 'random' or a tensor) instead of away from y.
    restarts: an image counts as fooled if ANY restart fools the model; else the highest loss.
    any_iterate: also accept a success at any intermediate step (a stronger evaluation).
    Returns x* (B, C, H, W) in [0, 1] and within eps of x. Raises DerkitError on bad arguments."""
    pick("attack loss", loss, LOSSES)
    check_eps(eps, norm)
    check_sizes(alpha=alpha)
    if norm not in NORMS:
        raise DerkitError(f"norm must be one of {NORMS}, found {norm!r}.")
    if steps < 0 or restarts < 1:
        raise DerkitError(f"steps must be >= 0, restarts >= 1; found {steps} and {restarts}.")
    if targeted and loss == "kl":
        raise DerkitError("loss 'kl' has no targeted form; use 'ce' or 'margin'.")
    if check:
        check_batch(x, y, model)
    x = x.detach()
    if eps == 0 or not x.numel():
        return x.clone()
    if alpha is None:
        alpha = 2 * eps if decay else eps / 4
    sizes = [alpha] * steps
    if decay:
        sizes = [alpha * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]

    with attack_mode(model, bn_mode):
        raised, success = _aim(model, x, y, loss, targets if targeted else None, generator)
        best, fooled, highest = x, torch.zeros_like(y, dtype=torch.bool), -math.inf
        for _ in range(restarts):
            start = x
            if loss == "kl":  # which has no gradient at x itself
                noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                start = project((x + 1e-3 * noise).clamp(0, 1), x, eps, norm)
            elif random_start:
                start = (x + noise_in_ball(x, eps, norm, generator)).clamp(0, 1)
            watch = success if any_iterate else None
            x_adv, early, hit = _run(model, x, start, eps, norm, sizes, raised, watch)
            if restarts == 1 and not any_iterate:
                return x_adv
            with torch.no_grad():
                logits = model(x_adv)
            now, value = success(logits), raised(logits)
            x_adv = torch.where((hit & ~now)[:, None, None, None], early, x_adv)
            take = ~fooled & (hit | now | (value > highest))
            best = torch.where(take[:, None, None, None], x_adv, best)
            highest = torch.where(take, value, highest)
            fooled = fooled | hit | now
    return best


ATTACKS: dict[str, Callable] = dict(
    fgsm=fgsm, rs_fgsm=rs_fgsm, n_fgsm=n_fgsm, zerograd=zerograd, pgd=pgd)
