"""Whole training steps against a plain loop: weights equal to 1e-9 in float64.

The reference is written out from the papers' formulas. It shares with the kit the order of the
images and of the random draws, nothing else.
"""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from derkit.checkpoint import load_checkpoint
from derkit.config import METHOD_NAMES, REGULARIZER_NAMES, VARIANT_NAMES
from derkit.training.loop import model_from_config, train
from derkit.util import make_generator

EPS, LAMBDA, BETA, GAMMA, STEPS, AWP = 0.1, 0.7, 3.0, 0.01, 3, 0.02
START_AND_STEP = dict(fgsm=(0, 1), rs_fgsm=(1, 1.25), n_fgsm=(2, 1), zerograd=(1, 2))
CASES = [(m, r, "segment", {}) for m in METHOD_NAMES for r in REGULARIZER_NAMES
         if (m != "standard" or r == "none") and (m in START_AND_STEP or r != "aaer")]
CASES += [("rs_fgsm", "der", v, {}) for v in VARIANT_NAMES if v != "segment"]
CASES += [("fgsm", "der", v, dict(mask="abnormal")) for v in ("norm", "ball")]
CASES += [(m, "none", "norm", dict(awp=AWP)) for m in ("fgsm", "trades")]
CASES += [("fgsm", "none", "norm", dict(optimizer="adam"))]


def ce(f, y):
    return -F.log_softmax(f, 1)[torch.arange(len(y)), y]


def E(f, y=None):
    return -f.exp().sum(1).log() if y is None else -f[torch.arange(len(f)), y]


class Reference:
    """A network's parameters and buffers, and the steps that move them."""

    def __init__(self, model, config, rng):
        self.net, self.c, self.rng = model.double(), config, rng
        self.two_points = config.method in ("trades", "weat")
        self.kind = config.variant if config.regularizer == "der" else config.regularizer
        self.w = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.v = {name: torch.zeros_like(p) for name, p in self.w.items()}
        self.s, self.time = dict(self.v), 0
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}

    def probe(self, x, w=None):
        """Logits in an attack, nothing updated: batch statistics, TRADES and WEAT running ones."""
        self.net.train(not self.two_points)
        buffers = {k: b.clone() for k, b in self.buffers.items()}
        return functional_call(self.net, (self.w if w is None else w) | buffers, (x,))

    def grad(self, x, loss, w=None, graph=False):
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(loss(self.probe(x, w)).sum(), x, create_graph=graph)[0]

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.rng, dtype=torch.float64)

    def ball(self, x, radius=EPS):
        return x + (2 * self.uniform(x.shape) - 1) * radius

    def attack(self, x, y):
        m = self.c.method
        if m == "standard":
            return x
        if m in START_AND_STEP:
            start, step = START_AND_STEP[m]
            z = self.ball(x, start * EPS).clamp(0, 1) if start else x
            self.start, g = self.probe(z).detach(), self.grad(z, lambda f: ce(f, y))
            if m == "zerograd":
                ranks = g.abs().flatten(1).argsort(1).argsort(1).view_as(g)
                g = g * (ranks >= round(0.35 * x[0].numel()))
            z = z + step * EPS * g.sign()
            return (z if m in ("fgsm", "n_fgsm") else x + (z - x).clamp(-EPS, EPS)).clamp(0, 1)
        if m == "pgd":
            z, loss = self.ball(x).clamp(0, 1), lambda f: ce(f, y)
        else:
            noise = torch.randn(x.shape, generator=self.rng, dtype=torch.float64)
            z, p = (x + 1e-3 * noise).clamp(0, 1), self.probe(x).softmax(1).detach()
            loss = lambda f: -(p * f.log_softmax(1)).sum(1)  # noqa: E731
        for _ in range(STEPS):
            z = z + EPS / 4 * self.grad(z, loss).sign()
            z = (x + (z - x).clamp(-EPS, EPS)).clamp(0, 1)
        return z

    def penalty(self, f, x, y, u, w):
        """The regulariser's value, before lambda."""
        if self.kind == "gradalign":
            near = self.ball(x)
            a, b = (self.grad(z, lambda t: ce(t, y), w, True).flatten(1) for z in (x, near))
            a, squares = a.detach(), a.detach().square().sum(1) * b.square().sum(1)
            return (1 - (a * b).sum(1) / squares.sqrt()).mean()
        if self.kind == "aaer":
            before, after, m = ce(self.start, y), ce(f["adv"], y), len(y)
            moved, bad = (self.start - f["adv"]).square().sum(1), after < before
            n = bad.sum().item()
            if n in (0, m):
                return 0.0
            excess = (moved[bad].mean() - moved[~bad].mean().detach()).clamp_min(0)
            return n / m * (2.5 * (before - after)[bad].mean() + 1.5 * excess)
        loss = lambda name: ce(f[name], y)  # noqa: E731
        nat, adv, mid, near = (f.get(k) for k in ("nat", "adv", "mid", "near"))
        values = {
            "norm": lambda: ((E(nat) - E(adv)) ** 2 + (E(nat, y) - E(adv, y)) ** 2).sqrt() - GAMMA,
            "marginal": lambda: (E(nat) - E(adv)).abs(),
            "segment": lambda: (E(nat) - E(mid)).abs(),
            "ball": lambda: (E(nat) - E(near)).abs(),
            "elle": lambda: (loss("c") - (1 - u) * loss("a") - u * loss("b")).square(),
        }[self.kind]().clamp_min(0)
        abnormal = ce(adv, y) < ce(nat, y) if self.c.mask == "abnormal" else torch.ones(len(y))
        return (values * abnormal).sum() / max(abnormal.sum(), 1)

    def points(self, x, x_adv):
        """What goes through the network together, in order, as BatchNorm sees all of it; and u."""
        z, u = {"adv": x_adv}, None
        if self.two_points or self.kind in VARIANT_NAMES:
            z["nat"] = x
        if self.kind == "elle":
            z["a"], z["b"], u = self.ball(x), self.ball(x), self.uniform(len(x))
            z["c"] = z["a"] + u[:, None, None, None] * (z["b"] - z["a"])
        elif self.kind == "segment":
            u = self.uniform(len(x))
            z["mid"] = x + u[:, None, None, None] * (x_adv - x)
        elif self.kind == "ball":
            z["near"] = self.ball(x)
        return z, u

    def loss(self, z, y, w, buffers):
        """(logits by name, loss of the method) with these weights."""
        self.net.train()
        logits = functional_call(self.net, w | buffers, (torch.cat(list(z.values())),))
        f, c = dict(zip(z, logits.split(len(y)), strict=True)), self.c
        loss = ce(f["adv"], y)
        if self.two_points:
            p, q = f["nat"].softmax(1), f["adv"].softmax(1)
            loss = ce(f["nat"], y) + BETA * (p * (p.log() - q.log())).sum(1)
        if c.method == "weat":
            loss = loss / (1 + E(f["nat"]).abs().exp()).log().detach()
        return f, loss.mean()

    def step(self, x, y):
        c, (z, u) = self.c, self.points(x, self.attack(x, y).detach())
        w = {k: p.clone().requires_grad_(True) for k, p in self.w.items()}
        if c.awp:
            _, loss = self.loss(z, y, w, {k: b.clone() for k, b in self.buffers.items()})
            for name, g in zip(w, torch.autograd.grad(loss, list(w.values())), strict=True):
                p = w[name].detach()
                moved = p + AWP * p.norm() * g / g.norm() if p.ndim > 1 else p
                w[name] = moved.requires_grad_(True)
        f, loss = self.loss(z, y, w, self.buffers)
        if self.kind != "none":
            loss = loss + LAMBDA * self.penalty(f, x, y, u, w)
        self.time += 1
        for name, g in zip(w, torch.autograd.grad(loss, list(w.values())), strict=True):
            g = g + c.weight_decay * self.w[name]
            if c.optimizer == "adam":
                self.v[name] = 0.9 * self.v[name] + 0.1 * g
                self.s[name] = 0.999 * self.s[name] + 0.001 * g**2
                scale = (self.s[name] / (1 - 0.999**self.time)).sqrt() + 1e-8
                self.w[name] = self.w[name] - c.lr * self.v[name] / (1 - 0.9**self.time) / scale
                continue
            self.v[name] = c.momentum * self.v[name] + g
            self.w[name] = self.w[name] - c.lr * self.v[name]


@pytest.mark.parametrize("method, regularizer, variant, more", CASES)
def test_weights_after_two_steps(method, regularizer, variant, more, tiny, config):
    options = dict(method=method, regularizer=regularizer, variant=variant, eps=EPS)
    options |= dict(mask="all") | more
    options |= dict(weight=LAMBDA, beta=BETA, gamma=GAMMA, steps=STEPS, warmup=0, epochs=1)
    options |= dict(batch_size=8, width=2, lr=0.05, schedule="constant", precision="fp64")
    c, data = config(**options), replace(tiny, train=tiny.train.take(slice(16)))
    run = train(c, data, verbose=False)
    reference = Reference(model_from_config(c, data), c, make_generator("cpu", "epoch", 0, 0))
    for x, y in data.train.batches(8, reference.rng, "none", torch.float64):
        reference.step(x, y)
    found = load_checkpoint(run.folder / "final.safetensors")["state"]
    for name, expected in (reference.w | reference.buffers).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)
