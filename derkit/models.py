"""Classifiers. Every model takes images in [0, 1] and holds its own normaliser, so eps is always in pixel units."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit.errors import DerkitError, pick


class Normalize(nn.Module):
    """(x - mean) / std per channel; x is (B, C, H, W) in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1).float())
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _conv(inp: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2, bias=False)


class SmallCNN(nn.Module):
    """Four 3x3 convolutions for 28x28 and 32x32 images; 92k parameters at width 16 on 28x28 grey images.

    Early layers have stride 1 and are average-pooled: a strided first layer prints a checkerboard into input gradients.
    """

    def __init__(self, channels: int, classes: int, size: int, width: int = 16, bn: bool = True) -> None:
        super().__init__()

        def block(inp: int, out: int) -> list[nn.Module]:
            norm = [nn.BatchNorm2d(out)] if bn else []
            return [nn.Conv2d(inp, out, 3, padding=1, bias=not bn), *norm, nn.ReLU()]

        self.features = nn.Sequential(
            *block(channels, width), nn.AvgPool2d(2),
            *block(width, 2 * width), nn.AvgPool2d(2),
            *block(2 * width, 4 * width), *block(4 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width * (size // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class PreActBlock(nn.Module):
    """Pre-activation block. ``shortcut='x'`` projects x itself, ``'bn'`` projects BN-ReLU(x)."""

    def __init__(self, inp: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inp), _conv(inp, out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), _conv(out, out)
        self.from_bn = shortcut == "bn"
        self.project = _conv(inp, out, stride, kernel=1) if stride != 1 or inp != out else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.project is None else self.project(h if self.from_bn else x)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


class PreActResNet(nn.Module):
    """PreActResNet-18, of which public code holds three different networks; the two switches name ours.

    ``shortcut='bn', final_bn=True``: robust_overfitting (Rice et al.). ``'x', True``: fast_adversarial, N-FGSM.
    ``'x', False``: understanding-fast-adv-training (GradAlign).
    """

    def __init__(self, channels: int, classes: int, size: int, width: int = 64, shortcut: str = "bn",
                 final_bn: bool = True, blocks: Sequence[int] = (2, 2, 2, 2)) -> None:
        super().__init__()
        if shortcut not in ("x", "bn"):
            raise DerkitError(f"shortcut must be 'x' or 'bn', found {shortcut!r}.")
        self.stem = _conv(channels, width)
        layers, inp = [], width
        for stage, n in enumerate(blocks):
            out = width * 2**stage
            for i in range(n):
                layers.append(PreActBlock(inp, out, 2 if stage and not i else 1, shortcut))
                inp = out
        self.body = nn.Sequential(*layers)
        self.final = nn.Sequential(nn.BatchNorm2d(inp), nn.ReLU()) if final_bn else nn.Identity()
        self.head = nn.Linear(inp, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.body(self.stem(x))).mean((2, 3)))


class WideResNet(nn.Module):
    """WRN-depth-width (depth = 6n + 4), shortcut from BN-ReLU(x), final BN, no dropout."""

    def __init__(self, channels: int, classes: int, size: int, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise DerkitError(f"wide_resnet depth must be 6n + 4 (10, 16, 22, 28, 34, ...), found {depth}.")
        n, inp, layers = (depth - 4) // 6, 16, []
        self.stem = _conv(channels, inp)
        for stage in range(3):
            out = 16 * width * 2**stage
            for i in range(n):
                layers.append(PreActBlock(inp, out, 2 if stage and not i else 1, "bn"))
                inp = out
        self.body = nn.Sequential(*layers)
        self.final = nn.Sequential(nn.BatchNorm2d(inp), nn.ReLU())
        self.head = nn.Linear(inp, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.body(self.stem(x))).mean((2, 3)))


MODELS: dict[str, type[nn.Module]] = {
    "small_cnn": SmallCNN,
    "preact_resnet18": PreActResNet,
    "wide_resnet": WideResNet,
}
OPTIONS = {  # what each model can be told beyond its input and output
    "small_cnn": ("width", "bn"),
    "preact_resnet18": ("width", "shortcut", "final_bn"),
    "wide_resnet": ("depth", "width"),
}


def build_model(name: str, channels: int, classes: int, size: int, mean: Sequence[float] | None = None,
                std: Sequence[float] | None = None, **options) -> nn.Sequential:
    """A model by name as Sequential(Normalize, net): (B, C, H, W) in [0, 1] -> logits (B, classes).

    The returned module carries ``spec``, a plain dict that rebuilds it (stored in checkpoints).
    Raises DerkitError for an unknown name or an option that the model does not have.
    """
    net = pick("model", name, MODELS)
    for key in options:
        if key not in OPTIONS[name]:
            raise DerkitError(f"model {name!r} has no option {key!r}; it has: {', '.join(OPTIONS[name])}.")
    mean, std = list(mean or [0.0] * channels), list(std or [1.0] * channels)
    if not len(mean) == len(std) == channels:
        raise DerkitError(f"the normaliser needs one mean and std per channel ({channels}), found {mean} and {std}.")
    model = nn.Sequential(Normalize(mean, std), net(channels, classes, size, **options))
    model.spec = dict(name=name, channels=channels, classes=classes, size=size, mean=mean, std=std, **options)
    return model


def same_network(a: dict, b: dict) -> bool:
    """Do two specs build the same network? Options left out count as their defaults; the normaliser's values do not count."""

    def whole(spec: dict) -> dict:
        parameters = signature(MODELS[spec["name"]]).parameters
        options = {k: spec.get(k, parameters[k].default) for k in OPTIONS[spec["name"]]}
        return options | {k: spec[k] for k in ("name", "channels", "classes", "size")}

    return whole(a) == whole(b)


def describe(spec: dict) -> str:
    """The model's variant in words, for records and figure captions: 'preact_resnet18(shortcut=bn, final_bn=True)'."""
    options = {k: v for k, v in spec.items() if k in OPTIONS.get(spec["name"], ())}
    inside = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"{spec['name']}({inside})" if inside else spec["name"]


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
