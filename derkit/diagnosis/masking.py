"""Does a model look robust only because its gradients are of no use?

Checks to run before a robust accuracy is believed, after "Obfuscated Gradients" (arXiv 1802.00420,
section 3.1) and "On Evaluating Adversarial Robustness" (arXiv 1902.06705). They can accuse a model,
not acquit it: an attack made for it may still find more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor, nn

from derkit import attacks
from derkit.data import Split
from derkit.diagnosis.evaluation import float_batches
from derkit.energy import cross_entropy, upcast
from derkit.util import DerkitError, make_generator

VERDICTS = ("no sign", "suspicious", "masked")
HARD = dict(decay=True, any_iterate=True)  # options of the strongest attacks


@dataclass(frozen=True)
class Finding:
    """One check: what is ``found`` must not exceed its ``bound``. If it does, that ``proves``
    'masked' (impossible with honest gradients) or 'suspicious' (rare with them)."""

    name: str
    text: str
    found: float
    bound: float
    proves: str

    @property
    def failed(self) -> bool:
        return self.found > self.bound + 1e-9


@dataclass(frozen=True)
class MaskingReport:
    """``reasons``: the ``checks`` that failed; ``verdict``: the worst that these prove, else 'no
    sign'. ``by_eps``, ``by_steps``: accuracy and mean CE under PGD."""

    checks: tuple[Finding, ...]
    by_eps: pd.DataFrame = field(repr=False)
    by_steps: pd.DataFrame = field(repr=False)
    images: int

    @property
    def reasons(self) -> tuple[Finding, ...]:
        return tuple(c for c in self.checks if c.failed)

    @property
    def verdict(self) -> str:
        return max((c.proves for c in self.reasons), key=VERDICTS.index, default=VERDICTS[0])

    def __str__(self) -> str:
        head = f"gradient masking: {self.verdict} ({self.images} images, {len(self.checks)} checks)"
        lines = [f"  {c.proves}: {c.name}: {c.found:.3f} against {c.bound:.3f} ({c.text})"
                 for c in self.reasons]
        return "\n".join([head, *lines])


@dataclass(frozen=True)
class _Bench:
    """A model and fixed images (x, y). Every attack starts from the same seed."""

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    seed: int

    def generator(self, purpose: str) -> torch.Generator:
        return make_generator(self.x.device, "masking", purpose, self.seed)

    def attack(self, eps: float, **options) -> Tensor:
        options |= dict(norm=self.norm, generator=self.generator("attack"), check=False)
        return attacks.pgd(self.model, self.x, self.y, eps, **options)

    @torch.no_grad()
    def judge(self, x_adv: Tensor) -> tuple[Tensor, float]:
        """(which images the model still gets right (N,) bool, mean CE)."""
        with attacks.attack_mode(self.model):
            logits = upcast(self.model(x_adv))
        return logits.argmax(1) == self.y, cross_entropy(logits, self.y).mean().item()

    def curve(self, column: str, runs: dict[float, dict]) -> tuple[pd.DataFrame, dict]:
        """(a table of attacks, given by their options; value -> who is right after its attack)."""
        right, losses = zip(*(self.judge(self.attack(**o)) for o in runs.values()), strict=True)
        accuracies = [_share(alive) for alive in right]
        table = pd.DataFrame({column: [*runs], "accuracy": accuracies, "loss": losses})
        return table, dict(zip(runs, right, strict=True))

    def standing(self, alive: Tensor, eps: float, **options) -> Tensor:
        """Which of the images that are ``alive`` (N,) survive one more attack."""
        alive, index = alive.clone(), alive.nonzero().squeeze(1)
        if len(index):
            part = replace(self, x=self.x[index], y=self.y[index], seed=self.seed + 1)
            alive[index] = part.judge(part.attack(eps, **options))[0]
        return alive

    def noise(self, eps: float, tries: int) -> Tensor:
        """Which images survive random points of the ball, half of them on its surface."""
        rng, alive = self.generator("noise"), torch.ones_like(self.y, dtype=torch.bool)
        for i in range(tries):
            r = attacks.noise_in_ball(self.x, 1.0, self.norm, rng)
            if i % 2:
                r = r.sign() if self.norm == "linf" else nn.functional.normalize(r, dim=(1, 2, 3))
            alive &= self.judge(attacks.project(self.x + eps * r, self.x, eps, self.norm))[0]
        return alive

    def directions(self, x: Tensor) -> Tensor:
        """d CE / dx as unit vectors (N, D), with NaN in those of a zero or infinite gradient."""
        with attacks.attack_mode(self.model):
            g, _ = attacks.input_gradient(self.model, x, lambda f: cross_entropy(f, self.y))
        return nn.functional.normalize(g.flatten(1).double(), eps=0.0)  # tiny ones count


def _share(mask: Tensor) -> float:
    return mask.double().mean().item() if len(mask) else 0.0


def gradient_masking(model: nn.Module, data: Split | tuple[Tensor, Tensor], eps: float, *,
                     norm: str = "linf", steps: Sequence[int] = (1, 5, 20, 50), restarts: int = 3,
                     noise: int = 100, source: nn.Module | None = None, images: int = 200,
                     tolerance: float = 0.03, seed: int = 0) -> MaskingReport:
    """Run every check on a model: a verdict and its reasons, each with the numbers it compares.

    data: a `Split`, or (x (N, C, H, W) in [0, 1], y (N,)); the first ``images`` are used, in one
    batch. eps: in pixel units. steps: numbers of PGD steps, rising from 1. restarts: of the
    strongest attack. noise: random points per image. source: another model, for transfer.
    tolerance: the accuracy by which comparisons may differ by chance. The bounds of 'suspicious'
    lie between ordinary networks and ones collapsed by FGSM. Raises DerkitError for bad input.
    """
    steps = list(steps)
    if not attacks.check_eps(eps, norm) or restarts < 1 or noise < 0:
        raise DerkitError("gradient_masking needs eps > 0, restarts >= 1 and noise >= 0, found "
                          f"{eps}, {restarts} and {noise}.")
    if len(steps) < 2 or steps[0] != 1 or steps != sorted(set(steps)):
        raise DerkitError(f"steps must rise from 1, as (1, 5, 20, 50), found {tuple(steps)}.")
    if isinstance(data, Split):
        data = next(float_batches(data, model, max(images, 1)), ((), ()))
    if images < 1 or not len(data[1]):
        raise DerkitError("gradient_masking needs at least one image, found none.")
    x, y = data[0][:images].detach(), data[1][:images]
    attacks.check_batch(x, y, model)
    bench, most = _Bench(model, x, y, norm, seed), steps[-1]
    runs = {n: dict(eps=eps, steps=n, alpha=2.5 * eps / n) for n in steps}
    runs[1] = dict(eps=eps, steps=1, alpha=eps, random_start=False)
    by_steps, right = bench.curve("steps", runs)
    far = 1.0 if norm == "linf" else max(eps, x[0].numel() ** 0.5)  # every image is within reach
    radii = [r for r in (0.0, eps / 4, eps / 2, eps, 2 * eps, 4 * eps) if r < far] + [far]
    by_eps, at = bench.curve("eps", {r: dict(eps=r, steps=most, **HARD) for r in radii})
    strong = bench.standing(at[eps] & right[most], eps, steps=most, restarts=restarts, **HARD)
    margin = bench.standing(strong, eps, steps=most, loss="margin", **HARD)
    beside = x + attacks.noise_in_ball(x, eps, norm, bench.generator("gradients"))
    here, there = bench.directions(x)[at[0.0]], bench.directions(beside.clamp(0, 1))[at[0.0]]
    random = strong & bench.noise(eps, noise)
    cosine = (here * there).sum(1).nanmedian().item()

    acc, accs, rest = _share(strong), by_steps["accuracy"].tolist(), by_eps["accuracy"].tolist()
    i, j = (int(t["accuracy"].diff().idxmax()) for t in (by_steps, by_eps))  # largest rises
    masked = [("one step beats many", f"PGD-{most}", accs[-1], accs[0]),
              ("more steps help the model", f"PGD-{steps[i]}", accs[i], accs[i - 1]),
              ("a larger radius helps the model", f"eps {radii[j]:.4g}", rest[j], rest[j - 1]),
              ("an unbounded attack fails", f"eps {far:.4g}", rest[-1], 0.0),
              ("gradients vanish", "share of images", _share(here.isnan().any(1)), 0.0),
              ("noise finds what gradients miss", f"{noise} points", acc, _share(random))]
    if source is not None:
        foreign = replace(bench, model=source).attack(eps, steps=most, decay=True)
        left = _share(strong & bench.judge(foreign)[0])
        masked.append(("another model's examples find what gradients miss", "transfer", acc, left))
    suspicious = [
        ("the cross-entropy hides what the margin shows", "PGD", acc, _share(margin) + 0.1),
        ("more steps still help the attack", f"PGD-{steps[-2]}", accs[-2], accs[-1] + 0.1),
        ("one step is blind", f"PGD-{most}", accs[0], accs[-1] + 0.3),
        ("the loss is not locally linear", "1 - cosine of gradients", 1 - cosine, 0.8)]
    checks = [Finding(*row[:3], row[3] + tolerance, "masked") for row in masked]
    checks += [Finding(*row, "suspicious") for row in suspicious]
    return MaskingReport(tuple(checks), by_eps, by_steps, len(x))
