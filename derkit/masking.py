"""Does a model look robust only because its gradients are of no use? Checks to run before a robust accuracy is believed.

The criteria are those of "Obfuscated Gradients Give a False Sense of Security" (arXiv 1802.00420, section 3.1) and of "On
Evaluating Adversarial Robustness" (arXiv 1902.06705). With honest gradients, none of the following happens: one step beats
many, more steps help the model, a larger radius helps it, an unbounded attack fails, noise or another model's adversarial
examples break images that the gradient cannot, gradients vanish. They can accuse a model, not acquit it: an attack made
for the model may still find more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit import attacks
from derkit.data import Split
from derkit.energy import cross_entropy, upcast
from derkit.errors import DerkitError
from derkit.evaluation import float_batches, make_generator

VERDICTS = ("no sign", "suspicious", "masked")


@dataclass(frozen=True)
class Check:
    """One comparison: ``found`` against ``bound`` (the two numbers), whether it ``failed``, and what a failure proves:
    'masked' (impossible with honest gradients) or 'suspicious' (happens to honest models as well, but rarely)."""

    name: str
    text: str
    found: float
    bound: float
    failed: bool
    proves: str


@dataclass(frozen=True)
class MaskingReport:
    """``verdict``: 'no sign', 'suspicious' or 'masked'. ``checks``: all of them; ``reasons``: those that failed.
    ``by_eps``, ``by_steps``: accuracy and mean CE under PGD against the radius and the number of steps."""

    verdict: str
    checks: tuple[Check, ...]
    by_eps: pd.DataFrame = field(repr=False)
    by_steps: pd.DataFrame = field(repr=False)
    images: int

    @property
    def reasons(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.failed)

    def __str__(self) -> str:
        lines = [f"gradient masking: {self.verdict} ({self.images} images, {len(self.checks)} checks)"]
        lines += [f"  {c.proves}: {c.name}: {c.text}: {c.found:.3f} against {c.bound:.3f}" for c in self.reasons]
        return "\n".join(lines)


class _Bench:
    """A model and fixed images; every attack starts from the same seed."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, norm: str, seed: int, batch_size: int) -> None:
        self.model, self.x, self.y, self.norm, self.seed, self.batch_size = model, x, y, norm, seed, batch_size

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)

    def generator(self, purpose: str) -> torch.Generator:
        return make_generator(self.x.device, "masking", purpose, self.seed)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        with attacks.attack_mode(self.model):
            return torch.cat([upcast(self.model(part)) for part in x.split(self.batch_size)])

    def attack(self, eps: float, model: nn.Module | None = None, **options) -> Tensor:
        g = self.generator("attack")
        options |= dict(norm=self.norm, generator=g, check=False)
        return torch.cat([attacks.pgd(model or self.model, x, y, eps, **options) for x, y in self.parts()])

    def judge(self, x_adv: Tensor) -> tuple[Tensor, float]:
        """(which images the model still gets right (N,) bool, mean CE)."""
        logits = self.logits(x_adv)
        return logits.argmax(1) == self.y, cross_entropy(logits, self.y).mean().item()

    def standing(self, alive: Tensor, eps: float, **options) -> Tensor:
        """Which of the images that are ``alive`` (N,) survive one more attack; the others are not attacked again."""
        alive, index = alive.clone(), alive.nonzero().squeeze(1)
        if len(index):
            part = _Bench(self.model, self.x[index], self.y[index], self.norm, self.seed + 1, self.batch_size)
            alive[index] = part.judge(part.attack(eps, **options))[0]
        return alive

    def noise(self, eps: float, tries: int) -> Tensor:
        """Which images survive all of ``tries`` random points of the ball, half of them on its surface. No gradient."""
        g, alive = self.generator("noise"), torch.ones_like(self.y, dtype=torch.bool)
        for i in range(tries):
            r = attacks.noise_in_ball(self.x, 1.0, self.norm, g)
            if i % 2:
                r = r.sign() if self.norm == "linf" else F.normalize(r.flatten(1), dim=1).view_as(r)
            alive &= self.judge(attacks.project(self.x + eps * r, self.x, eps, self.norm))[0]
        return alive

    def gradients(self, eps: float) -> tuple[float, float]:
        """(share of correctly classified images whose CE gradient is zero or not finite, median cosine of the gradients
        at x and at a random point of the ball, over the others; NaN if there are none)."""
        g, dead, cosines = self.generator("gradients"), [], []
        with attacks.attack_mode(self.model):
            for x, y in self.parts():
                near = (x + attacks.noise_in_ball(x, eps, self.norm, g)).clamp(0, 1)
                (a, logits), (b, _) = (attacks.input_gradient(self.model, z, lambda f, y=y: cross_entropy(f, y)) for z in (x, near))
                a, b = a.flatten(1), b.flatten(1)
                useless = ~a.isfinite().all(1) | (a == 0).all(1)
                right = logits.argmax(1) == y
                dead.append(useless[right])
                fine = right & ~useless & b.isfinite().all(1) & (b != 0).any(1)
                cosines.append(F.cosine_similarity(a[fine].double() / a[fine].abs().amax(1, keepdim=True),
                                                   b[fine].double() / b[fine].abs().amax(1, keepdim=True), dim=1))
        dead, cosines = torch.cat(dead), torch.cat(cosines)
        return dead.double().mean().item() if len(dead) else 0.0, cosines.median().item() if len(cosines) else float("nan")


def _images(model: nn.Module, data: Split | tuple[Tensor, Tensor], images: int) -> tuple[Tensor, Tensor]:
    if images < 1 or not len(data if isinstance(data, Split) else data[1]):
        raise DerkitError("gradient_masking needs at least one image, found none.")
    if isinstance(data, Split):
        x, y = (torch.cat(t) for t in zip(*float_batches(data.take(slice(images)), model), strict=True))
    else:
        x, y = data[0][:images], data[1][:images]
    attacks.check_batch(x, y, model)
    return x.detach(), y


def gradient_masking(model: nn.Module, data: Split | tuple[Tensor, Tensor], eps: float, *, norm: str = "linf",
                     steps: Sequence[int] = (1, 5, 20, 50), restarts: int = 3, noise: int = 100,
                     source: nn.Module | None = None, images: int = 200, tolerance: float = 0.03, seed: int = 0,
                     batch_size: int = 256) -> MaskingReport:
    """Run every check on a model; a report with a verdict and its reasons, each with the two numbers that it compares.

    data: a `Split`, or (x (N, C, H, W) in [0, 1], y (N,)); the first ``images`` are used. eps: the radius, in pixel units,
    at which the model is said to be robust. steps: numbers of PGD steps, rising from 1. restarts: of the strongest of them.
    noise: random points per image. source: another model for the data, for the transfer check. tolerance: how much
    accuracy (share of images) a comparison may differ by chance. The bounds of the 'suspicious' checks were set between
    ordinary networks and networks collapsed by FGSM training on the bundled data; figures/records/*/masking.json holds what
    they say of finished runs. The model is left as it was.
    Raises DerkitError for bad input, eps 0 and steps that do not rise from 1.
    """
    attacks.check_eps(eps, norm)
    if eps == 0:
        raise DerkitError("gradient_masking needs eps > 0.")
    steps = list(steps)
    if len(steps) < 2 or steps[0] != 1 or steps != sorted(set(steps)):
        raise DerkitError(f"steps must rise from 1, for example (1, 5, 20, 50), found {tuple(steps)}.")
    if norm not in attacks.NORMS or restarts < 1 or noise < 0:
        raise DerkitError(f"norm must be one of {attacks.NORMS}, restarts >= 1 and noise >= 0, found {norm!r}, {restarts}, {noise}.")
    x, y = _images(model, data, images)
    bench = _Bench(model, x, y, norm, seed, batch_size)
    clean, clean_loss = bench.judge(x)
    most = steps[-1]

    rows, survivors = [], {}
    for n in steps:
        single = dict(alpha=eps, random_start=False) if n == 1 else dict(alpha=2.5 * eps / n)
        survivors[n], loss = bench.judge(bench.attack(eps, steps=n, **single))
        rows.append(dict(steps=n, accuracy=_share(survivors[n]), loss=loss))
    by_steps = pd.DataFrame(rows)

    far = 1.0 if norm == "linf" else x[0].numel() ** 0.5  # every image is within reach
    radii = sorted({r for r in (eps / 4, eps / 2, eps, 2 * eps, 4 * eps) if r < far} | {far})
    rows = [dict(eps=0.0, accuracy=_share(clean), loss=clean_loss)]
    for r in radii:
        alive, loss = bench.judge(bench.attack(r, steps=most, decay=True, any_iterate=True))
        rows.append(dict(eps=r, accuracy=_share(alive), loss=loss))
        if r == eps:
            strong = alive & survivors[most]
    by_eps = pd.DataFrame(rows)

    strong = bench.standing(strong, eps, steps=most, restarts=restarts, decay=True, any_iterate=True)
    margin = bench.standing(strong, eps, steps=most, loss="margin", decay=True, any_iterate=True)
    acc, accs = _share(strong), by_steps["accuracy"].tolist()
    dead, cosine = bench.gradients(eps)
    radii, by_radius = by_eps["eps"].tolist(), by_eps["accuracy"].tolist()
    worst, rise = (max(range(1, len(a)), key=lambda i, a=a: a[i] - a[i - 1]) for a in (by_radius, accs))
    checks = [
        _check("one step beats many", f"accuracy under PGD-{most}, at most that under one step", accs[-1], accs[0] + tolerance, "masked"),
        _check("more steps help the model", f"accuracy under PGD-{steps[rise]}, at most that under PGD-{steps[rise - 1]}",
               accs[rise], accs[rise - 1] + tolerance, "masked"),
        _check("a larger radius helps the model", f"accuracy at eps {radii[worst]:.4g}, at most that at {radii[worst - 1]:.4g}",
               by_radius[worst], by_radius[worst - 1] + tolerance, "masked"),
        _check("an unbounded attack fails", f"accuracy at eps {far:.4g}, where it must reach 0", by_radius[-1], tolerance, "masked"),
        _check("gradients vanish", "share of images whose CE gradient is zero or not finite", dead, tolerance, "masked"),
        _check("the cross-entropy hides what the margin shows", "accuracy under PGD on CE, at most that on the margin", acc,
               _share(margin) + 0.1, "suspicious"),
        _check("more steps still help the attack", f"accuracy under PGD-{steps[-2]}, at most that under PGD-{most}", accs[-2],
               accs[-1] + 0.1, "suspicious"),
        _check("one step is blind", "accuracy under one step, at most that under many", accs[0], accs[-1] + 0.3, "suspicious"),
        _check("the loss is not locally linear", "1 - median cosine of gradients at x and beside it", 1 - cosine, 0.8, "suspicious"),
    ]
    if noise:
        left = _share(strong & bench.noise(eps, noise))
        checks.append(_check("noise finds what gradients miss", f"accuracy under gradients, at most that under them and {noise} "
                             "random points", acc, left + tolerance, "masked"))
    if source is not None:
        left = _share(strong & bench.judge(bench.attack(eps, model=source, steps=most, decay=True))[0])
        checks.append(_check("another model's examples find what gradients miss", "accuracy under gradients, at most that under them "
                             "and transfer", acc, left + tolerance, "masked"))
    verdict = VERDICTS[max((VERDICTS.index(c.proves) for c in checks if c.failed), default=0)]
    return MaskingReport(verdict, tuple(checks), by_eps, by_steps, len(x))


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


def _check(name: str, text: str, found: float, bound: float, proves: str) -> Check:
    return Check(name, text, float(found), float(bound), bool(found > bound + 1e-9), proves)
