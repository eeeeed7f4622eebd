"""Feature extractors that judge generated images, known to torch-fidelity by name.

Offline: a small network, trained on its own by scripts/train_extractor.py, not robust and unlike
the kit's classifiers (what a generator descends on must never judge it). Or Inception from a file.
"""

import copy
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from derkit.checkpoint import load_checkpoint
from derkit.data import Dataset, to_float
from derkit.util import CheckpointError, DerkitError, home

FASHION = Path(__file__).resolve().parents[1] / "assets" / "extractor_fashion.safetensors"
BUNDLED = {"fashion_mini": FASHION, "fashion_mnist": FASHION}
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RELEASE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"


class _Block(nn.Module):
    """x + two 3x3 convolutions, each with GroupNorm, and a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.na, self.nb = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.nb(self.b(nn.functional.gelu(self.na(self.a(x)))))


class ExtractorNet(nn.Module):
    """Float images (B, C, H, W) in [0, 1] to features (B, 72) and class logits (B, K). Features are
    channel means of an early layer (24: noise and blur) and of the last one (48: what it is, but
    noise hardly differs from a shirt), each group times a constant (``scale``) that gives it a mean
    variance of 1 on the training images."""

    def __init__(self, channels: int, classes: int, width: int = 24) -> None:
        super().__init__()
        self.spec = dict(name="extractor", channels=channels, classes=classes, width=width)
        first = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.early = nn.Sequential(first, nn.GELU(), _Block(width))
        self.late = nn.Sequential(down, nn.GELU(), _Block(2 * width), _Block(2 * width))
        self.head = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, classes))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.early(2 * x - 1)
        late = self.late(early).mean((2, 3))
        features = torch.cat([self.scale[0] * early.mean((2, 3)), self.scale[1] * late], 1)
        return features, self.head(late)


@dataclass(frozen=True)
class Extractor:
    """An extractor that torch-fidelity knows as ``name``. columns: what its score, Frechet distance
    and kernel distance are called (Inception: IS, FID, KID). net: None for Inception, whose weights
    are at ``path``. info: words for a record."""

    name: str
    sha256: str
    path: Path
    net: ExtractorNet | None = None
    info: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, str, str] = ("CIS", "CFD", "CKD")

    @torch.no_grad()
    def logits(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Class logits (N, K) of uint8 images, from the small network only."""
        parts = images.to(self.net.scale.device).split(batch_size)
        return torch.cat([self.net(to_float(part))[1] for part in parts]).to(images.device)


def torch_fidelity() -> Any:
    """The package torch_fidelity (extra: eval), or DerkitError."""
    try:
        import torch_fidelity as package
    except ImportError as error:
        raise DerkitError('distances need torch-fidelity: pip install "derkit[eval]".') from error
    return package


def register(net: ExtractorNet, sha256: str) -> str:
    """Make a net known to torch-fidelity, once; returns its name, 'derkit-<8 digits of sha256>'."""
    package = torch_fidelity()

    class Registered(package.FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.net = copy.deepcopy(net).cpu()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("features", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            both = dict(zip(("features", "logits"), self.net(to_float(images)), strict=True))
            return tuple(both[name] for name in self.features_list)

    name = f"derkit-{sha256[:8]}"
    if name not in package.registry.FEATURE_EXTRACTORS_REGISTRY:
        package.register_feature_extractor(name, Registered)
    return name


def load_extractor(path: str | os.PathLike) -> Extractor:
    """The small extractor of a file, registered. CheckpointError if the file is anything else."""
    content = load_checkpoint(path)
    spec, sha256 = dict(content["spec"]), content["sha256"]
    if spec.pop("name") != "extractor":
        text = f"{path} holds {content['variant']}: a classifier must not judge its own samples"
        raise CheckpointError(f"{text}. Train an extractor with scripts/train_extractor.py.")
    try:
        net = ExtractorNet(**spec)
        net.load_state_dict(content["state"])  # stored in half precision, computed in float32
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a file of an extractor: {error}") from error
    net.eval().requires_grad_(False)
    return Extractor(register(net, sha256), sha256, Path(path), net, content["config"])


def extractor_for(dataset: Dataset | str, path: str | os.PathLike | None = None) -> Extractor:
    """The offline extractor of a data set: ``path``, the bundled one, or your own in DERKIT_HOME.
    Raises DerkitError where there is none, with the command that trains one, and where the data
    has other channels or classes than the extractor."""
    name = dataset if isinstance(dataset, str) else dataset.name
    path = Path(path or BUNDLED.get(name) or home() / "extractors" / f"{name}.safetensors")
    if not path.is_file():
        raise DerkitError(
            f"no feature extractor for {name}: {path} does not exist. Train one (minutes): python "
            f"scripts/train_extractor.py --dataset {name} --out {path}, or use inception(FILE).")
    extractor = load_extractor(path)
    takes = extractor.net.spec["channels"], extractor.net.spec["classes"]
    if dataset != name and takes != (dataset.channels, len(dataset.classes)):
        found = f"{name} has {dataset.channels} and {len(dataset.classes)}"
        raise DerkitError(f"{path} takes {takes[0]} channels and {takes[1]} classes, {found}.")
    return extractor


def inception(path: str | os.PathLike | None = None) -> Extractor:
    """Inception-v3, the TensorFlow weights of 2015 that FID is defined with, from a file: ``path``,
    else $DERKIT_INCEPTION (it or its folder), else torch hub's.

    Raises DerkitError with its address where there is no file. Any other file is refused too and
    never loaded: torch-fidelity would run the code of a pickle."""
    torch_fidelity()
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    file = Path(path or os.environ.get("DERKIT_INCEPTION") or hub).expanduser()
    file = file / INCEPTION_FILE if file.is_dir() else file
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if sha256 != INCEPTION_SHA256:
        raise DerkitError(
            f"IS, FID and KID need the Inception weights (sha256 {INCEPTION_SHA256[:8]}...), found "
            f"{sha256[:8]} at {file}. Download {RELEASE}/{INCEPTION_FILE} (91 MB) once and pass "
            "its path, or set DERKIT_INCEPTION.")
    info, columns = dict(weights=INCEPTION_FILE), ("IS", "FID", "KID")
    return Extractor("inception-v3-compat", sha256, file, info=info, columns=columns)


def judge(dataset: Dataset, file: str | os.PathLike | None = None) -> Extractor | None:
    """What judges samples of a data set: Inception from ``file`` if given, else `extractor_for`, or
    where that has none: None, and one printed line on how to get one."""
    if file:
        return inception(file)
    try:
        return extractor_for(dataset)
    except DerkitError as error:
        print(f"Distances are left out: {error}")
        return None
