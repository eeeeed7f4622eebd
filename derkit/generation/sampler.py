"""The sampler: a batch of chains descends on the guided energy, each until its own stop.

    E_w(x, y) = E(x) + w (-log p(y|x))          w = 0: E(x);  w = 1: E(x, y)
    v <- zeta v + step(grad E_w),   x <- clip(x + v + s xi, 0, 1)

A chain that has stopped leaves the batch and stays as it was (its stop is latched). Noise belongs
to the sample's global index: a result does not depend on the batch, up to the network's rounding.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.backends import cudnn

from derkit.attacks import attack_mode, input_gradient
from derkit.checkpoint import state_hash
from derkit.config import GenerateConfig
from derkit.data import Dataset, Split
from derkit.diagnosis.evaluation import predict
from derkit.energy import cross_entropy, joint_energy, marginal_energy, upcast
from derkit.generation.starts import sample_noise
from derkit.util import DerkitError, autocast, cached, images_format


@dataclass(frozen=True)
class Reference:
    """Energies of the images that a model gets right: no absolute scale, they belong to it."""

    joint: Tensor  # (M,) float64: E(x, y), sorted inside each class, the classes end to end
    start: Tensor  # (K + 1,): class c is joint[start[c] : start[c + 1]]

    counts = property(lambda self: self.start.diff())  # (K,): that many images of each class

    def of(self, c: int) -> Tensor:
        """The sorted energies of class c."""
        return self.joint[self.start[c] : self.start[c + 1]]


def reference_energies(model: nn.Module, dataset: Dataset, split: str = "train") -> Reference:
    """`Reference` of a model on a split: one forward pass in eval mode, cached under the hashes of
    both and the model's first logits (weights alone do not say what a module does with them).
    Raises DerkitError where model and data do not fit, or the logits are not finite."""
    part, classes, name = getattr(dataset, split), len(dataset.classes), dataset.name
    device, shape = part.images.device, tuple(part.images.shape[1:])
    channels = (getattr(model, "spec", None) or {}).get("channels", shape[0])
    if channels != shape[0]:  # a normaliser of 3 channels would quietly make 3 out of 1
        raise DerkitError(f"the model takes {channels} channels, {name} has {shape[0]}.")

    def logits_of(some: Split) -> Tensor:
        try:
            return predict(model, some).double()
        except RuntimeError as error:
            raise DerkitError(f"the model does not take the images of {name}, {shape} on {device}: "
                              f"{str(error).splitlines()[0]}") from error  # fmt: skip

    def measure() -> tuple[Tensor, Tensor]:
        logits = logits_of(part)
        if logits.shape[1] != classes:
            raise DerkitError(f"the model has {logits.shape[1]} classes, {name} has {classes}: a "
                              "checkpoint of another data set?")  # fmt: skip
        if not logits.isfinite().all():
            raise DerkitError(f"the model's logits on the {split} images are not all finite.")
        joint, right = joint_energy(logits, part.labels), logits.argmax(1) == part.labels
        found = [joint[right & (part.labels == c)].sort().values for c in range(classes)]
        return torch.cat(found), torch.tensor([0, *map(len, found)]).cumsum(0)

    seen = logits_of(part.take(slice(16))).round(decimals=2)  # threads round otherwise
    key = state_hash(model.state_dict() | {"seen": seen}), dataset.sha256, split, device.type
    tensors = cached("energies", key, measure)
    return Reference(*(t.to(device) for t in tensors))


def energy_targets(reference: Reference, index: Tensor, labels: Tensor,
                   config: GenerateConfig) -> Tensor:  # fmt: skip
    """e* = q_c(u), the u quantile of the class's real energies, u ~ U(low, high) of the sample,
    (B,) float64: samples' energies spread as the data's (our reading of adaptive stopping)."""
    u = sample_noise(index, 1, config.seed, "target", uniform=True, dtype=torch.float64)[:, 0]
    first, last = reference.start[labels], reference.start[labels + 1] - 1
    place = first + (config.low + (config.high - config.low) * u) * (last - first)
    low, joint = place.floor().long(), reference.joint
    return torch.lerp(joint[low], joint[torch.minimum(low + 1, last)], place - low)


def _limits(reference: Reference | None, index: Tensor, labels: Tensor,
            config: GenerateConfig) -> Tensor:  # fmt: skip
    """What chains are held against, (3, B) float64, NaN without real energies: e*, mean and
    standard deviation of the class's real E(x, y)."""
    if reference is not None and (reference.counts[labels] > 0).all():
        classes = [reference.of(c) for c in range(len(reference.counts))]
        mean = torch.stack([e.mean() for e in classes])
        variance = torch.stack([(e - e.mean()).square().sum() / (len(e) - 1) for e in classes])
        target = energy_targets(reference, index, labels, config)
        return torch.stack([target, mean[labels], variance.sqrt()[labels]])
    if config.stop != "fixed":
        raise DerkitError(f"stop={config.stop} needs real energies: pass reference_energies(...).")
    return labels.new_full((3, len(labels)), torch.nan, dtype=torch.float64)


def _ended(values: Tensor, limits: Tensor, step: int, config: GenerateConfig) -> Tensor:
    """Which chains end, given their readings (3, B) after ``step`` steps.

    fixed: none. mean_band: (E(x, y) - mean of the class)^2 is small (ECCV'24, width not stated; a
    step may jump over). quantile: down at the energy of a real image (one-sided, our reading)."""
    (joint, _, prob), (target, mean, std) = values, limits
    stop = {"fixed": torch.zeros_like(joint, dtype=torch.bool),
            "mean_band": (joint - mean).abs() < config.band * std,
            "quantile": joint <= target}[config.stop]
    return stop & (prob >= config.p_min) & (step >= config.min_steps)


def drift(grad: Tensor, config: GenerateConfig) -> Tensor:
    """plain: -eta/2 grad, Langevin's drift on the model's own scale (ECCV'24). normalised:
    -eta grad/||grad||_2, every image moves by eta, so that models can be compared."""
    if config.rule == "plain":
        return -0.5 * config.eta * grad
    return -config.eta * grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def guided_energy(logits: Tensor, labels: Tensor, w: float) -> Tensor:
    """E_w(x, y) = E(x) + w (-log p(y|x)), (B,)."""
    return marginal_energy(logits) + w * cross_entropy(logits, labels)


def readings(logits: Tensor, labels: Tensor) -> Tensor:
    """(3, B) float64: E(x, y), E(x), p(y|x)."""
    f = upcast(logits).detach().double()
    prob = (-cross_entropy(f, labels)).exp()
    return torch.stack([joint_energy(f, labels), marginal_energy(f), prob])


@dataclass
class Chains:
    """What became of a batch of chains: images (n, C, H, W) in [0, 1], the rest (n,) or as said."""

    x: Tensor
    x0: Tensor
    labels: Tensor
    index: Tensor  # global number
    target: Tensor  # e* (NaN without real energies)
    steps: Tensor  # taken
    reached: Tensor  # does the stop rule hold at the end?
    start: Tensor = field(repr=False)  # (3, n): E(x, y), E(x), p(y|x) of x0
    end: Tensor = field(repr=False)  # (3, n): of x
    trace: Tensor | None = field(repr=False)  # (steps + 1, 3, n), NaN once a chain has stopped
    frames: Tensor | None = field(repr=False)  # (F, n, C, H, W), after ``frame_steps`` steps
    frame_steps: list[int]


def quantise(x: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8, rounded to nearest."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def saturated(images: Tensor) -> float:
    """Share of pixels at 0 or 255 (Fashion-MNIST's background is: compare with real images)."""
    return ((images == 0) | (images == 255)).double().mean().item()


def _kept(moving: Tensor, multiple: int) -> Tensor | slice:
    """Rows that stay in the batch: all that move, and ended ones up to a multiple."""
    size = -(-int(moving.sum()) // multiple) * multiple
    return slice(None) if size >= len(moving) else (~moving).byte().argsort(stable=True)[:size]


def sample(model: nn.Module, x0: Tensor, labels: Tensor, index: Tensor, config: GenerateConfig,
           reference: Reference | None = None, *, trace: bool = False,
           frames_every: int = 0) -> Chains:  # fmt: skip
    """Run one batch of chains from x0 (n, C, H, W) in [0, 1] towards ``labels`` (n,).

    index: the samples' global numbers (n,). reference: for all stops but 'fixed'. The model runs in
    eval mode and is not changed. A step's check uses the forward pass of its gradient; a chain that
    stops is returned as before its last noise. Batches shrink as chains end: to any size on a CPU,
    to eighths of the full size elsewhere (few shapes; ended chains fill up)."""
    limits, n, memory = _limits(reference, index, labels, config), len(x0), images_format(model)
    multiple = 1 if x0.device.type == "cpu" else max(1, n // 8)
    rows = torch.arange(n, device=x0.device)  # the chains in the batch, and which of them move
    moving = torch.ones_like(rows, dtype=torch.bool)
    x, v = x0.contiguous(memory_format=memory), torch.zeros_like(x0)
    out, steps = x0.clone(), torch.full_like(labels, config.steps)  # of all chains
    path = limits.new_full((config.steps + 1, 3, n), torch.nan)  # readings at every step
    frames = {}
    same = cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False)  # every time
    with attack_mode(model), autocast(x0.device, config.precision), same:
        for t in range(config.steps):
            y = labels[rows]
            grad, logits = input_gradient(model, x, lambda f, y=y: guided_energy(f, y, config.w))
            values = readings(logits, y)
            path[t][:, rows[moving]] = values[:, moving]
            ended = moving & _ended(values, limits[:, rows], t, config)
            steps[rows[ended]] = t
            moving = moving & ~ended
            if not moving.any():
                break
            if frames_every and t % frames_every == 0:
                frames[t] = out.clone()
            keep = _kept(moving, multiple)
            rows, moving, x, v, grad = (part[keep] for part in (rows, moving, x, v, grad))
            v = config.momentum * v + drift(grad, config)
            x = (x + v).clamp(0, 1)
            out[rows[moving]] = x[moving]
            if config.noise and t < config.steps - 1:  # none on the last step
                xi = sample_noise(index[rows], x[0].numel(), config.seed, "langevin", t).view_as(x)
                x = (x + config.noise * xi).clamp(0, 1)
            x = x.contiguous(memory_format=memory)
        with torch.no_grad():
            end = readings(model(out.contiguous(memory_format=memory)), labels)
    full = steps == config.steps
    path[-1][:, full] = end[:, full]
    reached = ~full | _ended(end, limits, config.steps, config)
    if frames_every:
        frames[int(steps.max())] = out
    film = torch.stack(list(frames.values())) if frames_every else None
    return Chains(out, x0, labels, index, limits[0], steps, reached, path[0], end,
                  path if trace else None, film, list(frames))  # fmt: skip
