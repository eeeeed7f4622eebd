"""What is minimised: methods (how x* is made and enters the loss) and the regularisers beside DER.

Every object here keeps what the config says and what one step needs. All points of a step go
through the model in one forward: an objective or regulariser names the images that it needs
(``points``) and is called with their logits."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit import attacks
from derkit.attacks import attack_mode, input_gradient, noise_in_ball
from derkit.config import TrainConfig
from derkit.energy import abnormal_mask, cross_entropy, loss_linearity, marginal_energy, upcast
from derkit.training.der import DER, Logits


def trades(nat: Tensor, adv: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """CE(x, y) + beta KL(p(.|x) || p(.|x*)), (B,), gradient through both (arXiv 1901.08573)."""
    log_p = F.log_softmax(upcast(nat), 1)
    return cross_entropy(nat, y) + beta * attacks.kl(adv, log_p)


def weat(nat: Tensor, adv: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """WEAT_nat, (B,) (arXiv 2407.06315): TRADES weighted by 1 / log(1 + e^|E(x)|), detached."""
    weight = 1 / F.softplus(marginal_energy(nat).abs()).detach()
    return weight * trades(nat, adv, y, beta)


def aaer(start: Tensor, adv: Tensor, y: Tensor) -> Tensor:
    """AAER (arXiv 2404.08154), a number: n/m (2.5 CE_A + 1.5 max(0, V_A - V_N)).

    Over the n abnormal of m examples, from the logits at the attack's start (constants) to those
    at x*: CE_A is the mean fall of their loss, V_A the mean squared change of their logits, V_N (a
    constant, too) that of the normal ones. 2.5, 1.5: the authors' for RS-FGSM, CIFAR-10, 8/255.
    Their code takes CE_A without its gradient; here it has it. 0 if n is 0 or m."""
    start, adv = upcast(start).detach(), upcast(adv)
    chosen = abnormal_mask(start, adv, y).to(adv.dtype)
    n, m = chosen.sum(), len(chosen)
    fall = cross_entropy(start, y) - cross_entropy(adv, y)
    change = (adv - start).square().sum(1)
    normal = ((1 - chosen) * change).sum().detach() / (m - n).clamp_min(1)
    excess = ((chosen * change).sum() / n.clamp_min(1) - normal).clamp_min(0)
    both = (n > 0) & (n < m)
    return both * n / m * (2.5 * (chosen * fall).sum() / n.clamp_min(1) + 1.5 * excess)


def awp_weights(model: nn.Module, loss: Tensor, gamma: float) -> dict[str, Tensor]:
    """AWP (arXiv 2004.05884): weights moved, layer by layer, to where the loss is higher, by a step
    of the authors' proxy: w + gamma |w| g / |g| for those of two or more dimensions, g = dloss/dw.
    Gradients of a loss at them reach w itself (`torch.func.functional_call`)."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return {name: w + gamma * w.detach().norm() * g / g.norm().clamp_min(1e-20)
            for (name, w), g in zip(weights.items(), gradients, strict=True)}


class Objective:
    """A training method by its name in the config: its attack, and its loss over a batch."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.natural = config.method in ("trades", "weat")  # needs the logits of x, too

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator):
        """(x*, the attack's start, its logits): single-step attacks know the latter two for free,
        others give None for them."""
        c = self.config
        if c.method == "standard":
            return x, None, None
        options = dict(bn_mode=c.bn_mode, generator=rng, check=False)
        if c.method in ("pgd", "trades", "weat"):
            loss = "kl" if self.natural else "ce"
            options |= dict(alpha=c.step_size, steps=c.steps, norm=c.norm, loss=loss)
            return attacks.pgd(model, x, y, c.eps, **options), None, None
        options |= dict(alpha=c.step_size, return_start=True)
        options |= dict(n_fgsm=dict(k=c.k), zerograd=dict(q=c.q)).get(c.method, {})
        return attacks.ATTACKS[c.method](model, x, y, c.eps, **options)

    def points(self, x: Tensor) -> Logits:
        """The images that the loss needs beside x*."""
        return {"nat": x} if self.natural else {}

    def __call__(self, logits: Logits, y: Tensor) -> Tensor:
        """The mean loss of a batch."""
        if self.natural:
            loss = trades if self.config.method == "trades" else weat
            return loss(logits["nat"], logits["adv"], y, self.config.beta).mean()
        return cross_entropy(logits["adv"], y).mean()


class ELLE:
    """ELLE (OpenReview SZzQz8ikwg): `loss_linearity` on random triplets of the ball."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def points(self, x: Tensor, x_adv: Tensor, rng: torch.Generator) -> Logits:
        eps, norm = self.config.eps, self.config.norm
        a, b = (x + noise_in_ball(x, eps, norm, rng) for _ in range(2))
        self.u = torch.rand(len(x), generator=rng, device=x.device, dtype=x.dtype)
        return {"a": a, "b": b, "c": torch.lerp(a, b, self.u.view(-1, 1, 1, 1))}

    def __call__(self, logits: Logits, y: Tensor) -> Tensor:
        return loss_linearity(logits["a"], logits["c"], logits["b"], self.u, y).mean()


class GradAlign:
    """GradAlign (arXiv 2007.02617): mean 1 - cos(grad l(x), grad l(x + r)), r uniform in the ball,
    the gradient at x detached. Samples with a zero gradient count as aligned. It asks for no
    points: its gradients need a graph of their own."""

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        self.config, self.model = config, model

    def points(self, x: Tensor, x_adv: Tensor, rng: torch.Generator) -> Logits:
        self.x, self.near = x, x + noise_in_ball(x, self.config.eps, self.config.norm, rng)
        return {}

    def __call__(self, logits: Logits, y: Tensor) -> Tensor:
        with attack_mode(self.model, self.config.bn_mode):
            a, _ = input_gradient(self.model, self.x, lambda f: cross_entropy(f, y))
            near = self.near.detach().requires_grad_(True)
            loss = cross_entropy(self.model(near), y).sum()
            b = torch.autograd.grad(loss, near, create_graph=True)[0]
        a, b = a.flatten(1), b.flatten(1)
        alive = (a.norm(dim=1) > 0) & (b.detach().norm(dim=1) > 0)
        # ones keep NaN out of the cosine's backward pass
        a, b = (torch.where(alive[:, None], g, 1.0) for g in (a, b))
        cosine = F.cosine_similarity(a, b, dim=1, eps=1e-20)
        return torch.where(alive, 1 - cosine, 0.0).mean()


class AAER:
    """`aaer` in training: it needs nothing but the logits of the attack's start."""

    def points(self, x: Tensor, x_adv: Tensor, rng: torch.Generator) -> Logits:
        return {}

    def __call__(self, logits: Logits, y: Tensor) -> Tensor:
        return aaer(logits["start"], logits["adv"], y)


def make_regularizer(config: TrainConfig, model: nn.Module) -> DER | ELLE | GradAlign | AAER | None:
    """The regulariser that the config names, or None where there is none or its weight is 0."""
    if config.regularizer == "none" or config.strength == 0:
        return None
    if config.regularizer == "gradalign":
        return GradAlign(config, model)
    if config.regularizer == "aaer":
        return AAER()
    return DER(config) if config.regularizer == "der" else ELLE(config)


def weight_at(config: TrainConfig, progress: float) -> float:
    """lambda after a share ``progress`` of training: 0 before ``start``, rising over ``warmup``;
    GradAlign and AAER have their full weight at once, as published."""
    if config.regularizer == "none" or progress < config.start:
        return 0.0
    if config.regularizer in ("gradalign", "aaer") or config.warmup == 0:
        return config.strength
    return config.strength * min(1.0, (progress - config.start) / config.warmup)
