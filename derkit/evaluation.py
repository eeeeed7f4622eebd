"""Evaluation: clean and robust accuracy, the strong suite, AutoAttack, and the energy statistics of an attack.

All attacks here run with BatchNorm in eval mode, from an explicit generator, at the eps that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit import attacks, energy
from derkit.data import Split
from derkit.errors import DerkitError, pick

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def make_generator(device: torch.device | str, *seed: int | str) -> torch.Generator:
    """A generator on the device, seeded from numbers and words (independent streams for independent purposes)."""
    import hashlib

    digest = hashlib.sha256(repr(seed).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))


def float_batches(split: Split, model: nn.Module, batch_size: int = 512) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in the model's dtype, unshuffled."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return split.batches(batch_size, dtype=dtype)


@torch.no_grad()
def predict(model: nn.Module, split: Split, batch_size: int = 512) -> Tensor:
    """Logits (N, K) in eval mode; the model's mode is restored."""
    with attacks.attack_mode(model, "eval"):
        return torch.cat([energy.upcast(model(x)) for x, _ in float_batches(split, model, batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of correct predictions."""
    return (logits.argmax(1) == labels).double().mean().item()


Attack = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def attack_split(model: nn.Module, split: Split, attack: Attack, seed: int = 0, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """(x*, logits of x*) over a split; ``attack(model, x, y, generator)``."""
    generator = make_generator(split.images.device, "evaluation", seed)
    adv, logits = [], []
    for x, y in float_batches(split, model, batch_size):
        x_adv = attack(model, x, y, generator)
        with torch.no_grad(), attacks.attack_mode(model, "eval"):
            logits.append(energy.upcast(model(x_adv)))
        adv.append(x_adv)
    return torch.cat(adv), torch.cat(logits)


def pgd_attack(eps: float, steps: int = 20, **options) -> Attack:
    """PGD with fixed settings, in the form `attack_split` takes."""
    return lambda model, x, y, generator: attacks.pgd(model, x, y, eps, steps=steps, generator=generator, check=False, **options)


def fgsm_attack(eps: float, norm: str = "linf") -> Attack:
    """FGSM (for 'l2' its counterpart, one step of length eps along the gradient), in the form `attack_split` takes."""
    if norm != "linf":
        return pgd_attack(eps, 1, alpha=eps, random_start=False, norm=norm)
    return lambda model, x, y, generator: attacks.fgsm(model, x, y, eps, check=False)


def robust_accuracy(model: nn.Module, split: Split, eps: float, steps: int = 20, seed: int = 0, **options) -> float:
    """Accuracy under PGD (options as in `derkit.attacks.pgd`). At eps 0 this is the clean accuracy."""
    _, logits = attack_split(model, split, pgd_attack(eps, steps, **options), seed)
    return accuracy(logits, split.labels)


def strong_mask(model: nn.Module, split: Split, eps: float, steps: int = 100, restarts: int = 2, seed: int = 0,
                batch_size: int = 512, norm: str = "linf") -> Tensor:
    """Per image: does it survive the clean prediction and every attack of the strong suite? (N,) bool.

    Suite: PGD-20 on CE, then ``restarts`` x ``steps`` on the margin and on CE, step size shrinking from 2 eps to 0 by a
    cosine, any iterate counting as success; every attack runs on the images still standing. PGD-20 alone overstates
    robustness near catastrophic overfitting by up to a factor of two.
    """
    suite = [dict(steps=20), dict(steps=steps, restarts=restarts, loss="margin", decay=True, any_iterate=True),
             dict(steps=steps, restarts=restarts, loss="ce", decay=True, any_iterate=True)]
    return _survivors(model, split, eps, suite, make_generator(split.images.device, "strong", seed), batch_size, norm)


def _survivors(model: nn.Module, split: Split, eps: float, suite: Sequence[dict], generator: torch.Generator, batch_size: int,
               norm: str) -> Tensor:
    """Per image: is it right, and does it stay so under every attack (options of `derkit.attacks.pgd`)? (N,) bool."""
    attacks.check_eps(eps, norm)
    alive = predict(model, split, batch_size).argmax(1) == split.labels
    for options in suite:
        index = alive.nonzero().squeeze(1)
        for i in range(0, len(index), batch_size):
            part = split.take(index[i : i + batch_size])
            for x, y in float_batches(part, model, batch_size):
                x_adv = attacks.pgd(model, x, y, eps, norm=norm, generator=generator, check=False, **options)
                with torch.no_grad(), attacks.attack_mode(model, "eval"):
                    alive[index[i : i + batch_size]] = model(x_adv).argmax(1) == y
    return alive


def strong_accuracy(model: nn.Module, split: Split, eps: float, **options) -> float:
    """Mean of `strong_mask`: worst case per image over CE and margin PGD with restarts and shrinking steps."""
    return strong_mask(model, split, eps, **options).double().mean().item()


def pgd50_accuracy(model: nn.Module, split: Split, eps: float, steps: int = 50, restarts: int = 10, alpha: float | None = None,
                   seed: int = 0, batch_size: int = 512, norm: str = "linf") -> float:
    """PGD-50-10: ``restarts`` random starts of ``steps`` steps on CE; an image counts if it survives all of them.

    alpha: step size, default eps/4, which is the published 2/255 at eps 8/255. Fooled images are not attacked again.
    """
    suite = [dict(steps=steps, alpha=alpha)] * restarts
    generator = make_generator(split.images.device, "pgd50", seed)
    return _survivors(model, split, eps, suite, generator, batch_size, norm).double().mean().item()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient in here (parts of AutoAttack call backward())."""
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learned:
            p.requires_grad_(False)
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


def autoattack_mask(model: nn.Module, split: Split, eps: float, norm: str = "linf", seed: int = 0,
                    batch_size: int = 256) -> Tensor:
    """Per image: does it survive standard AutoAttack (arXiv 2003.01690), through the packaged port `pyautoattack` (extra:
    eval)? (N,) bool.

    Raises DerkitError where the package is missing, at eps 0, and below 4 classes (its targeted DLR needs them).
    """
    names = {"linf": "Linf", "l2": "L2"}
    port_norm = pick("norm", norm, names)
    attacks.check_eps(eps, norm)
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise DerkitError('AutoAttack needs the package pyautoattack: pip install "derkit[eval]".') from error
    if eps == 0:
        raise DerkitError("AutoAttack needs eps > 0; at eps 0 robust accuracy is clean accuracy.")
    device, clean = split.images.device, predict(model, split)
    if clean.shape[1] < 4:
        raise DerkitError(f"AutoAttack needs at least 4 classes, found {clean.shape[1]}; use strong_accuracy.")
    x = split.floats()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)

    def forward(images: Tensor) -> Tensor:  # the port works in float32
        return energy.upcast(model(images.to(dtype))).float()

    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with attacks.attack_mode(model, "eval"), _frozen(model), fork:
        adversary = AutoAttack(forward, norm=port_norm, eps=eps, seed=seed, version="standard", device=str(device))
        for part in (adversary.apgd_targeted, adversary.fab):
            part.n_target_classes = min(9, clean.shape[1] - 1)
        x_adv, _ = adversary.run_standard_evaluation(x, split.labels, batch_size=batch_size)
        with torch.no_grad():
            return torch.cat([forward(b).argmax(1) for b in x_adv.split(batch_size)]) == split.labels


def autoattack(model: nn.Module, split: Split, eps: float, norm: str = "linf", seed: int = 0,
               batch_size: int = 256) -> dict:
    """The record of `autoattack_mask`: accuracy (worst case per image), clean, examples, seed, eps, norm, package, version."""
    from importlib.metadata import version

    robust = autoattack_mask(model, split, eps, norm, seed, batch_size)
    return dict(attack="AutoAttack standard", accuracy=robust.double().mean().item(),
                clean=accuracy(predict(model, split), split.labels), examples=len(split), seed=seed, eps=eps, norm=norm,
                package="pyautoattack", version=version("pyautoattack"))


# ------------------------------------------------------------------------------------------------ energy statistics
def energy_summary(logits: Tensor, logits_adv: Tensor, labels: Tensor, logits_start: Tensor | None = None) -> dict[str, float]:
    """Mean and quantiles of dE(x) and dE(x, y), mean E(x), E(x*), and the share of abnormal adversarial examples."""
    d, dy = energy.delta_energy(logits, logits_adv), energy.delta_energy(logits, logits_adv, labels)
    start = logits if logits_start is None else logits_start
    out = {"dE": d.mean(), "dEy": dy.mean(), "E": energy.marginal_energy(logits).mean(),
           "E_adv": energy.marginal_energy(logits_adv).mean(), "aae": energy.abnormal_mask(start, logits_adv, labels).double().mean()}
    q = torch.tensor(QUANTILES, dtype=d.dtype, device=d.device)
    for name, values in (("dE", d), ("dEy", dy)):
        out |= {f"{name}_q{int(100 * level):02d}": v for level, v in zip(QUANTILES, values.quantile(q), strict=True)}
    return {k: round(float(v), 6) for k, v in out.items()}


def gradient_cosine(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator, norm: str = "linf") -> Tensor:
    """cos(grad l(x), grad l(x + r)), r uniform in the ball, (B,): falls towards 0 at catastrophic overfitting (arXiv 2007.02617)."""
    noisy = x + attacks.noise_in_ball(x, eps, norm, generator)
    with attacks.attack_mode(model, "eval"):
        a, b = (attacks.input_gradient(model, z, lambda f: energy.cross_entropy(f, y))[0].flatten(1) for z in (x, noisy))
    return F.cosine_similarity(a, b, dim=1)


@torch.no_grad()
def elle_linearity(model: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator, norm: str = "linf") -> Tensor:
    """E_lin of ELLE on random triplets in the ball, (B,) (OpenReview SZzQz8ikwg)."""
    a, b = (x + attacks.noise_in_ball(x, eps, norm, generator) for _ in range(2))
    u = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    with attacks.attack_mode(model, "eval"):
        fa, fc, fb = (model(z) for z in (a, torch.lerp(a, b, u.view(-1, 1, 1, 1)), b))
    return energy.loss_linearity(fa, fc, fb, u, y)
