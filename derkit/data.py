"""Data sets that live on the device as uint8; batches come out as floats in [0, 1], augmented on the device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from derkit import data_sources as sources
from derkit.augment import augment_batch, to_float
from derkit.errors import DataError, DerkitError, unknown

FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MINI_SHA256 = "47f2788161edf95f3db46a623d91180e37eaaa47ef01ee779730aed11eefa351"
MINI_SIZE = {"train": 4000, "valid": 1000, "test": 1000}


@dataclass(frozen=True)
class Spec:
    """What is fixed about a named data set; mean and std are the usual published ones of the training set."""

    channels: int
    size: int
    classes: list[str] | int
    mean: tuple[float, ...]
    std: tuple[float, ...]


SPECS: dict[str, Spec] = {
    "fashion_mini": Spec(1, 28, FASHION, (0.2860,), (0.3530,)),
    "fashion_mnist": Spec(1, 28, FASHION, (0.2860,), (0.3530,)),
    "cifar10": Spec(3, 32, CIFAR10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": Spec(3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Spec(3, 32, [str(d) for d in range(10)], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class Split:
    """images (N, C, H, W) uint8 and labels (N,) int64, both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images [start:stop] as floats in [0, 1]."""
        return to_float(self.images[start:stop], dtype)

    def take(self, index: Tensor | slice) -> Split:
        """The split restricted to an index tensor or slice."""
        return Split(self.images[index], self.labels[index])

    def batches(self, batch_size: int, generator: torch.Generator | None = None, augment: str = "none",
                dtype: torch.dtype = torch.float32, drop_last: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (x, y); shuffled and augmented when a generator (on the split's device) is given."""
        n, device = len(self), self.images.device
        order = None if generator is None else torch.randperm(n, generator=generator, device=device)
        for i in range(0, n - n % batch_size if drop_last else n, batch_size):
            if order is None:
                images, y = self.images[i : i + batch_size], self.labels[i : i + batch_size]
            else:
                index = order[i : i + batch_size]
                images, y = self.images[index], self.labels[index]
                images = augment_batch(images, augment, generator)
            yield to_float(images, dtype), y


@dataclass(frozen=True)
class Dataset:
    """A data set with three splits. ``source`` says in words which copy was read; ``sha256`` is of the images used."""

    name: str
    classes: list[str]
    source: str
    train: Split
    valid: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        return self.train.images.shape[2]

    def describe(self) -> str:
        """One line: name, source, split sizes, image shape."""
        return (f"{self.name} ({self.source}): {len(self.train)} train, {len(self.valid)} valid, "
                f"{len(self.test)} test, {len(self.classes)} classes, {self.channels}x{self.size}x{self.size}")


def _mini() -> tuple[dict[str, sources.Arrays], str]:
    path = resources.files("derkit") / "assets" / "fashion_mini.npz"
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != MINI_SHA256:
        raise DataError("the bundled fashion_mini.npz does not have the recorded sha256: reinstall derkit.")
    with np.load(BytesIO(raw), allow_pickle=False) as z:
        parts = {s: (z[f"{s}_images"][:, None], z[f"{s}_labels"].astype(np.int64)) for s in MINI_SIZE}
    return parts, "bundled"


def _full(name: str, data_dir, download: bool, image_size: int | None, progress) -> tuple[dict, str, list[str] | None]:
    """Train and test of a named data set from the first place that has it."""
    spec, looked = SPECS[name], []
    for root in sources.search_roots(data_dir):
        for folder in (root / name, root):
            if (folder / "train").is_dir() and (folder / "test").is_dir():
                canonical = spec.classes if isinstance(spec.classes, list) else None
                names = sources.class_names(folder / "train", canonical)
                expected = len(spec.classes) if canonical else spec.classes
                wrong = len(names) != expected or (canonical and not sources.same_names(names, canonical))
                if wrong and folder == root and not data_dir:
                    continue  # class folders of something else
                if len(names) != expected:
                    raise DataError(f"{folder / 'train'} has {len(names)} class folders, {name} has {expected} classes.")
                kinds = {p.suffix.lower() for p in (folder / "train" / names[0]).iterdir()} & sources.IMAGE_SUFFIXES
                parts = {s: sources.read_class_folders(folder / s, names, spec.channels, spec.size, progress)
                         for s in ("train", "test")}
                copy = "JPEG copy" if kinds & {".jpg", ".jpeg"} else "image files"
                return parts, f"{copy}, class folders", names
        if name == "fashion_mnist":
            for folder in (root / "fashion-mnist", root / "FashionMNIST" / "raw", root / "fashion_mnist", root):
                try:
                    parts = {s: sources.read_idx_folder(folder, s == "train") for s in ("train", "test")}
                    return {s: (im[:, None], y) for s, (im, y) in parts.items()}, "idx files", None
                except FileNotFoundError:
                    continue
        try:
            parts = {s: sources.read_torchvision(name, root, s == "train", False) for s in ("train", "test")}
            return parts, "torchvision", None
        except (RuntimeError, FileNotFoundError):
            looked.append(str(root))
    if not download:
        raise DataError(f"{name} was not found in: {', '.join(looked)}. Pass data_dir, set DERKIT_DATA, or allow the "
                        f"download (download=True). A folder {name}/train/<class>/*.jpg|png with test/ beside it works too.")
    root = Path(data_dir).expanduser() if data_dir else sources.home() / "data"
    print(f"downloading {name} into {root} (once)")
    try:
        parts = {s: sources.read_torchvision(name, root, s == "train", True) for s in ("train", "test")}
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} could not be downloaded ({error}). Looked in: {', '.join(looked)}. Without a network, "
                        f"put class folders {name}/train/<class>/*.jpg|png and {name}/test/ there.") from error
    return parts, "torchvision, downloaded", None


def _imagefolder(path: str, image_size: int | None, progress) -> tuple[dict, str, list[str]]:
    root = Path(path).expanduser()
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise DataError(f"imagefolder: {root / split} does not exist; expected {root}/train/<class>/ and "
                            f"{root}/test/<class>/.")
    names = sources.class_names(root / "train")
    parts = {s: sources.read_class_folders(root / s, names, None, image_size or 32, progress) for s in ("train", "test")}
    return parts, f"image folder, resized to {image_size or 32}", names


def _pick(labels: np.ndarray, n: int, rng: np.random.Generator, what: str) -> np.ndarray:
    """n indices, spread evenly over the classes, in random order."""
    if n > len(labels):
        raise DataError(f"{what} = {n} is larger than the {len(labels)} images that there are.")
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)  # position of each image inside its class
    for c in np.unique(labels):
        mine = order[labels[order] == c]
        rank[mine] = np.arange(len(mine))
    return order[np.argsort(rank[order], kind="stable")][:n]


def _mix(images: np.ndarray, labels: np.ndarray) -> sources.Arrays:
    """Images that come sorted by class (class folders) in a fixed mixed order, so that the first n hold all classes."""
    if (np.diff(labels) < 0).any():
        return images, labels
    order = _pick(labels, len(labels), np.random.default_rng(0), "")
    return images[order], labels[order]


def load_dataset(name: str = "fashion_mini", data_dir: str | os.PathLike | None = None, device: str | torch.device = "cpu",
                 *, download: bool = True, train_size: int = 0, valid_size: int = 1000, split_seed: int = 0,
                 image_size: int | None = None, progress=lambda it, **kw: it) -> Dataset:
    """Load a data set onto ``device`` as uint8.

    name: 'fashion_mini' (bundled), 'fashion_mnist', 'cifar10', 'cifar100', 'svhn', or 'imagefolder:<path>'.
    data_dir: where to look (and download to). Without it: $DERKIT_DATA, then the usual places, then a download.
        Class folders ``<data_dir>/<name>/train/<class>/*.jpg|png`` (and test/) are read as well as torchvision's formats.
    train_size: class-balanced subset of the training set (0: all). valid_size: images held out of the training set
        with ``split_seed`` (the bundled set has a fixed validation split). Test is for reporting only.
    image_size: for imagefolder, the square size that images are resized to (default 32).
    Raises DerkitError / DataError: unknown name, missing folder, unreadable image, sizes larger than the data.
    """
    spec = None
    if name.startswith("imagefolder:"):
        parts, source, names = _imagefolder(name.partition(":")[2], image_size, progress)
    elif name in SPECS:
        spec = SPECS[name]
        if image_size not in (None, 0, spec.size):
            raise DerkitError(f"image_size is for 'imagefolder:<path>'; {name} has {spec.size}x{spec.size} images.")
        if data_dir and not Path(data_dir).expanduser().is_dir():
            raise DataError(f"data_dir {data_dir} does not exist. To download {name} into it, create it first.")
        if name == "fashion_mini":
            (parts, source), names = _mini(), None
        else:
            parts, source, names = _full(name, data_dir, download, image_size, progress)
    else:
        raise unknown("dataset", name, [*SPECS, "imagefolder:<path>"])

    rng = np.random.default_rng(split_seed)
    parts = {split: _mix(*arrays) for split, arrays in parts.items()}
    images, labels = parts["train"]
    if "valid" in parts:
        valid_images, valid_labels = parts["valid"]
        keep = np.arange(len(labels))
    else:
        if valid_size < 0:
            raise DataError(f"valid_size must be positive, found {valid_size}.")
        held = _pick(labels, valid_size, rng, "valid_size")
        valid_images, valid_labels = images[held], labels[held]
        keep = np.setdiff1d(np.arange(len(labels)), held)
        if not len(keep):
            raise DataError(f"valid_size = {valid_size} leaves no training images of the {len(labels)} that there are.")
    if train_size:
        if train_size < 0:
            raise DataError(f"train_size must be positive (or 0 for all), found {train_size}.")
        keep = keep[_pick(labels[keep], train_size, rng, "train_size")]
    images, labels = images[keep], labels[keep]

    classes = names or (spec.classes if spec and isinstance(spec.classes, list) else None)
    classes = classes or [str(c) for c in range(int(labels.max()) + 1)]
    arrays = [images, labels, valid_images, valid_labels, *parts["test"]]
    digest = hashlib.sha256()
    for array, high in zip(arrays, [None, len(classes)] * 3, strict=True):
        if high and len(array) and not (array.min() >= 0 and array.max() < high):
            raise DataError(f"labels of {name} must lie in [0, {high}), found [{array.min()}, {array.max()}].")
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    tensors = [torch.from_numpy(np.array(a)).to(device) for a in arrays]
    channels = tensors[0].shape[1]
    return Dataset(name if spec else "imagefolder", list(classes), source, Split(*tensors[:2]), Split(*tensors[2:4]),
                   Split(*tensors[4:]), spec.mean if spec else (0.5,) * channels, spec.std if spec else (0.25,) * channels,
                   digest.hexdigest())
