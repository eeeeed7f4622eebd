"""No file and no parameter from elsewhere runs code, or writes where it should not.

Every payload touches a canary file. The fixture shows that the bait works where it is swallowed.
"""

import io
import json
import pickle
import struct
import tarfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import derkit.__main__ as cli
from derkit import notebook
from derkit.checkpoint import load_checkpoint, load_model, load_state, save_checkpoint
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.generation.extractor import load_extractor
from derkit.generation.generate import generate, load_samples
from derkit.records import load_runs
from derkit.training.loop import train
from derkit.util import DerkitError


class Bait:
    """Unpickling it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """A path that no test may find afterwards."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bait(path)))
    assert path.exists()  # the bait works
    path.unlink()
    yield path
    assert not path.exists(), "a payload ran"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_pickles_in_a_run_folder(zipped, tiny, config, canary):
    """In the place of the weights and of the resume state."""
    run = train(config(epochs=1), tiny, verbose=False)
    for name in ("final.safetensors", "last.pt"):
        torch.save(dict(rows=[], bait=Bait(canary)), run.folder / name,
                   _use_new_zipfile_serialization=zipped)
    for look in (load_checkpoint, load_model, load_extractor):
        with pytest.raises(DerkitError, match="truncated or not a checkpoint"):
            look(run.folder / "final.safetensors")
    with pytest.raises(DerkitError, match="last.pt is truncated or holds more than data"):
        load_state(run.folder / "last.pt")
    (run.folder / "final.json").unlink()
    with pytest.raises(DerkitError, match="last.pt is truncated or holds more than data"):
        train(config(epochs=1), tiny, verbose=False)


SPEC = dict(name="small_cnn", channels=1, classes=10, size=28, width=4)


FORGED = [dict(width=[2]), dict(name=[1]), dict(name="no_such_net"), dict(size="os.system"),
          dict(__class__="x"), dict(classes=9)]
FORGED = [dict(spec=json.dumps(SPEC | part)) for part in FORGED]
FORGED += [dict(spec=text) for text in ("[1]", "{}", "{", "[" * 10_000)]


@pytest.mark.parametrize("forged", [*FORGED, {}, dict(config="3"), dict(info="x"), dict(sha256="")])
def test_forged_checkpoints(forged, tmp_path, net):
    """Plain values where others are expected, or ({}) another weight than the hash is of."""
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, net())
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    state = load(raw)
    state["1.head.bias"] += 0 if forged else 1e-6
    path.write_bytes(save(state, header | forged))
    with pytest.raises(DerkitError, match="m.safetensors"):
        load_model(path)
    with pytest.raises(DerkitError, match="m.safetensors"):
        load_model(path, model=net(width=5))


def test_records_are_text_only(tiny, config, canary):
    """config.json, env.json, final.json and metrics.jsonl that hold a pickle, or code as text."""
    run = train(config(epochs=1), tiny, verbose=False)
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    for name in ("config.json", "env.json", "final.json", "metrics.jsonl"):
        good = (run.folder / name).read_bytes()
        for payload in (pickle.dumps(Bait(canary)), code.encode(), b"[" * 10_000, b"[1]"):
            (run.folder / name).write_bytes(payload)
            with pytest.raises(DerkitError, match=f"{name}.* is not a JSON record"):
                [run.epochs for run in load_runs(run.folder.parent)]
        (run.folder / name).write_bytes(good)
    path = run.folder / "config.json"
    good = json.loads(path.read_text())
    for forged, message in ((good["train"] | {"eps": code}, "eps must be a number"),
                            ([1], "found a list")):
        path.write_text(json.dumps(good | dict(train=forged)))
        with pytest.raises(DerkitError, match=message):
            train(config(epochs=1), tiny, verbose=False)


def test_pickled_data_sets(tmp_path, canary, no_network):
    """torchvision unpickles CIFAR after its checksums: a file with others is never opened. It still
    reads processed/*.pt of its old versions. A tar with ../canary is not unpacked."""
    root = tmp_path / "data"
    for path in ("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch",
                 "cifar-10-batches-py/batches.meta", "cifar-100-python/train",
                 "cifar-100-python/test", "cifar-100-python/meta"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(pickle.dumps({"data": Bait(canary)}))
    (root / "FashionMNIST/processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((Bait(canary), torch.zeros(1)), root / "FashionMNIST/processed" / name)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../canary"), io.BytesIO())
    for name in ("cifar10", "cifar100", "fashion_mnist"):
        for download in (True, False):
            with pytest.raises(DerkitError):
                load_dataset(name, root, download=download)


def test_class_folders(tmp_path, canary, home):
    """A pickle planted as the cache of decoded images is not read; a bomb takes no memory."""
    for path in ("train/a/1.png", "train/a/2.png", "test/a/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40, 0, 0)).save(tmp_path / path)
    source = dict(name=f"imagefolder:{tmp_path}", valid_size=1, image_size=8)
    images = load_dataset(**source).test.images
    caches = [*(home / "cache").glob("folders-*")]
    for file in caches:
        file.write_bytes(pickle.dumps(Bait(canary)))
    assert caches and torch.equal(load_dataset(**source).test.images, images)
    head = b"IHDR" + struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)  # pixels in 33 bytes
    head = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (tmp_path / "test/a/1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head)
    with pytest.raises(DerkitError, match="cannot read image .*1.png"):
        load_dataset(**source)


def test_samples(net, mini, tmp_path, canary):
    """A shard with a pickle is made again; manifests are text, and their config is checked."""
    job = dict(n=4, init="uniform", stop="fixed", steps=1, verbose=False, folder=tmp_path / "out")
    model = net()
    whole = generate(model, mini, **job).images
    (path,) = (tmp_path / "out").glob("part_*.npz")
    np.savez(path, **dict(np.load(path)) | {"images": np.array([Bait(canary)], dtype=object)})
    with pytest.raises(DerkitError, match="part_00000.npz is missing or damaged"):
        load_samples(tmp_path / "out")
    assert torch.equal(generate(model, mini, **job).images, whole)
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    manifest = tmp_path / "out" / "manifest.json"
    good = json.loads(manifest.read_text())
    forged = [good | dict(config=good["config"] | c) for c in ({"n": code}, {code: 1})]
    for payload in (pickle.dumps(Bait(canary)), b"[]", *(json.dumps(f).encode() for f in forged)):
        manifest.write_bytes(payload)
        with pytest.raises(DerkitError):
            load_samples(tmp_path / "out")
        with pytest.raises(DerkitError):
            generate(model, mini, **job)


def payloads(canary):
    """Code as Python, shell, f-string, format and papermill's YAML might run it."""
    return [f"__import__('os').system('touch {canary}')", f"$(touch {canary})",
            f"{{open({str(canary)!r}, 'w')}}", f"0.1 if open({str(canary)!r}, 'w') else 0",
            f"!!python/object/apply:os.system ['touch {canary}']"]


@pytest.mark.parametrize("field", ["eps", "epochs", "method", "seed", "download", "weight",
                                   "dataset", "data_dir", "device"])
def test_code_in_a_parameter(field, canary, capsys):
    """Through the command line and the notebooks' guard: one error, nothing runs."""
    for text in payloads(canary):
        assert cli.main(["train", "--epochs", "1", f"--{field}", text]) == 2
        assert capsys.readouterr().err.startswith("error: ")
        if field not in ("data_dir", "dataset", "device"):  # any text, until it is looked up
            with pytest.raises(DerkitError):
                notebook.configure({"dataset": "fashion_mini", field: text})


def test_code_in_generation_parameters(canary, tmp_path, net, capsys):
    """As flags, and in the config that a checkpoint brings along."""
    path, fine = tmp_path / "m.safetensors", TrainConfig.make("fashion_mini").as_dict()
    save_checkpoint(path, net(), fine)
    for field in ("n", "init", "classes", "retained", "precision", "seed", "part", "inception"):
        for text in payloads(canary):
            assert cli.main(["generate", "--checkpoint", str(path), f"--{field}", text]) == 2
            assert capsys.readouterr().err.startswith("error: ")
    save_checkpoint(path, net(), fine | {"eps": payloads(canary)[0]})
    assert cli.main(["generate", "--checkpoint", str(path), "--n", "4"]) == 2
    assert "eps must be a number" in capsys.readouterr().err
