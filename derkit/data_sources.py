"""Where images come from: the bundled file, torchvision's formats, class folders. All return uint8 numpy arrays.

Nothing here executes code from a data file: images are decoded by Pillow, archives by numpy without pickle.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from derkit.errors import DataError

Arrays = tuple[np.ndarray, np.ndarray]  # images (N, C, H, W) or (N, H, W) uint8, labels (N,) int64
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}


def home() -> Path:
    """The folder for runs and caches: $DERKIT_HOME, else ~/.cache/derkit."""
    return Path(os.environ.get("DERKIT_HOME") or Path.home() / ".cache" / "derkit").expanduser()


def search_roots(data_dir: str | os.PathLike | None) -> list[Path]:
    """Folders that may hold data sets, in order. An explicit data_dir is the only place looked at."""
    if data_dir:
        return [Path(data_dir).expanduser()]
    env = os.environ.get("DERKIT_DATA")
    roots = [Path(env).expanduser()] if env else []
    roots += [home() / "data", Path("data"), Path.home() / "data", Path.home() / "datasets",
              Path.home() / ".cache" / "torch" / "datasets", Path("/usr/share/datasets")]
    return roots


# --------------------------------------------------------------------------------------------------- idx (MNIST)
def read_idx(path: Path) -> np.ndarray:
    """One idx file of bytes (gzipped or not) as an array."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            raw = f.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or not a gzip file: {error}.") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{path} is not an idx file of bytes.")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).astype(int)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if body.size != shape.prod():
        raise DataError(f"{path} is truncated: {body.size} bytes for shape {tuple(shape)}.")
    return body.reshape(shape)


def read_idx_folder(folder: Path, train: bool) -> Arrays:
    """(images (N, 28, 28), labels (N,)) from the four MNIST-style files; raises FileNotFoundError without them."""
    stem = "train" if train else "t10k"

    def find(kind: str) -> Path:
        for name in (f"{stem}-{kind}-ubyte.gz", f"{stem}-{kind}-ubyte"):
            if (folder / name).is_file():
                return folder / name
        raise FileNotFoundError(folder / f"{stem}-{kind}-ubyte.gz")

    images, labels = read_idx(find("images-idx3")), read_idx(find("labels-idx1")).astype(np.int64)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images and {len(labels)} labels for {stem}.")
    return images, labels


# ------------------------------------------------------------------------------------------------- class folders
def class_names(folder: Path, canonical: list[str] | None = None) -> list[str]:
    """Class folders in label order: the canonical order where the names match it, else sorted."""
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder} has no class folders; expected <class>/*.jpg|png inside it.")
    if canonical and same_names(found, canonical):
        by_slug = {_slug(f): f for f in found}
        return [by_slug[_slug(c)] for c in canonical]
    return found


def same_names(found: list[str], canonical: list[str]) -> bool:
    """Are these the same class names, in any order and spelling of case, blanks and signs?"""
    return sorted(map(_slug, found)) == sorted(map(_slug, canonical))


def _slug(name: str) -> str:
    return "".join(ch for ch in name.lower() if ch.isalnum())


def list_images(folder: Path, classes: list[str]) -> tuple[list[Path], np.ndarray]:
    """All image files under folder/<class>/, sorted, with labels. Raises DataError for a class without images."""
    files, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise DataError(f"class folder {folder / name} is missing.")
        here = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not here:
            raise DataError(f"class folder {folder / name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        files += here
        labels += [label] * len(here)
    return files, np.array(labels, dtype=np.int64)


def read_image(path: Path, channels: int | None, size: int | None) -> np.ndarray:
    """One image as (C, H, W) uint8; resized so that the short side is ``size`` and cropped to a square if asked."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("L" if channels == 1 else "RGB")
            if size and image.size != (size, size):
                w, h = image.size
                side = min(w, h)
                box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
                image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
            array = np.asarray(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {error}. Delete or replace the file.") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def read_class_folders(folder: Path, classes: list[str], channels: int | None, size: int | None,
                       progress=lambda it, **kw: it) -> Arrays:
    """Decode folder/<class>/* once and keep the bytes in the cache (keyed by names, sizes and times)."""
    files, labels = list_images(folder, classes)
    key = hashlib.sha256(repr((channels, size)).encode())
    for f in files:
        stat = f.stat()
        key.update(f"{f.parent.name}/{f.name}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    cache = home() / "cache" / f"folders-{key.hexdigest()[:16]}.npy"
    if cache.is_file():
        with suppress(OSError, ValueError, EOFError):  # a broken cache is read anew
            return np.load(cache, allow_pickle=False), labels
    first = read_image(files[0], channels, size)
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    for i, f in enumerate(progress(files, desc=f"reading {folder.parent.name}/{folder.name}")):
        image = read_image(f, channels, size)
        if image.shape != first.shape:
            raise DataError(f"{f} has shape {image.shape}, {files[0]} has {first.shape}; give image_size to resize.")
        images[i] = image
    save_array(cache, images)
    return images, labels


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file atomically; a cache that cannot be written is only skipped."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            np.save(f, array, allow_pickle=False)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- torchvision
def read_torchvision(name: str, root: Path, train: bool, download: bool) -> Arrays:
    """A torchvision data set as arrays. Raises RuntimeError when it is not under root and download is False."""
    from torchvision import datasets

    if name == "svhn":
        data = datasets.SVHN(root, split="train" if train else "test", download=download)
        return np.asarray(data.data, np.uint8), np.asarray(data.labels, np.int64)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion_mnist": datasets.FashionMNIST}[name]
    try:
        data = kind(root, train=train, download=download)
    except pickle.UnpicklingError as error:  # what torchvision once kept in processed/, with something else in it
        raise DataError(f"{name} under {root} holds a file that is no data: not loaded. Delete {root}/*/processed.") from error
    images = data.data.numpy() if name == "fashion_mnist" else np.asarray(data.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images, dtype=np.uint8), np.asarray(data.targets, dtype=np.int64)
