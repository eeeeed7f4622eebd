"""Data sets that live on the device as uint8; batches come out as floats in [0, 1].

No code of a data file runs: torchvision opens CIFAR's pickles only after their checksums."""

import hashlib
import os
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from derkit.util import DerkitError, cached, home, progress, unknown

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, C, H, W) uint8, labels (N,)
AUGMENTATIONS = ("none", "flip", "crop", "crop_flip", "crop_reflect_flip")
USUAL = ("data", "~/data", "~/datasets", "~/.cache/torch/datasets", "/usr/share/datasets")
MINI_SHA256 = "47f2788161edf95f3db46a623d91180e37eaaa47ef01ee779730aed11eefa351"
MINI_SIZE = {"train": 4000, "valid": 1000, "test": 1000}
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NUMBERS = [str(number) for number in range(100)]
Spec = namedtuple("Spec", "channels size classes mean std", defaults=((0.5,) * 3, (0.25,) * 3))
SPECS: dict[str, Spec] = {  # mean and std: the usual published ones of the training set
    "fashion_mini": Spec(1, 28, FASHION, (0.2860,), (0.3530,)),
    "fashion_mnist": Spec(1, 28, FASHION, (0.2860,), (0.3530,)),
    "cifar10": Spec(3, 32, CIFAR10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": Spec(3, 32, NUMBERS, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Spec(3, 32, NUMBERS[:10], (0.5,) * 3, (0.5,) * 3),
}


@dataclass(frozen=True)
class Split:
    """images (N, C, H, W) uint8 and labels (N,) int64, both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self, start: int = 0, stop: int | None = None, dtype=torch.float32) -> Tensor:
        """Images [start:stop] as floats in [0, 1]."""
        return to_float(self.images[start:stop], dtype)

    def take(self, index: Tensor | slice) -> Self:
        """The split restricted to an index tensor or slice."""
        return Split(self.images[index], self.labels[index])

    def batches(self, batch_size: int, generator: torch.Generator | None = None,
                augment: str = "none", dtype=torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (x, y); shuffled and augmented with a generator on the split's device."""
        order = torch.arange(len(self), device=self.images.device)
        if generator is not None:
            order = torch.randperm(len(self), generator=generator, device=order.device)
        for i in range(0, len(self), batch_size):
            part = self.take(order[i : i + batch_size])
            if generator is not None:
                part = Split(augment_batch(part.images, augment, generator), part.labels)
            yield part.floats(dtype=dtype), part.labels


@dataclass(frozen=True)
class Dataset:
    """A data set of three splits; ``source``: which copy was read, ``sha256``: of its images."""

    name: str
    classes: list[str]
    source: str
    train: Split
    valid: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    channels = property(lambda self: self.train.images.shape[1])
    size = property(lambda self: self.train.images.shape[2])

    def describe(self) -> str:
        """One line: name, source, split sizes, image shape."""
        sizes = f"{len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test"
        shape = f"{self.channels}x{self.size}x{self.size}"
        return f"{self.name} ({self.source}): {sizes}, {len(self.classes)} classes, {shape}"


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> floats in [0, 1]."""
    return images.to(dtype).div_(255)


def augment_batch(images: Tensor, kind: str, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random crop after padding, and flip, for each image (torchvision: one for the batch)."""
    if kind not in AUGMENTATIONS:
        raise unknown("augment", kind, AUGMENTATIONS)
    (b, _, h, w), device = images.shape, images.device
    if "crop" in kind:
        mode = "reflect" if "reflect" in kind else "constant"
        padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode).to(images.dtype)
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (B, C, 2 pad + 1, 2 pad + 1, H, W)
        dy, dx = torch.randint(0, 2 * pad + 1, (2, b), generator=generator, device=device)
        images = windows[torch.arange(b, device=device), :, dy, dx]
    if "flip" in kind:
        flip = torch.rand((b, 1, 1, 1), generator=generator, device=device) < 0.5
        images = torch.where(flip, images.flip(-1), images)
    return images


def _class_names(folder: Path, known: list[str]) -> tuple[list[str], bool]:
    """Class folders, and whether they have the known names in any spelling (then in that order)."""
    found = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    if not found:
        raise DerkitError(f"{folder} has no class folders; expected {folder}/<class>/*.jpg|png.")
    slugs, wanted = (["".join(filter(str.isalnum, n.lower())) for n in k] for k in (found, known))
    same = sorted(slugs) == sorted(wanted)
    return [found[slugs.index(slug)] for slug in wanted] if same else found, same


def _read_folder(folder: Path, spec: Spec) -> Arrays:
    """folder/<class>/*, decoded once: the cache is keyed by the files' names, sizes and times."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # slow to import
    try:
        found = make_dataset(folder, {c: i for i, c in enumerate(spec.classes)}, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DerkitError(f"{folder} needs <class>/*.jpg|png: {error}.") from error
    files, labels = zip(*sorted(found, key=lambda pair: pair[1]), strict=True)
    key = [(Path(f).parts[-2:], os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]

    def decode(file: str) -> np.ndarray:
        try:
            with Image.open(file) as image:
                image = image.convert("L" if spec.channels == 1 else "RGB")
                image = ImageOps.fit(image, (spec.size, spec.size), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            text = f"cannot read image {file}: {error}. Delete or replace it."
            raise DerkitError(text) from error
        return np.atleast_3d(image).transpose(2, 0, 1)

    def read() -> Tensor:
        bar = progress(files, f"reading {folder.parent.name}/{folder.name}")
        return torch.from_numpy(np.stack([decode(file) for file in bar]))

    return cached("folders", (spec.channels, spec.size, key), read)[0].numpy(), labels


def _torchvision(name: str, root: Path, split: str, download: bool) -> Arrays:
    from torchvision import datasets  # as above
    if name == "svhn":
        data = datasets.SVHN(root, split=split, download=download)
        return data.data, data.labels
    kind = datasets.FashionMNIST if name == "fashion_mnist" else getattr(datasets, name.upper())
    data = kind(root, train=split == "train", download=download)
    images = np.asarray(data.data).reshape(*data.data.shape[:3], -1)  # (N, H, W, C)
    return images.transpose(0, 3, 1, 2), data.targets


def _named(name: str, data_dir: str | os.PathLike | None, download: bool) -> tuple:
    """(splits, source, spec) of a named set from the first place that has it, in any format."""
    spec, problem = SPECS[name], "was not found in"
    roots = [data_dir] if data_dir else [os.environ.get("DERKIT_DATA"), home() / "data", *USUAL]
    roots = [Path(root).expanduser() for root in roots if root]
    for root in roots:
        for folder in (root / name, root):
            if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
                continue
            names, known = _class_names(folder / "train", spec.classes)
            if folder == root and not data_dir and not known:
                continue  # class folders of something else
            if len(names) != len(spec.classes):
                found = f"{len(names)} classes, {name} has {len(spec.classes)}."
                raise DerkitError(f"{folder}: {found}")
            spec = spec._replace(classes=names)
            copy = "JPEG copy" if any(folder.glob("train/*/*.[jJ][pP]*")) else "image files"
            parts = {split: _read_folder(folder / split, spec) for split in ("train", "test")}
            return parts, f"{copy}, class folders", spec
        try:
            parts = {split: _torchvision(name, root, split, False) for split in ("train", "test")}
            return parts, "torchvision", spec
        except OSError:
            continue  # a place that cannot be looked into
        except Exception as error:  # torchvision has many kinds
            if "not found" not in str(error):
                raise DerkitError(f"{name} in {root} cannot be read: {error}.") from error
    if download:
        root = roots[0] if data_dir else home() / "data"
        print(f"downloading {name} into {root} (once)")
        try:
            parts = {split: _torchvision(name, root, split, True) for split in ("train", "test")}
            return parts, "torchvision, downloaded", spec
        except Exception as error:  # no network, no scipy for svhn, ...
            problem = f"could not be downloaded ({error}). Looked in"
    raise DerkitError(f"{name} {problem}: {', '.join(map(str, roots))}. Pass data_dir, "
                    "set DERKIT_DATA or allow the download (download=True). Class folders "
                    f"{name}/train/<class>/*.jpg|png with test/ beside train/ work too.")


def _pick(labels: np.ndarray, n: int, most: int, rng: np.random.Generator, what: str) -> np.ndarray:
    """n indices, spread evenly over the classes, in random order."""
    if not 0 <= n <= most:
        raise DerkitError(f"{what} must lie in [0, {most}] for {len(labels)} images, found {n}.")
    order = rng.permutation(len(labels))
    rank = pd.Series(order).groupby(labels[order]).cumcount()  # position inside its class
    return order[rank.to_numpy().argsort(kind="stable")][:n]


def load_dataset(name: str = "fashion_mini", data_dir: str | os.PathLike | None = None,
                 device: str | torch.device = "cpu", *, download: bool = True, train_size: int = 0,
                 valid_size: int = 1000, split_seed: int = 0,
                 image_size: int | None = None) -> Dataset:
    """Load a data set onto ``device`` as uint8.

    name: 'fashion_mini' (bundled), 'fashion_mnist', 'cifar10', 'cifar100', 'svhn' or
        'imagefolder:<path>', whose images become squares of image_size (default 32).
    data_dir: where to look for class folders ``<name>/train/<class>/*.jpg|png`` (test/ beside) or
        torchvision's files, and to download to. Without it: $DERKIT_DATA, then the usual places.
    train_size: class-balanced subset (0: all). valid_size: images held out of the training set
        with ``split_seed`` (the bundled set has its own). Test is for reporting only.
    Raises DerkitError: unknown name, missing folder, unreadable image, wrong sizes."""
    spec, source = SPECS.get(name), "bundled"
    if spec and image_size not in (None, 0, spec.size):
        raise DerkitError(f"image_size is for 'imagefolder:<path>'; {name} has size {spec.size}.")
    if spec and data_dir and not Path(data_dir).expanduser().is_dir():
        raise DerkitError(f"data_dir {data_dir} does not exist. To download into it, create it.")
    if name == "fashion_mini":
        raw = (Path(__file__).parent / "assets" / "fashion_mini.npz").read_bytes()
        if hashlib.sha256(raw).hexdigest() != MINI_SHA256:
            raise DerkitError("the bundled fashion_mini.npz is not the recorded: reinstall derkit.")
        with np.load(BytesIO(raw), allow_pickle=False) as z:
            parts = {s: (z[f"{s}_images"][:, None], z[f"{s}_labels"]) for s in MINI_SIZE}
    elif spec:
        parts, source, spec = _named(name, data_dir, download)
    elif name.startswith("imagefolder:"):
        root = Path(name.partition(":")[2]).expanduser()
        spec = Spec(3, image_size or 32, _class_names(root / "train", [])[0])
        parts = {split: _read_folder(root / split, spec) for split in ("train", "test")}
        name, source = f"imagefolder-{root.resolve().name}", f"image folder, resized to {spec.size}"
    else:
        raise unknown("dataset", name, [*SPECS, "imagefolder:<path>"])
    for split, (images, labels) in parts.items():
        n, labels = len(spec.classes), np.asarray(labels, np.int64)
        if len(labels) != len(images) or not np.isin(labels, range(n)).all():
            found = f"{len(labels)} of the classes {np.unique(labels)}"
            raise DerkitError(f"{name} needs {len(images)} labels in [0, {n}), found {found}.")
        if (np.diff(labels) >= 0).all():  # by class: mixed, so that the first n hold all classes
            order = _pick(labels, len(labels), len(labels), np.random.default_rng(0), "size")
            images, labels = images[order], labels[order]
        parts[split] = np.ascontiguousarray(images), labels
    images, labels = parts["train"]
    rng, keep = np.random.default_rng(split_seed), np.arange(len(labels))
    if "valid" not in parts:
        held = _pick(labels, valid_size, len(labels) - 1, rng, "valid_size")
        parts["valid"], keep = (images[held], labels[held]), np.setdiff1d(keep, held)
    if train_size:
        keep = keep[_pick(labels[keep], train_size, len(keep), rng, "train_size")]
    parts["train"] = images[keep], labels[keep]
    arrays = [array for split in MINI_SIZE for array in parts[split]]
    sha256 = hashlib.sha256(b"".join(arrays)).hexdigest()
    tensors = [torch.from_numpy(array.copy()).to(device) for array in arrays]
    splits = [Split(*tensors[i : i + 2]) for i in (0, 2, 4)]
    return Dataset(name, list(spec.classes), source, *splits, spec.mean, spec.std, sha256)
