"""Data: the bundled set, batches, augmentation, class folders, torchvision, splits, errors."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from derkit import data as room
from derkit.data import CIFAR10, FASHION, augment_batch, load_dataset
from derkit.records import records_folder
from derkit.util import DerkitError

SMALL = dict(download=False, valid_size=10)
IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def write_folders(root, names, per_class=(3, 2), size=(32, 32), suffix="png"):
    """Class folders; images of class c are grey, 10 + 20 c, but for one pixel (no two alike)."""
    for split, n in zip(("train", "test"), per_class, strict=True):
        for c, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.new("RGB", size, (10 + 20 * c,) * 3)
                image.putpixel((0, 0), (i, 0, 0))
                image.save(root / split / name / f"{i:04d}.{suffix}")
    return root


def write_fashion(root, n=40, classes=10):
    """A small Fashion-MNIST as torchvision keeps it; every pixel of image i is i, its label i
    modulo classes."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for stem in IDX:
        count = np.arange(n if stem.startswith("train") else 10, dtype=np.uint8)
        array = count % classes if "labels" in stem else np.tile(count, (28, 28, 1)).T
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"{stem}-ubyte").write_bytes(head + array.tobytes())


def test_bundled_set(mini):
    for split, n in ((mini.train, 4000), (mini.valid, 1000), (mini.test, 1000)):
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.shape == (n, 1, 28, 28)
        assert split.labels.bincount().tolist() == [n / 10] * 10
    whole = torch.cat([s.images for s in (mini.train, mini.valid, mini.test)])
    assert len({image.numpy().tobytes() for image in whole}) == len(whole)  # disjoint splits
    assert mini.classes == FASHION
    assert mini.describe().endswith("4000 train, 1000 valid, 1000 test, 10 classes, 1x28x28")


@pytest.mark.parametrize("run", ["co_fashion_mini/fgsm-s0", "ro_fashion_mini/pgd-s0"])
def test_committed_records_are_of_this_data(run):
    """The sha256 in a record comes out of its train_size and valid_size."""
    record = json.loads((records_folder() / run / "config.json").read_text())
    sizes = {name: record["train"][name] for name in ("train_size", "valid_size")}
    assert load_dataset(**sizes).sha256 == record["data_sha256"]


def test_subsets_are_balanced_seeded_and_prefixed(mini):
    small, other = load_dataset(train_size=100), load_dataset(train_size=103, split_seed=1)
    assert small.train.labels.bincount().tolist() == [10] * 10
    assert small.train.labels[:50].bincount().tolist() == [5] * 10  # every prefix is balanced
    assert other.train.labels.bincount().max() == 11
    assert small.sha256 == load_dataset(train_size=100).sha256
    assert torch.equal(small.valid.images, mini.valid.images)
    assert len({small.sha256, mini.sha256, other.sha256}) == 3


def test_batches_are_floats_in_0_1(mini):
    part = mini.test.take(slice(25))
    batches = list(part.batches(10, augment="crop_flip"))  # no generator: as they are, in order
    assert [len(x) for x, _ in batches] == [10, 10, 5]
    assert torch.equal(torch.cat([x for x, _ in batches]), part.images.float() / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), part.labels)
    assert torch.equal(part.floats(dtype=torch.float64) * 255, part.images.double())
    assert list(part.take(slice(0)).batches(10)) == []


def test_shuffled_batches(mini, seeded):
    """Every image once, with its own label; the same generator gives the same batches."""
    part = mini.test.take(slice(100))

    def epoch(seed, augment="none"):
        pairs = part.batches(30, seeded(seed), augment)
        return [torch.cat(tensors) for tensors in zip(*pairs, strict=True)]

    (x, y), floats = epoch(0), part.floats()
    order = [int((floats == image).flatten(1).all(1).nonzero()) for image in x]
    assert sorted(order) == list(range(100)) != order and torch.equal(part.labels[order], y)
    assert torch.equal(epoch(1, "crop_flip")[0], epoch(1, "crop_flip")[0])
    assert not torch.equal(epoch(1)[0], epoch(2)[0])


def copies(image, kind, pad=4):
    """Brute force: the bytes of every image that ``kind`` may make of this one."""
    height, width = image.shape[1:]
    sides, mode = ((0, 0), (pad, pad), (pad, pad)), "reflect" if "reflect" in kind else "constant"
    padded = np.pad(image, sides, mode=mode)
    shifts = range(2 * pad + 1) if "crop" in kind else [pad]
    cuts = [padded[:, dy : dy + height, dx : dx + width] for dy in shifts for dx in shifts]
    flipped = [cut[..., ::-1] for cut in cuts] if "flip" in kind else []
    return {cut.tobytes() for cut in cuts + flipped}


@pytest.mark.parametrize("kind, ways", [("none", 1), ("flip", 2), ("crop", 81),
                                        ("crop_flip", 162), ("crop_reflect_flip", 162)])
def test_augmented_images_are_true_copies(kind, ways, seeded):
    """Every image is a shifted, flipped copy of its own source, and all ways occur."""
    sources = np.random.default_rng(0).integers(1, 256, (2, 3, 7, 10), dtype=np.uint8)
    images = torch.from_numpy(sources).repeat(1000, 1, 1, 1)
    result = augment_batch(images, kind, seeded()).numpy()
    assert np.array_equal(images[:2], sources) and result.dtype == np.uint8
    for i in range(2):
        assert {image.tobytes() for image in result[i::2]} == copies(sources[i], kind)
        assert len(copies(sources[i], kind)) == ways
    with pytest.raises(DerkitError, match="Did you mean 'crop_flip'"):
        augment_batch(images, "cropflip", seeded())


@pytest.mark.parametrize("suffix, source", [("png", "image files"), ("jpg", "JPEG copy")])
@pytest.mark.parametrize("place", ["data_dir/cifar10", "data_dir", "DERKIT_DATA"])
def test_class_folder_copy(tmp_path, monkeypatch, suffix, source, place):
    root = tmp_path / "cifar10" if place == "data_dir/cifar10" else tmp_path
    write_folders(root, CIFAR10, (4, 4), suffix=suffix)
    monkeypatch.setenv("DERKIT_DATA", str(tmp_path))
    data_dir = None if place == "DERKIT_DATA" else tmp_path
    data = load_dataset("cifar10", data_dir, **SMALL)
    assert data.classes == CIFAR10 and source in data.source and len(data.train) == 30
    for split in (data.train, data.valid, data.test):  # the pixels belong to the labels
        assert torch.equal(split.images[:, 0, 16, 16].long(), 10 + 20 * split.labels)
    assert data.valid.labels.bincount().tolist() == [1] * 10
    assert data.test.labels[:10].unique().numel() == 10  # not the first class only
    assert data.sha256 == load_dataset("cifar10", data_dir, **SMALL).sha256


def test_canonical_label_order(tmp_path):
    """Folders named like the published classes, in any spelling, get the published labels."""
    folders = [name.title().replace(" ", "_") for name in FASHION]
    write_folders(tmp_path / "fashion_mnist", folders, size=(28, 28))
    data = load_dataset("fashion_mnist", tmp_path, **SMALL)
    assert data.classes == folders and data.channels == 1
    assert torch.equal(data.test.images[:, 0, 14, 14].long(), 10 + 20 * data.test.labels)


def test_other_class_folders_are_not_taken_for_the_data_set(tmp_path, monkeypatch):
    """A folder that holds ten classes of something else is passed over, except as data_dir."""
    write_folders(tmp_path, [f"k{i}" for i in range(10)])
    write_fashion(tmp_path)
    monkeypatch.setenv("DERKIT_DATA", str(tmp_path))
    assert load_dataset("fashion_mnist", **SMALL).source == "torchvision"
    assert "image files" in load_dataset("fashion_mnist", tmp_path, **SMALL).source


def test_imagefolder_resizes_the_centre_square(tmp_path):
    """A palette or grey image that is not square: its short side becomes image_size."""
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        for mode in ("RGB", "P", "L"):
            pixels = np.zeros((20, 60), np.uint8)
            pixels[:, 17:43] = 100 + 50 * folder.endswith("b")
            Image.fromarray(pixels).convert(mode).save(tmp_path / folder / f"{mode}.png")
    data = load_dataset(f"imagefolder:{tmp_path}", valid_size=2, image_size=10)
    assert (data.name, data.classes) == (f"imagefolder-{tmp_path.name}", ["a", "b"])
    assert (data.channels, data.size) == (3, 10)
    assert torch.equal(data.test.images.amin((1, 2, 3)).long(), 100 + 50 * data.test.labels)
    assert load_dataset(f"imagefolder:{tmp_path}", valid_size=2).size == 32


def test_cache(tmp_path, monkeypatch, home):
    """Decoded once; again where the cache is broken or not writable, or an image has changed."""
    write_folders(tmp_path / "set", CIFAR10)

    def load():
        return load_dataset("cifar10", tmp_path / "set", **SMALL).sha256

    first = load()
    with monkeypatch.context() as patch:
        patch.setattr(room.Image, "open", lambda path: pytest.fail("decoded again"))
        assert load() == first
    caches = list((home / "cache").iterdir())
    assert len(caches) == 2
    for file in caches:
        file.write_bytes(file.read_bytes()[:-100])
    assert load() == first
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "set" / "test" / "cat" / "0001.png")
    assert (second := load()) != first
    (home / "cache").rename(home / "gone")
    (home / "cache").write_text("a file, not a folder")
    assert load() == second


def test_splits(tmp_path):
    """Splits are seeded and disjoint, and train_size leaves the validation images alone."""
    write_fashion(tmp_path)
    data, part, other = (load_dataset("fashion_mnist", tmp_path, **SMALL, **options)
                         for options in ({}, dict(train_size=20), dict(split_seed=1)))
    assert data.source == "torchvision" and data.classes == FASHION
    train, valid = (s.images[:, 0, 5, 5].tolist() for s in (data.train, data.valid))
    assert sorted(train + valid) == list(range(40)) and len(valid) == 10
    assert [i % 10 for i in train] == data.train.labels.tolist()
    assert torch.equal(data.valid.images, part.valid.images) and len(part.train) == 20
    assert set(part.train.images[:, 0, 0, 0].tolist()) <= set(train)
    assert not torch.equal(data.valid.images, other.valid.images)


@pytest.mark.parametrize("stem", IDX[:2])
def test_broken_files_of_torchvision(tmp_path, stem):
    write_fashion(tmp_path)
    path = next(tmp_path.rglob(f"{stem}*"))
    raw = path.read_bytes()
    for broken in (raw[:2], raw[:6], raw[:12], raw[:-1], b"<html>not found</html>"):
        path.write_bytes(broken)
        for download in (False, True):
            with pytest.raises(DerkitError, match=f"fashion_mnist in {tmp_path} cannot be read"):
                load_dataset("fashion_mnist", tmp_path, download=download, valid_size=10)
    write_fashion(tmp_path, classes=13)
    with pytest.raises(DerkitError, match=r"40 labels in \[0, 10\), found 40 .* 11 12"):
        load_dataset("fashion_mnist", tmp_path, **SMALL)


@pytest.mark.parametrize("name, kind, shape, pixel", [
    ("cifar10", "CIFAR10", (20, 32, 32, 3), (1, 2, 0)),
    ("svhn", "SVHN", (20, 3, 32, 32), (0, 1, 2)),
    ("fashion_mnist", "FashionMNIST", (20, 28, 28), (1, 2))])
def test_torchvision_formats(tmp_path, monkeypatch, name, kind, shape, pixel):
    """(N, H, W, C) and (N, H, W) become (N, C, H, W); SVHN's images are so already."""
    class Fake:
        def __init__(self, root, download, train=True, split="train"):
            self.targets = self.labels = torch.arange(20) % 10
            self.data = torch.zeros(shape, dtype=torch.uint8)
            self.data[:, *pixel] = self.labels.byte()

    monkeypatch.setattr(f"torchvision.datasets.{kind}", Fake)
    data = load_dataset(name, tmp_path, **SMALL)
    assert data.source == "torchvision" and data.train.images.is_contiguous()
    assert data.train.images.shape == (10, data.channels, data.size, data.size)
    assert torch.equal(data.train.images[:, 0, 1, 2].long(), data.train.labels)


def test_unknown_dataset():
    for name, near in (("CIFAR-10", "cifar10"), ("imagefolder", "imagefolder:<path>")):
        with pytest.raises(DerkitError, match=f"Did you mean '{near}'"):
            load_dataset(name)


def test_not_found_and_not_downloaded(tmp_path, monkeypatch):
    """The places, the ways out; never a download into a misspelt folder."""
    with pytest.raises(DerkitError, match="not found in: .*DERKIT_DATA.*train/<class>"):
        load_dataset("cifar10", tmp_path, **SMALL)

    def unreachable(*args):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(room, "_torchvision", unreachable)
    with pytest.raises(DerkitError, match="could not be downloaded .Network is unreachable"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(DerkitError, match="nowhere does not exist"):
        load_dataset("cifar10", tmp_path / "nowhere")


def test_bad_folders_are_named(tmp_path):
    """No class folders, a class without images, too few classes."""
    with pytest.raises(DerkitError, match="train has no class folders"):
        load_dataset(f"imagefolder:{tmp_path}")
    write_folders(tmp_path / "cifar10", CIFAR10)
    with pytest.raises(DerkitError, match="10 classes, cifar100 has 100"):
        load_dataset("cifar100", tmp_path / "cifar10")
    (tmp_path / "cifar10" / "test" / "dog").rename(tmp_path / "cifar10" / "test" / "wolf")
    with pytest.raises(DerkitError, match="cifar10/test needs .*dog.*png"):
        load_dataset("cifar10", tmp_path, **SMALL)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_image(tmp_path, suffix):
    """Named in the error, whichever image it is."""
    path = write_folders(tmp_path, CIFAR10, suffix=suffix) / "train" / "frog" / f"0002.{suffix}"
    raw = path.read_bytes()
    for keep in (0, 20, len(raw) // 2):
        path.write_bytes(raw[:keep])
        with pytest.raises(DerkitError, match=rf"cannot read .*frog/0002.{suffix}.*Delete or"):
            load_dataset("cifar10", tmp_path, **SMALL)


def test_bad_sizes_and_a_corrupt_file(tmp_path, monkeypatch):
    write_fashion(tmp_path)
    for name, size in (("valid_size", 41), ("valid_size", 40), ("valid_size", -5),
                       ("train_size", 31), ("train_size", -1)):
        with pytest.raises(DerkitError, match=rf"{name} must lie in .* found {size}"):
            load_dataset("fashion_mnist", tmp_path, **(SMALL | {name: size}))
    with pytest.raises(DerkitError, match="image_size is for 'imagefolder"):
        load_dataset("fashion_mini", image_size=64)
    monkeypatch.setattr(room, "MINI_SHA256", "0" * 64)
    with pytest.raises(DerkitError, match="reinstall"):
        load_dataset()
