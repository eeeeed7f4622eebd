"""The feature extractor of the offline metrics: small, separately trained, known to torch-fidelity under its hash.

It is not robust and of another architecture than the kit's classifiers: a generator must never be judged by
the classifier that it descends on. It is trained by scripts/train_extractor.py; its weights' hash is part of its name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit.checkpoint import load_checkpoint
from derkit.data import Dataset
from derkit.data_sources import home
from derkit.errors import CheckpointError, DerkitError

FASHION_SHA256 = "c1fedbe10dd6788e4476b444204431aa5d4e0dbdd235225a207dfc6310e840f6"
BUNDLED = {  # data set -> file in derkit/assets, sha256 of its weights
    "fashion_mini": ("extractor_fashion.pt", FASHION_SHA256),
    "fashion_mnist": ("extractor_fashion.pt", FASHION_SHA256),
}


class _Block(nn.Module):
    """x + two 3x3 convolutions, GroupNorm and GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.na, self.nb = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.nb(self.b(F.gelu(self.na(self.a(x)))))


class ExtractorNet(nn.Module):
    """A strided residual net with GroupNorm and GELU: float images (B, C, H, W) in [0, 1] -> (features (B, 72),
    logits).

    Features: channel means of an early layer (24, they see noise and blur) and of the last one (48, they see what it
    is), each group times one constant that gives it a mean variance of 1 on the training images. The last layer alone
    hardly tells noise from a shirt.
    """

    def __init__(self, channels: int, classes: int, width: int = 24) -> None:
        super().__init__()
        self.spec = dict(name="extractor", channels=channels, classes=classes, width=width)
        self.early = nn.Sequential(nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.GELU(), _Block(width))
        self.late = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU(), _Block(2 * width),
                                  _Block(2 * width))
        self.head = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, classes))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.early(2 * x - 1)
        late = self.late(early).mean((2, 3))
        return torch.cat([self.scale[0] * early.mean((2, 3)), self.scale[1] * late], 1), self.head(late)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the two constants from images x."""
        self.scale.fill_(1)
        early, late = self(x)[0].split([self.spec["width"], 2 * self.spec["width"]], 1)
        self.scale.copy_(torch.stack([g.var(0).mean().rsqrt() for g in (early, late)]))


@dataclass(frozen=True)
class Extractor:
    """An extractor known to torch-fidelity under ``name``. ``letter``: 'I' for Inception's metrics (IS, FID, KID),
    'C' for those of a separately trained classifier (CIS, CFD, CKD). ``info``: what a record should say about it."""

    name: str
    letter: str
    sha256: str
    net: ExtractorNet | None = None
    path: Path | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, str, str]:
        """Names of the score, the Frechet distance and the kernel distance."""
        return ("IS", "FID", "KID") if self.letter == "I" else ("CIS", "CFD", "CKD")

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int = 500) -> Tensor | None:
        """Class logits (N, K) of uint8 images; None for Inception, which does not know the data's classes."""
        if self.net is None:
            return None
        device = next(self.net.parameters()).device
        return torch.cat([self.net(b.to(device).float() / 255)[1] for b in images.split(batch_size)]).to(images.device)


# ------------------------------------------------------------------------------------------------- torch-fidelity
def torch_fidelity() -> Any:
    """The package torch_fidelity (extra: eval), or DerkitError."""
    try:
        import torch_fidelity as package
        import torch_fidelity.registry  # noqa: F401
    except ImportError as error:
        raise DerkitError('the metrics need the package torch-fidelity: pip install "derkit[eval]".') from error
    return package


def _fidelity_class(base: type, make_net: Callable[[], ExtractorNet]) -> type:
    """A torch-fidelity extractor around a net: uint8 (B, C, H, W) -> features in the order that was asked for."""

    class SmallExtractor(base):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.net = make_net()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> None:
            return None

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            both = dict(zip(("features", "logits"), self.net(images.float() / 255), strict=True))
            return tuple(both[name] for name in self.features_list)

    return SmallExtractor


def register(net: ExtractorNet, sha256: str) -> str:
    """Make a net known to torch-fidelity; returns its name, 'derkit-<8 hex digits of the weights' hash>'.

    Registering the same weights again (a notebook cell run twice) changes nothing.
    """
    package = torch_fidelity()
    name = f"derkit-{sha256[:8]}"
    if name not in package.registry.FEATURE_EXTRACTORS_REGISTRY:
        cls = _fidelity_class(package.FeatureExtractorBase, lambda: copy.deepcopy(net).cpu())
        package.register_feature_extractor(name, cls)
    return name


def load_extractor(path: str | os.PathLike, sha256: str | None = None) -> Extractor:
    """The small extractor of a file, registered. Raises CheckpointError for a file that is damaged or has other
    weights."""
    content = load_checkpoint(path)
    spec = dict(content["spec"])
    if spec.pop("name", None) != "extractor":
        raise CheckpointError(f"{path} holds {content['variant']}, not a feature extractor: a classifier of the kit "
                              "must not judge its own samples. Train one with scripts/train_extractor.py.")
    if sha256 is not None and content["sha256"] != sha256:
        raise CheckpointError(f"{path}: weights {content['sha256'][:8]}, expected {sha256[:8]}. Reinstall derkit.")
    net = ExtractorNet(**spec)
    net.load_state_dict(content["state"])  # stored in half precision, computed in float32
    net.eval().requires_grad_(False)
    info = {k: v for k, v in content["config"].items() if k != "history"}
    return Extractor(register(net, content["sha256"]), "C", content["sha256"], net, Path(path), info)


def extractor_for(dataset: Dataset | str, path: str | os.PathLike | None = None) -> Extractor:
    """The offline extractor of a data set: the given file, the bundled one, or DERKIT_HOME/extractors/<name>.pt.

    Raises DerkitError that says how to train one where there is none.
    """
    name = dataset if isinstance(dataset, str) else dataset.name
    if path:
        extractor = load_extractor(path)
    elif name in BUNDLED:
        file, sha256 = BUNDLED[name]
        extractor = load_extractor(str(resources.files("derkit") / "assets" / file), sha256)
    else:
        own = home() / "extractors" / f"{name}.pt"
        if not own.is_file():
            raise DerkitError(f"no feature extractor for {name}. Train one (minutes): python scripts/train_extractor.py"
                              f" --dataset {name} --out {own}, or pass path=FILE, or use inception(path).")
        extractor = load_extractor(own)
    if not isinstance(dataset, str):
        net, found = extractor.net, (dataset.channels, len(dataset.classes))
        if (net.spec["channels"], net.spec["classes"]) != found:
            made_for = f"{net.spec['channels']} channels and {net.spec['classes']} classes"
            raise DerkitError(f"extractor {extractor.name} takes {made_for}, the data has {found[0]} and {found[1]}.")
    return extractor
