"""Whole training steps against a plain loop: every method with every regulariser, weights equal to 1e-9 in float64.

The reference is written out from the papers' formulas with autograd, a functional forward and SGD by hand. It shares with the
kit the order of the images and the order in which random numbers are drawn, nothing else.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from derkit.checkpoint import load_checkpoint
from derkit.config import METHOD_NAMES, VARIANT_NAMES
from derkit.evaluation import make_generator
from derkit.training import model_from_config, train

REGULARIZERS = [("none", "segment"), ("der", "segment"), ("gradalign", "segment"), ("elle", "segment")]
COMBINATIONS = [(m, r, v) for m in METHOD_NAMES for r, v in REGULARIZERS if m != "standard" or r == "none"]
COMBINATIONS += [("rs_fgsm", "der", v) for v in VARIANT_NAMES if v != "segment"]
EPS, LAMBDA, BETA, STEPS = 0.1, 0.7, 3.0, 3


def ce(f, y):
    return -F.log_softmax(f, 1)[torch.arange(len(y)), y]


def E(f, y=None):
    return -f.exp().sum(1).log() if y is None else -f[torch.arange(len(f)), y]


class Reference:
    """A network's parameters and buffers, and the steps that move them."""

    def __init__(self, model, config, generator):
        self.net, self.c, self.g = model.double(), config, generator
        self.w = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.buffers = {k: v.clone() for k, v in model.named_buffers()}
        self.v = {k: torch.zeros_like(p) for k, p in self.w.items()}
        self.mean = None  # of the hinge

    def probe(self, x, w=None):
        """Logits inside an attack: batch statistics (or for TRADES and WEAT the running ones), nothing updated."""
        self.net.train(self.c.method not in ("trades", "weat"))
        buffers = {k: b.clone() for k, b in self.buffers.items()}
        return functional_call(self.net, ((self.w if w is None else w) | buffers), (x,))

    def grad(self, x, loss, w=None, graph=False):
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(loss(self.probe(x, w)), x, create_graph=graph)[0]

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.g, dtype=torch.float64)

    def ball(self, x, radius=EPS):
        return x + (2 * self.uniform(x.shape) - 1) * radius

    def attack(self, x, y):
        m = self.c.method
        if m == "standard":
            return x
        if m in ("fgsm", "rs_fgsm", "n_fgsm"):
            start, step = {"fgsm": (0, 1), "rs_fgsm": (1, 1.25), "n_fgsm": (2, 1)}[m]
            z = self.ball(x, start * EPS).clamp(0, 1) if start else x
            z = z + step * EPS * self.grad(z, lambda f: ce(f, y).sum()).sign()
            return (z if m != "rs_fgsm" else x + (z - x).clamp(-EPS, EPS)).clamp(0, 1)
        if m == "pgd":
            z, loss = self.ball(x).clamp(0, 1), lambda f: ce(f, y).sum()
        else:
            p = self.probe(x).softmax(1).detach()
            z = (x + 1e-3 * torch.randn(x.shape, generator=self.g, dtype=torch.float64)).clamp(0, 1)
            z, loss = x + (z - x).clamp(-EPS, EPS), lambda f: F.kl_div(f.log_softmax(1), p, reduction="sum")
        for _ in range(STEPS):
            z = z + EPS / 4 * self.grad(z, loss).sign()
            z = (x + (z - x).clamp(-EPS, EPS)).clamp(0, 1)
        return z

    def penalty(self, f, x, y, u, w):
        """The regulariser's value, before lambda."""
        c = self.c
        if c.regularizer == "none":
            return 0.0
        if c.regularizer == "elle":
            la, lb, lc = (ce(f[k], y) for k in ("ball", "ball_b", "ball_c"))
            return (lc - (1 - u) * la - u * lb).square().mean()
        if c.regularizer == "gradalign":
            near = self.ball(x)
            a, b = (self.grad(z, lambda t: ce(t, y).sum(), w, True).flatten(1) for z in (x, near))
            a = a.detach()
            return (1 - (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())).mean()
        nat, adv, mid, ball = (f.get(k) for k in ("nat", "adv", "mid", "ball"))

        def bump(label=None):
            return E(mid, label) - (1 - u) * E(nat, label) - u * E(adv, label)

        if c.variant == "hinge":
            d = E(nat) - E(adv)
            now = d.detach().mean()
            m = now if self.mean is None else self.mean
            self.mean = 0.99 * m + 0.01 * now
            return (d - m).clamp_min(0).abs().mean()
        differences = {
            "marginal": lambda: [E(nat) - E(adv)], "joint": lambda: [E(nat, y) - E(adv, y)],
            "both": lambda: [E(nat) - E(adv), E(nat, y) - E(adv, y)], "abnormal": lambda: [(ce(nat, y) - ce(adv, y)).clamp_min(0)],
            "segment": lambda: [E(nat) - E(mid)], "segment_joint": lambda: [E(nat, y) - E(mid, y)],
            "segment_ce": lambda: [ce(nat, y) - ce(mid, y)], "ball": lambda: [E(nat) - E(ball)],
            "linear": lambda: [bump()], "linear_both": lambda: [bump(), bump(y)],
        }  # fmt: skip
        return sum(d.abs().mean() for d in differences[c.variant]())

    def points(self):
        """What goes through the network together, in order: BatchNorm sees all of it."""
        c, out = self.c, ["adv"]
        out += ["nat"] if c.method in ("trades", "weat") else []
        if c.regularizer == "elle":
            out += ["ball", "ball_b", "ball_c"]
        if c.regularizer == "der":
            out += ["nat"] + (["ball"] if c.variant == "ball" else ["mid"] if c.variant.startswith(("segment", "linear")) else [])
        return list(dict.fromkeys(out))

    def step(self, x, y):
        c = self.c
        x_adv, z, u = self.attack(x, y).detach(), {}, None
        for name in self.points():
            if name in ("mid", "ball_c"):
                u = self.uniform(len(x))
                a, b = (x, x_adv) if name == "mid" else (z["ball"], z["ball_b"])
                z[name] = a + u.view(-1, 1, 1, 1) * (b - a)
            else:
                z[name] = {"adv": lambda: x_adv, "nat": lambda: x}.get(name, lambda: self.ball(x))()
        w = {k: p.clone().requires_grad_(True) for k, p in self.w.items()}
        self.net.train()
        buffers = {k: b.clone() for k, b in self.buffers.items()}
        logits = functional_call(self.net, w | buffers, (torch.cat(list(z.values())),))
        self.buffers = buffers  # running statistics have moved before GradAlign looks at the network
        f = dict(zip(z, logits.split(len(x)), strict=True))
        if c.method in ("trades", "weat"):
            p, q = f["nat"].softmax(1), f["adv"].softmax(1)
            terms = ce(f["nat"], y) + BETA * (p * (p.log() - q.log())).sum(1)
            weight = 1 / (1 + E(f["nat"]).abs().exp()).log().detach() if c.method == "weat" else 1.0
            loss = (weight * terms).mean()
        else:
            loss = ce(f["adv"], y).mean()
        loss = loss + LAMBDA * self.penalty(f, x, y, u, w)
        grads = torch.autograd.grad(loss, list(w.values()))
        for (k, p), g in zip(self.w.items(), grads, strict=True):
            self.v[k] = c.momentum * self.v[k] + g + c.weight_decay * p
            self.w[k] = p - c.lr * self.v[k]


@pytest.mark.parametrize("method, regularizer, variant", COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])
def test_weights_after_two_steps(method, regularizer, variant, tiny, config):
    c = config(method=method, regularizer=regularizer, variant=variant, epochs=1, batch_size=8, width=2, steps=STEPS, eps=EPS,
               weight=LAMBDA, beta=BETA, warmup=0, penalty="abs", lr=0.05, schedule="constant", precision="fp64", augment="none",
               eval_size=2, eval_steps=1, probe_size=2, final_size=2, final_steps=1)  # fmt: skip
    data = replace(tiny, train=tiny.train.take(slice(16)))
    run = train(c, data, verbose=False)
    reference = Reference(model_from_config(c, data), c, make_generator("cpu", "epoch", c.seed, 0))
    start = {k: v.clone() for k, v in reference.w.items()}
    for x, y in data.train.batches(8, reference.g, "none", torch.float64):
        reference.step(x, y)
    found, moved = load_checkpoint(run.folder / "final.pt")["state"], 0.0
    for k, expected in (reference.w | reference.buffers).items():
        torch.testing.assert_close(found[k], expected, rtol=1e-9, atol=1e-9)
        moved = max(moved, (expected - start[k]).abs().max().item() if k in start else 0.0)
    assert moved > 1e-3 and math.isfinite(moved)
