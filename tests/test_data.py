"""Data: the bundled set, batches and augmentation on the device, class folders, idx files, splits, errors."""

import gzip
import hashlib
import struct
from importlib import resources

import numpy as np
import pytest
import torch
from PIL import Image

from derkit import data_sources
from derkit.augment import augment_batch
from derkit.data import CIFAR10, FASHION, MINI_SHA256, Split, load_dataset
from derkit.errors import DataError, DerkitError

CIFAR_ARGS = dict(download=False, valid_size=10)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing may be downloaded here."""
    from torchvision.datasets import utils

    monkeypatch.setattr(utils, "urlopen", lambda *a, **k: pytest.fail("download"), raising=False)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("download"))


def write_folders(root, names, per_class=(3, 2), size=(32, 32), suffix="png", mode="RGB"):
    """A class-folder copy; images of class c have the grey level 10 + 20 c, but for one pixel that tells them apart."""
    for split, n in zip(("train", "test"), per_class, strict=True):
        for c, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = Image.new(mode, size, (10 + 20 * c,) * 3 if mode == "RGB" else 10 + 20 * c)
                if suffix == "png":
                    image.putpixel((0, 0), (i, 0, 0) if mode == "RGB" else i)
                image.save(folder / f"{i:04d}.{suffix}")
    return root


def write_idx(folder, images, labels, stem, gz=False):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        raw = (
            b"\x00\x00\x08"
            + bytes([array.ndim])
            + struct.pack(f">{array.ndim}I", *array.shape)
            + array.astype(np.uint8).tobytes()
        )
        path = folder / f"{stem}-{kind}-ubyte{'.gz' if gz else ''}"
        path.write_bytes(gzip.compress(raw) if gz else raw)


def write_fashion(folder, n=40, gz=False, labels=None):
    """A small 'full' Fashion-MNIST; image i holds i in every pixel."""
    for stem, count in (("train", n), ("t10k", 10)):
        images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28))
        write_idx(folder, images, np.arange(count) % 10 if labels is None else labels[:count], stem, gz)
    return folder


# ------------------------------------------------------------------------------------------------------ bundled set
def test_bundled_set(mini):
    assert [len(s) for s in (mini.train, mini.valid, mini.test)] == [4000, 1000, 1000]
    for split, per_class in ((mini.train, 400), (mini.valid, 100), (mini.test, 100)):
        assert (
            split.images.dtype == torch.uint8
            and split.images.shape[1:] == (1, 28, 28)
            and split.labels.dtype == torch.int64
        )
        assert split.labels.bincount().tolist() == [per_class] * 10
    assert mini.classes == FASHION and (mini.channels, mini.size, mini.source) == (1, 28, "bundled")


def test_bundled_file_is_the_recorded_one():
    raw = (resources.files("derkit") / "assets" / "fashion_mini.npz").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == MINI_SHA256 and len(raw) < 3_000_000


def test_bundled_splits_are_disjoint(mini):
    whole = torch.cat([s.images for s in (mini.train, mini.valid, mini.test)])
    assert len({image.numpy().tobytes() for image in whole}) == len(whole)


def test_bundled_images_look_as_published(mini):
    """The published mean and std of Fashion-MNIST hold for the subset within 2 %."""
    x = mini.train.floats()
    assert x.mean().item() == pytest.approx(mini.mean[0], rel=0.02) and x.std().item() == pytest.approx(
        mini.std[0], rel=0.02
    )


def test_corrupt_bundled_file(monkeypatch):
    monkeypatch.setattr("derkit.data.MINI_SHA256", "0" * 64)
    with pytest.raises(DataError, match="reinstall"):
        load_dataset()


def test_subsets_are_balanced_seeded_and_prefixed(mini):
    small = load_dataset(train_size=100)
    assert small.train.labels.bincount().tolist() == [10] * 10
    assert small.train.labels[:50].bincount().tolist() == [5] * 10  # every prefix is balanced
    assert torch.equal(small.train.images, load_dataset(train_size=100).train.images)
    other = load_dataset(train_size=100, split_seed=1)
    assert not torch.equal(small.train.images, other.train.images) and torch.equal(
        small.valid.images, mini.valid.images
    )
    assert small.sha256 != mini.sha256 != other.sha256 and mini.sha256 == load_dataset().sha256
    assert load_dataset(train_size=103).train.labels.bincount().max() == 11


def test_describe(mini):
    assert mini.describe() == "fashion_mini (bundled): 4000 train, 1000 valid, 1000 test, 10 classes, 1x28x28"


# ---------------------------------------------------------------------------------------------------------- batches
def test_batches_are_floats_in_0_1(mini):
    part = mini.test.take(slice(25))
    batches = list(part.batches(10))
    assert [len(x) for x, _ in batches] == [10, 10, 5] and len(list(part.batches(10, drop_last=True))) == 2
    assert torch.equal(torch.cat([x for x, _ in batches]), part.images.float() / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), part.labels)
    x = torch.cat([x for x, _ in mini.test.batches(300, dtype=torch.float64)])
    assert x.dtype == torch.float64 and x.min() == 0 and x.max() == 1
    assert torch.equal(x * 255, mini.test.images.double())  # float64 keeps every byte


def test_same_generator_same_batches(mini, seeded):
    def epoch(seed):
        return [t for pair in mini.test.batches(300, seeded(seed), "crop_flip") for t in pair]

    assert all(torch.equal(a, b) for a, b in zip(epoch(1), epoch(1), strict=True))
    assert not torch.equal(epoch(1)[0], epoch(2)[0])


def test_shuffling_covers_every_image_once(mini, seeded):
    part = mini.test.take(slice(100))
    pairs = [(x, y) for x, y in part.batches(30, seeded())]
    x, y = torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
    key = {image.tobytes(): label for image, label in zip(part.floats().numpy(), part.labels.tolist(), strict=True)}
    assert [key[image.tobytes()] for image in x.numpy()] == y.tolist() and len({i.tobytes() for i in x.numpy()}) == 100
    assert not torch.equal(y, part.labels)


def test_take_and_len(mini):
    part = mini.train.take(torch.tensor([5, 3]))
    assert (
        len(part) == 2 and torch.equal(part.images[0], mini.train.images[5]) and part.labels[1] == mini.train.labels[3]
    )


# ----------------------------------------------------------------------------------------------------- augmentation
def copies(image, kind, pad=4):
    """Brute force: bytes of every image that ``kind`` may make -> (dy, dx, flipped)."""
    out = {}
    height, width = image.shape[1:]
    mode = dict(mode="reflect") if "reflect" in kind else {}
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), **mode)
    crop, flip = "crop" in kind, "flip" in kind
    for dy in range(2 * pad + 1) if crop else [pad]:
        for dx in range(2 * pad + 1) if crop else [pad]:
            cut = padded[:, dy : dy + height, dx : dx + width]
            out[cut.tobytes()] = (dy, dx, False)
            if flip:
                out[np.ascontiguousarray(cut[..., ::-1]).tobytes()] = (dy, dx, True)
    return out


@pytest.mark.parametrize(
    "kind, ways", [("none", 1), ("flip", 2), ("crop", 81), ("crop_flip", 162), ("crop_reflect_flip", 162)]
)
def test_augmented_images_are_true_copies(kind, ways, seeded):
    """Every image is a shifted / flipped copy of its own source, and all ways occur."""
    rng = np.random.default_rng(0)
    sources = rng.integers(1, 256, (2, 3, 7, 10), dtype=np.uint8)
    images = torch.from_numpy(sources).repeat(1000, 1, 1, 1)
    result = augment_batch(images, kind, seeded()).contiguous().numpy()
    assert result.dtype == np.uint8 and result.shape == images.shape
    for i in range(2):
        allowed = copies(sources[i], kind)
        seen = {allowed[image.tobytes()] for image in result[i::2]}  # KeyError: not a true copy
        assert len(seen) == ways == len(allowed)


def test_augmentation_leaves_its_input_alone(seeded):
    images = torch.randint(0, 256, (8, 1, 10, 10), dtype=torch.uint8)
    before = images.clone()
    augment_batch(images, "crop_flip", seeded())
    assert torch.equal(images, before)
    with pytest.raises(DerkitError, match="Did you mean 'crop_flip'"):
        augment_batch(images, "cropflip", seeded())


def test_no_augmentation_without_a_generator(mini):
    """Evaluation batches are never augmented."""
    part = mini.test.take(slice(8))
    assert torch.equal(next(part.batches(8, augment="crop_flip"))[0], part.floats())


# ---------------------------------------------------------------------------------------------------- class folders
@pytest.mark.parametrize("suffix, source", [("png", "image files"), ("jpg", "JPEG copy")])
@pytest.mark.parametrize("inside", [True, False], ids=["data_dir/cifar10/train", "data_dir/train"])
def test_class_folder_copy(tmp_path, suffix, source, inside):
    write_folders(tmp_path / "cifar10" if inside else tmp_path, CIFAR10, suffix=suffix)
    data = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    assert [len(s) for s in (data.train, data.valid, data.test)] == [20, 10, 20]
    assert data.name == "cifar10" and data.classes == CIFAR10 and source in data.source
    for split in (data.train, data.valid, data.test):
        assert torch.equal(split.images[:, 0, 16, 16].long(), 10 + 20 * split.labels)  # the pixels belong to the labels
    assert data.valid.labels.bincount().tolist() == [1] * 10


def test_folders_from_the_environment(tmp_path, monkeypatch):
    write_folders(tmp_path / "cifar10", CIFAR10)
    monkeypatch.setenv("DERKIT_DATA", str(tmp_path))
    assert len(load_dataset("cifar10", **CIFAR_ARGS).test) == 20


def test_other_class_folders_are_not_taken_for_the_data_set(tmp_path, monkeypatch):
    """A root that holds ten class folders of something else is passed over, unless it is named as data_dir."""
    write_folders(tmp_path, CIFAR10)
    monkeypatch.setattr(data_sources, "search_roots", lambda data_dir: [tmp_path])
    with pytest.raises(DataError, match="was not found"):
        load_dataset("fashion_mnist", **CIFAR_ARGS)


def test_prefixes_of_class_folders_hold_all_classes(tmp_path):
    """Folders are read class by class; evaluation on the first n images must not see the first class only."""
    write_folders(tmp_path, CIFAR10, per_class=(4, 4))
    data = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    assert data.test.labels[:10].unique().numel() == data.valid.labels[:10].unique().numel() == 10
    assert data.train.labels[:15].unique().numel() >= 8
    again = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    assert torch.equal(data.test.images, again.test.images) and data.sha256 == again.sha256


def test_canonical_label_order(tmp_path):
    """Folders named like the published classes, in any spelling, get the published labels, not the sorted ones."""
    folders = ["T-Shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle_boot"]
    write_folders(tmp_path / "fashion_mnist", folders, size=(28, 28), mode="L")
    data = load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS)
    assert data.classes == folders and data.channels == 1
    assert torch.equal(data.test.images[:, 0, 14, 14].long(), 10 + 20 * data.test.labels)


def test_unknown_folder_names_are_sorted(tmp_path):
    names = [f"k{i}" for i in range(10)]
    write_folders(tmp_path / "cifar10", names)
    assert load_dataset("cifar10", tmp_path, **CIFAR_ARGS).classes == names


def test_imagefolder_resizes_the_centre_square(tmp_path):
    """A non-square image: the short side becomes image_size, the middle is kept."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.zeros((20, 60, 3), np.uint8)
                pixels[:, 17:43] = 200 if name == "a" else 100
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    data = load_dataset(f"imagefolder:{tmp_path}", valid_size=2, image_size=10)
    assert (data.name, data.classes, data.channels, data.size) == ("imagefolder", ["a", "b"], 3, 10)
    assert data.train.images.shape == (4, 3, 10, 10) and "resized to 10" in data.source
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert image.unique().tolist() == [[200], [100]][label]
    assert load_dataset(f"imagefolder:{tmp_path}", valid_size=2).size == 32


def test_grey_and_palette_images_become_rgb(tmp_path):
    for i, mode in enumerate(("L", "P", "RGBA", "1", "CMYK", "LA")):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", (8, 8), (90, 90, 90)).convert(mode).save(tmp_path / f"{i}.{suffix}")
        assert data_sources.read_image(tmp_path / f"{i}.{suffix}", None, 8).shape == (3, 8, 8)


def test_cache_is_used_on_the_second_reading(tmp_path, monkeypatch, home):
    write_folders(tmp_path, CIFAR10)
    first = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    assert len(list((home / "cache").iterdir())) == 2
    monkeypatch.setattr(data_sources, "read_image", lambda *a: pytest.fail("decoded again"))
    again = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    assert again.sha256 == first.sha256 and torch.equal(again.train.images, first.train.images)


def test_changed_image_is_read_again(tmp_path):
    write_folders(tmp_path, CIFAR10)
    first = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "test" / "cat" / "0001.png")
    assert load_dataset("cifar10", tmp_path, **CIFAR_ARGS).sha256 != first.sha256


def test_broken_cache_is_read_again(tmp_path, home):
    write_folders(tmp_path, CIFAR10)
    first = load_dataset("cifar10", tmp_path, **CIFAR_ARGS)
    for f in (home / "cache").iterdir():
        f.write_bytes(f.read_bytes()[:-100])
    assert load_dataset("cifar10", tmp_path, **CIFAR_ARGS).sha256 == first.sha256


def test_cache_that_cannot_be_written_is_skipped(tmp_path, home):
    home.write_text("a file, not a folder")
    write_folders(tmp_path / "d", CIFAR10)
    assert len(load_dataset("cifar10", tmp_path / "d", **CIFAR_ARGS).test) == 20


# ------------------------------------------------------------------------------------------------- idx, torchvision
@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("place", ["fashion-mnist", "FashionMNIST/raw", "."])
def test_idx_files(tmp_path, gz, place):
    write_fashion(tmp_path / place, gz=gz)
    data = load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS)
    assert data.source == "idx files" and data.classes == FASHION and len(data.train) == 30
    for split in (data.train, data.test):
        assert torch.equal(split.images[:, 0, 5, 5].long() % 10, split.labels)


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("keep", [2, 6, 12, -1])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_truncated_idx_file(tmp_path, gz, keep, kind):
    write_fashion(tmp_path, gz=gz)
    path = next(tmp_path.glob(f"train-{kind}*"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=path.name):
        load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS)


def test_foreign_idx_file(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="not an idx file"):
        load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS)


def test_idx_files_of_different_lengths(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "x", np.zeros((39, 28, 28)), np.zeros(39), "train")
    (tmp_path / "x" / "train-labels-idx1-ubyte").replace(tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match="40 images and 39 labels"):
        load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS)


def test_labels_out_of_range(tmp_path):
    write_fashion(tmp_path, labels=np.arange(40) % 13)
    with pytest.raises(DataError, match=r"labels of fashion_mnist must lie in \[0, 10\), found \[0, 12\]"):
        load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS)


@pytest.mark.parametrize(
    "name, channels, size, classes", [("cifar10", 3, 32, 10), ("cifar100", 3, 32, 100), ("svhn", 3, 32, 10)]
)
def test_torchvision_formats(tmp_path, monkeypatch, name, channels, size, classes):
    """What torchvision hands over goes through unchanged (its own file checks are not repeated here)."""

    def read(what, root, train, download):
        n = 4 * classes if train else classes
        images = np.broadcast_to(
            (np.arange(n) % classes).astype(np.uint8)[:, None, None, None], (n, channels, size, size)
        )
        return images, np.arange(n, dtype=np.int64) % classes

    monkeypatch.setattr(data_sources, "read_torchvision", read)
    data = load_dataset(name, tmp_path, download=False, valid_size=classes)
    assert data.source == "torchvision" and len(data.classes) == classes and len(data.train) == 3 * classes
    assert torch.equal(data.train.images[:, 0, 0, 0].long(), data.train.labels)


def test_shapes_from_torchvision(tmp_path, monkeypatch):
    """(N, H, W, C) and (N, H, W) become (N, C, H, W)."""
    from torchvision import datasets

    class Fake:
        def __init__(self, root, **kw):
            self.data, self.targets = np.zeros((5, 32, 32, 3), np.uint8), [0, 1, 2, 3, 4]
            self.data[:, 1, 2, 0] = 7

    class FakeGrey(Fake):
        def __init__(self, root, **kw):
            self.data, self.targets = torch.zeros(5, 28, 28, dtype=torch.uint8), torch.arange(5)

    class FakeSVHN(Fake):
        def __init__(self, root, split, download):
            self.data, self.labels = np.zeros((5, 3, 32, 32), np.uint8), np.arange(5)

    for name, kind in (("CIFAR10", Fake), ("CIFAR100", Fake), ("FashionMNIST", FakeGrey), ("SVHN", FakeSVHN)):
        monkeypatch.setattr(datasets, name, kind)
    images, labels = data_sources.read_torchvision("cifar10", tmp_path, True, False)
    assert images.shape == (5, 3, 32, 32) and (images[:, 0, 1, 2] == 7).all() and labels.dtype == np.int64
    assert data_sources.read_torchvision("cifar100", tmp_path, True, False)[0].shape == (5, 3, 32, 32)
    assert data_sources.read_torchvision("fashion_mnist", tmp_path, True, False)[0].shape == (5, 1, 28, 28)
    assert data_sources.read_torchvision("svhn", tmp_path, False, False)[1].tolist() == [0, 1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------------- splits
def test_validation_split_is_seeded_and_disjoint(tmp_path):
    write_fashion(tmp_path)
    ids = {}
    for seed in (0, 0, 1):
        data = load_dataset("fashion_mnist", tmp_path, split_seed=seed, **CIFAR_ARGS)
        parts = [s.images[:, 0, 0, 0].tolist() for s in (data.train, data.valid)]
        assert sorted(parts[0] + parts[1]) == list(range(40)) and len(parts[1]) == 10
        assert ids.setdefault(seed, parts) == parts
    assert ids[0] != ids[1]


def test_train_size_does_not_change_validation(tmp_path):
    write_fashion(tmp_path)
    whole, part = (load_dataset("fashion_mnist", tmp_path, train_size=n, **CIFAR_ARGS) for n in (0, 20))
    assert torch.equal(whole.valid.images, part.valid.images) and len(part.train) == 20
    assert set(part.train.images[:, 0, 0, 0].tolist()) <= set(whole.train.images[:, 0, 0, 0].tolist())


def test_sha256_sees_one_pixel(tmp_path):
    digests = set()
    for value in (1, 2):
        write_fashion(tmp_path)
        raw = bytearray((tmp_path / "t10k-images-idx3-ubyte").read_bytes())
        raw[-1] = value
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(raw)
        digests.add(load_dataset("fashion_mnist", tmp_path, **CIFAR_ARGS).sha256)
    assert len(digests) == 2


# ----------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "name, near", [("fashionmini", "fashion_mini"), ("CIFAR-10", "cifar10"), ("imagefolder", "imagefolder:<path>")]
)
def test_unknown_dataset(name, near):
    with pytest.raises(DerkitError, match=f"Did you mean '{near}'"):
        load_dataset(name)


@pytest.mark.parametrize("name", ["fashion_mini", "cifar10", "fashion_mnist"])
@pytest.mark.parametrize("download", [True, False])
def test_missing_data_dir(tmp_path, name, download, monkeypatch):
    """An error at once, never a download into a misspelt folder."""
    monkeypatch.setattr(data_sources, "read_torchvision", lambda *a: pytest.fail("went to torchvision"))
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_dataset(name, tmp_path / "nowhere", download=download)


def test_not_found_names_the_places_and_the_ways_out(tmp_path):
    with pytest.raises(DataError, match=r"cifar10 was not found in: .*DERKIT_DATA.*cifar10/train/<class>"):
        load_dataset("cifar10", tmp_path, **CIFAR_ARGS)


@pytest.mark.parametrize("error", [OSError("Network is unreachable"), RuntimeError("File not found or corrupted.")])
def test_failed_download_is_one_clear_error(tmp_path, monkeypatch, error):
    def read(name, root, train, download):
        raise error if download else RuntimeError("not found")

    monkeypatch.setattr(data_sources, "read_torchvision", read)
    with pytest.raises(DataError, match="cifar10 could not be downloaded"):
        load_dataset("cifar10", tmp_path)


def test_imagefolder_without_splits(tmp_path):
    with pytest.raises(DataError, match="train does not exist; expected"):
        load_dataset(f"imagefolder:{tmp_path}")
    (tmp_path / "train").mkdir(), (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_dataset(f"imagefolder:{tmp_path}")


def test_class_folder_without_images(tmp_path):
    write_folders(tmp_path, CIFAR10)
    for f in (tmp_path / "test" / "dog").iterdir():
        f.rename(f.with_suffix(".txt"))
    with pytest.raises(DataError, match=r"test/dog holds no images \(.*\.png"):
        load_dataset("cifar10", tmp_path, **CIFAR_ARGS)


def test_missing_class_folder(tmp_path):
    write_folders(tmp_path, CIFAR10)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(DataError, match="test/dog is missing"):
        load_dataset("cifar10", tmp_path, **CIFAR_ARGS)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0, 20, -100])
def test_truncated_image(tmp_path, suffix, keep):
    """Named in the error, whichever image it is."""
    write_folders(tmp_path, CIFAR10, suffix=suffix)
    path = tmp_path / "train" / "frog" / f"0002.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"cannot read image .*frog/0002.{suffix}.*Delete or replace"):
        load_dataset("cifar10", tmp_path, **CIFAR_ARGS)


@pytest.mark.parametrize("inside", [True, False])
def test_cifar100_pointed_at_ten_folders(tmp_path, inside):
    write_folders(tmp_path / "cifar100" if inside else tmp_path, CIFAR10)
    with pytest.raises(DataError, match="has 10 class folders, cifar100 has 100 classes"):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("size", [4001, 10**6])
def test_train_size_too_large(size):
    with pytest.raises(DataError, match=f"train_size = {size} is larger than the 4000 images"):
        load_dataset(train_size=size)


def test_sizes_that_leave_nothing(tmp_path):
    write_fashion(tmp_path)
    for bad, message in (
        (dict(valid_size=41), "valid_size = 41 is larger"),
        (dict(valid_size=40), "no training images"),
        (dict(valid_size=-5), "valid_size"),
        (dict(train_size=31, valid_size=10), "train_size = 31 is larger"),
        (dict(train_size=-1, valid_size=10), "train_size"),
    ):
        with pytest.raises(DataError, match=message):
            load_dataset("fashion_mnist", tmp_path, download=False, **bad)


def test_image_size_is_for_imagefolder():
    with pytest.raises(DerkitError, match="imagefolder"):
        load_dataset("fashion_mini", image_size=64)
    assert load_dataset("fashion_mini", image_size=28).size == 28


def test_split_is_plain_data():
    split = Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    assert split.floats(0, 1, torch.float64).dtype == torch.float64
