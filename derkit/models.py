"""Classifiers of images in [0, 1], each with its normaliser inside: eps is in pixel units."""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit.util import DerkitError, pick


class Normalize(nn.Module):
    """(x - mean) / std per channel; x is (B, C, H, W) in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class OneLayer(nn.Module):
    """One 3x3 convolution, ReLU, one linear layer: the smallest network that catastrophically
    overfits (after the four-filter CNN of arXiv 2007.02617)."""

    def __init__(self, channels: int, classes: int, size: int, filters: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, 3, padding=1)
        self.head = nn.Linear(filters * size**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


class SmallCNN(nn.Module):
    """Four 3x3 convolutions; 92k parameters at width 16 on 28x28 grey images. Strided first layers
    would print a checkerboard into input gradients, so it pools averages instead."""

    def __init__(self, channels: int, classes: int, size: int, width: int = 16, bn: bool = True):
        super().__init__()

        def block(inp: int, out: int) -> list[nn.Module]:
            norm = [nn.BatchNorm2d(out)] if bn else []
            return [nn.Conv2d(inp, out, 3, padding=1, bias=not bn), *norm, nn.ReLU()]

        self.features = nn.Sequential(
            *block(channels, width), nn.AvgPool2d(2), *block(width, 2 * width), nn.AvgPool2d(2),
            *block(2 * width, 4 * width), *block(4 * width, 4 * width))
        self.head = nn.Linear(4 * width * (size // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def _conv(inp: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2, bias=False)


class PreActBlock(nn.Module):
    """Pre-activation block. ``shortcut='x'`` projects x itself, ``'bn'`` projects BN-ReLU(x)."""

    def __init__(self, inp: int, out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inp), _conv(inp, out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), _conv(out, out)
        self.from_bn = shortcut == "bn"
        same = stride == 1 and inp == out
        self.project = None if same else _conv(inp, out, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x
        if self.project is not None:
            skip = self.project(h if self.from_bn else x)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


class PreActNet(nn.Module):
    """Stem, stages of ``blocks`` pre-activation blocks (all but the first start with stride 2),
    perhaps a last BN-ReLU, mean, linear layer. stem, widths: channels after it, and of each stage.
    """

    def __init__(self, channels: int, classes: int, stem: int, widths: Sequence[int], blocks: int,
                 shortcut: str, final_bn: bool) -> None:
        super().__init__()
        self.stem = _conv(channels, stem)
        layers, inp = [], stem
        for stage, out in enumerate(widths):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(PreActBlock(inp, out, stride, shortcut))
                inp = out
        self.body = nn.Sequential(*layers)
        self.final = nn.Sequential(nn.BatchNorm2d(inp), nn.ReLU()) if final_bn else nn.Identity()
        self.head = nn.Linear(inp, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.body(self.stem(x))).mean((2, 3)))


class PreActResNet(PreActNet):
    """PreActResNet-18, a name that public code gives to three networks; two switches tell which:
    ``shortcut='bn', final_bn=True``: robust_overfitting (Rice et al.). ``'x', True``:
    fast_adversarial, N-FGSM. ``'x', False``: understanding-fast-adv-training (GradAlign)."""

    def __init__(self, channels: int, classes: int, size: int, width: int = 64,
                 shortcut: str = "bn", final_bn: bool = True) -> None:
        if shortcut not in ("x", "bn"):
            raise DerkitError(f"shortcut must be 'x' or 'bn', found {shortcut!r}.")
        widths = [width, 2 * width, 4 * width, 8 * width]
        super().__init__(channels, classes, width, widths, 2, shortcut, final_bn)


class WideResNet(PreActNet):
    """WRN-depth-width (depth = 6n + 4), shortcut from BN-ReLU(x), final BN, no dropout."""

    def __init__(self, channels: int, classes: int, size: int, depth: int = 28, width: int = 10):
        if depth < 10 or (depth - 4) % 6:
            raise DerkitError(f"wide_resnet depth must be 6n + 4 (10, 16, 22, ...), found {depth}.")
        widths = [16 * width, 32 * width, 64 * width]
        super().__init__(channels, classes, 16, widths, (depth - 4) // 6, "bn", True)


MODELS = dict(one_layer=OneLayer, small_cnn=SmallCNN, preact_resnet18=PreActResNet,
              wide_resnet=WideResNet)
# what each model can be told beyond its channels, classes and size
OPTIONS = {name: tuple(signature(net).parameters)[3:] for name, net in MODELS.items()}


def build_model(name: str, channels: int, classes: int, size: int,
                mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
                **options) -> nn.Sequential:
    """A model by name as Sequential(Normalize, net): (B, C, H, W) in [0, 1] to logits (B, classes).

    The model carries ``spec``, a plain dict that rebuilds it (stored in checkpoints).
    Raises DerkitError for an unknown name or an option that the model does not have."""
    net = pick("model", name, MODELS)
    for key in options:
        if key not in OPTIONS[name]:
            allowed = ", ".join(OPTIONS[name])
            raise DerkitError(f"model {name!r} has no option {key!r}; it has: {allowed}.")
    mean, std = list(mean or [0.0] * channels), list(std or [1.0] * channels)
    if not len(mean) == len(std) == channels:
        raise DerkitError(f"the normaliser needs one mean and std per channel ({channels}), "
                          f"found {mean} and {std}.")
    model = nn.Sequential(Normalize(mean, std), net(channels, classes, size, **options))
    spec = dict(name=name, channels=channels, classes=classes, size=size, mean=mean, std=std)
    model.spec = spec | options
    return model


def same_network(a: dict, b: dict) -> bool:
    """Do two specs build the same network? Options left out are defaults; mean, std don't count."""

    def whole(spec: dict) -> dict:
        parameters = signature(MODELS[spec["name"]]).parameters
        options = {key: spec.get(key, parameters[key].default) for key in OPTIONS[spec["name"]]}
        return options | {key: spec[key] for key in ("name", "channels", "classes", "size")}

    return whole(a) == whole(b)


def describe(spec: dict) -> str:
    """The variant in words, for records and captions: 'preact_resnet18(shortcut=bn, width=64)'."""
    inside = ", ".join(f"{k}={v}" for k, v in spec.items() if k in OPTIONS.get(spec["name"], ()))
    return f"{spec['name']}({inside})" if inside else spec["name"]
