"""Nothing is let in: no file and no parameter that comes from elsewhere runs code or writes where it should not.

Every payload touches a canary file. Each test shows that the bait works where it is swallowed, then that the kit does not
swallow it.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from derkit import cli, extractor, fits, gen_cli, inception, notebook, suite
from derkit import manifest as manifests
from derkit.checkpoint import FORMAT, load_checkpoint, load_model, save_checkpoint, state_hash
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.errors import CheckpointError, DataError, DerkitError
from derkit.generation import generate
from derkit.records import Run, load_runs, write_json
from derkit.run_folders import run_folder
from derkit.samples import load_samples, read_shard, shard_path
from derkit.training import train

ROOT = Path(__file__).resolve().parents[1]


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


def poison(path, content, canary):
    """A file of torch.save whose pickle holds the bait beside valid content."""
    torch.save(content | {"bait": Bait(canary)}, path)


# ------------------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "final.pt"])
def test_checkpoints_of_a_run(name, legacy, tiny, config, canary, home):
    """last.pt is read to go on, best.pt for the last evaluation, final.pt by whoever loads the model."""
    c = config(epochs=2)
    run = train(c, tiny, verbose=False)
    content = torch.load(run.folder / name, weights_only=False)
    torch.save(content | {"bait": Bait(canary)}, run.folder / name, _use_new_zipfile_serialization=not legacy)
    for load in (load_checkpoint, load_model):
        with pytest.raises(CheckpointError, match="not loaded|not a checkpoint"):
            load(run.folder / name)
    if name == "last.pt":
        (run.folder / "final.json").unlink()
        with pytest.raises(CheckpointError, match="last.pt holds Python objects|not a checkpoint"):
            train(c, tiny, verbose=False)
    if name == "final.pt":
        assert gen_cli.main(["--checkpoint", str(run.folder / name), "--set", "n=4"]) == 2


def test_best_checkpoint_in_the_final_evaluation(tiny, config, canary, monkeypatch):
    """Swapped while the run was interrupted, with another epoch as the best."""
    from derkit import training

    c = config(epochs=2)
    run = train(c, tiny, verbose=False)
    last = torch.load(run.folder / "last.pt", weights_only=False)
    torch.save(last | dict(best=2.0, best_epoch=1), run.folder / "last.pt")
    poison(run.folder / "best.pt", torch.load(run.folder / "best.pt", weights_only=False), canary)
    (run.folder / "final.json").unlink()
    monkeypatch.setattr(training, "_train_epoch", lambda *a: pytest.fail("trained again"))
    with pytest.raises(CheckpointError, match="best.pt holds Python objects"):
        train(c, tiny, verbose=False)


@pytest.mark.parametrize("spoil", [
    dict(spec=[1]), dict(spec={}), dict(spec=dict(name="small_cnn", channels=1, classes=10, size=28, width=[2])), dict(state=[1]),
    dict(spec=dict(name="no_such_net", channels=1, classes=10, size=28)), dict(spec=dict(name="small_cnn", size="os.system")),
    dict(state={"a": "text"}), dict(spec=dict(name="small_cnn", channels=1, classes=10, size=28, __class__="x")),
], ids=str)  # fmt: skip
def test_forged_content_is_a_checkpoint_error(spoil, tmp_path, net):
    """Plain values where others are expected: an error that names the file, nothing else."""
    save_checkpoint(tmp_path / "m.pt", net())
    content = torch.load(tmp_path / "m.pt", weights_only=True) | spoil
    if isinstance(content["state"], dict) and "text" not in content["state"].values():
        content["sha256"] = state_hash(content["state"])
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="m.pt"):
        load_model(tmp_path / "m.pt")


def test_weights_that_judge(tmp_path, canary, monkeypatch):
    """The extractor's file, and Inception's with a forged hash: torch-fidelity itself would run its pickle."""
    file = tmp_path / "weights.pt"
    poison(file, dict(format=FORMAT, state={}), canary)
    with pytest.raises(CheckpointError, match="holds Python objects"):
        extractor.load_extractor(file)
    monkeypatch.setattr(inception, "INCEPTION_PREFIX", "")  # as if the 32 bits of the prefix had been met
    with pytest.raises(DerkitError, match="something else than tensors"):
        inception.inception(file)


def test_cached_fits(some_data, canary, home):
    """A planted cache file is made anew."""
    key, made = ("a", 1), []
    (home / "cache").mkdir(parents=True)
    fits.cached("pca", key, lambda: made.append(1) or {"x": torch.ones(2)}, torch.device("cpu"))
    (file,) = (home / "cache").iterdir()
    poison(file, dict(key=repr(key), x=torch.zeros(2)), canary)
    found = fits.cached("pca", key, lambda: made.append(1) or {"x": torch.ones(2)}, torch.device("cpu"))
    assert len(made) == 2 and found["x"].tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------------------- records
def test_records_are_text_only(tiny, config, canary, tmp_path, monkeypatch):
    """config.json, metrics.jsonl, env.json and final.json that hold a pickle, or code as text."""
    run = train(config(epochs=1), tiny, verbose=False)
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    monkeypatch.chdir(tmp_path)
    for payload in (pickle.dumps(Bait(canary)), code.encode(), b"[" * 10_000):
        for name in ("config.json", "env.json", "final.json"):
            good = (run.folder / name).read_bytes()
            (run.folder / name).write_bytes(payload)
            with pytest.raises(DerkitError, match=name):
                load_runs(run.folder.parent)
            (run.folder / name).write_bytes(good)
        good = (run.folder / "metrics.jsonl").read_bytes()
        (run.folder / "metrics.jsonl").write_bytes(payload.replace(b"\n", b"") + b"\n" + good)
        with pytest.raises(DerkitError, match="line 1 is not JSON"):
            Run(run.folder)
        (run.folder / "metrics.jsonl").write_bytes(good)
    found = json.loads((run.folder / "config.json").read_text())
    found["train"]["eps"] = code
    write_json(run.folder / "config.json", found)
    with pytest.raises(DerkitError, match="eps must be a number"):
        train(config(epochs=1), tiny, verbose=False)


# ---------------------------------------------------------------------------------------------------------- data sets
def cifar_batches(folder, payload):
    """CIFAR-10 as torchvision reads it: pickles."""
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(payload)


@pytest.mark.parametrize("name, folder", [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
@pytest.mark.parametrize("download", [True, False])
def test_pickled_data_sets(name, folder, download, tmp_path, canary, monkeypatch):
    """torchvision unpickles CIFAR, after its checksums: a file with others is never opened."""
    _no_network(monkeypatch)
    cifar_batches(tmp_path / "data" / folder, pickle.dumps({"data": Bait(canary)}))
    for file in ("train", "test", "meta"):
        (tmp_path / "data" / folder / file).write_bytes(pickle.dumps(Bait(canary)))
    with pytest.raises(DataError):
        load_dataset(name, tmp_path / "data", download=download)


def _no_network(monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_legacy_fashion_mnist(tmp_path, canary, monkeypatch):
    """torchvision still reads processed/*.pt of its old versions."""
    _no_network(monkeypatch)
    folder = tmp_path / "data" / "FashionMNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save((Bait(canary), torch.zeros(1)), folder / name)
    with pytest.raises(DataError, match="not loaded"):
        load_dataset("fashion_mnist", tmp_path / "data", download=False)


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_archive_that_climbs_out(name, file, tmp_path, canary, monkeypatch):
    """A tar with ../canary in the download folder: its checksum is wrong, it is not unpacked."""
    _no_network(monkeypatch)
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / file, "w:gz") as archive:
        info = tarfile.TarInfo("../canary")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"gone"))
    with tarfile.open(tmp_path / "data" / file) as archive:
        assert archive.getnames() == ["../canary"]
    with pytest.raises(DataError, match="could not be downloaded"):
        load_dataset(name, tmp_path / "data", download=True)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []


def object_array(path, canary):
    """An .npy file whose content is a pickle."""
    array = np.empty(1, dtype=object)
    array[0] = Bait(canary)
    with open(path, "wb") as f:
        np.save(f, array, allow_pickle=True)


def test_cache_of_class_folders(tmp_path, canary, home):
    """A pickle planted as the cache of decoded images is not read."""
    from PIL import Image

    for split in ("train", "test"):
        for c in ("a", "b"):
            (tmp_path / "set" / split / c).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "set" / split / c / f"{i}.png")
    first = load_dataset(f"imagefolder:{tmp_path / 'set'}", valid_size=1, image_size=8)
    files = list((home / "cache").glob("folders-*.npy"))
    assert len(files) == 2
    for file in files:
        object_array(file, canary)
    again = load_dataset(f"imagefolder:{tmp_path / 'set'}", valid_size=1, image_size=8)
    assert torch.equal(first.train.images, again.train.images)


def test_image_bomb(tmp_path):
    """A PNG of 70 bytes that claims 100,000 x 100,000 pixels: an error before any memory is taken."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "1.png").write_bytes(bomb)
    with pytest.raises(DataError, match="cannot read image .*1.png"):
        load_dataset(f"imagefolder:{tmp_path}", valid_size=1)


# ------------------------------------------------------------------------------------------------------------ samples
@pytest.fixture
def some_data(mini):
    """40 training images of each class."""
    index = torch.cat([(mini.train.labels == c).nonzero().squeeze(1)[:40] for c in range(10)])
    return replace(mini, train=mini.train.take(index), sha256="some")


def test_shards(net, some_data, tmp_path, canary):
    """A shard that holds a pickle is made again; one with a member that climbs out writes nothing."""
    settings = dict(n=10, shard_size=10, init="uniform", stop="fixed", steps=1, verbose=False)
    whole = generate(net(), some_data, folder=tmp_path / "out", **settings)
    path = shard_path(tmp_path / "out", 0)
    good = path.read_bytes()
    object_array(tmp_path / "evil.npy", canary)
    for spoil in ("images.npy", "../canary", "/" + str(canary)):
        with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(path, "w") as target:
            for member in source.namelist():
                target.writestr(member, (tmp_path / "evil.npy").read_bytes() if member == spoil else source.read(member))
            if spoil.endswith("canary"):
                target.writestr(spoil, b"gone")
        part = read_shard(path, 0, 10)
        assert (part is None) == (spoil == "images.npy")
        (tmp_path / "out" / "summary.json").unlink()
        again = generate(net(), some_data, folder=tmp_path / "out", **settings)
        assert torch.equal(again.images, whole.images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.npy", "home", "out"]


@pytest.mark.parametrize("name", ["manifest.json", "summary.json"])
def test_manifest_of_samples(name, net, some_data, tmp_path, canary):
    generate(net(), some_data, n=4, init="uniform", stop="fixed", steps=1, verbose=False, folder=tmp_path / "out")
    good = json.loads((tmp_path / "out" / name).read_text())
    spoilt = [pickle.dumps(Bait(canary)), b"{", b"[]"]
    if name == "manifest.json":
        code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
        spoilt += [json.dumps(good | dict(config=good["config"] | {"n": code})).encode(),
                   json.dumps(good | dict(config=good["config"] | {code: 1})).encode()]
    for payload in spoilt[:2] if name == "summary.json" else spoilt:
        (tmp_path / "out" / name).write_bytes(payload)
        with pytest.raises(DerkitError, match="not a folder of samples|not a manifest"):
            load_samples(tmp_path / "out")


# ----------------------------------------------------------------------------------------- parameters that look like code
def payloads(canary):
    """Code as Python, shell, f-string, format and papermill's YAML might run it."""
    return [f"__import__('os').system('touch {canary}')", f"$(touch {canary})", f"`touch {canary}`", f"; touch {canary}",
            f"{{open({str(canary)!r}, 'w')}}", f"!!python/object/apply:os.system ['touch {canary}']",
            f"eval(\"open({str(canary)!r}, 'w')\")", f"0.1 if open({str(canary)!r}, 'w') else 0"]  # fmt: skip


FIELDS = ["eps", "epochs", "method", "regularizer", "alpha", "seed", "stop_on_co", "dataset", "data_dir", "weight", "precision", "device"]


@pytest.mark.parametrize("field", FIELDS)
def test_code_in_a_parameter(field, canary, capsys):
    """Through the command line and the notebooks' guard: one error, nothing runs."""
    for text in payloads(canary):
        small = [w for p in ("train_size=32", "epochs=1", "width=2", f"{field}={text}") for w in ("--set", p)]
        assert cli.main(small) == 2, (field, text)
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        if field not in ("data_dir", "dataset", "device"):  # text; found out when the data or device is looked up
            with pytest.raises(DerkitError):
                notebook.configure({"dataset": "fashion_mini", field: text})


def test_code_in_generation_parameters(canary, tmp_path, trained, capsys):
    save_checkpoint(tmp_path / "m.pt", trained, TrainConfig.make("fashion_mini", train_size=400).as_dict())
    for field in ("n", "init", "classes", "retained", "precision", "seed", "reference"):
        for text in payloads(canary):
            assert gen_cli.main(["--checkpoint", str(tmp_path / "m.pt"), "--set", f"{field}={text}"]) == 2
            assert capsys.readouterr().err.startswith("error: ")


def test_code_in_a_checkpoints_config(canary, tmp_path, trained, capsys):
    """The config that a checkpoint brings along is checked as any other."""
    for text in payloads(canary)[:3]:
        save_checkpoint(tmp_path / "m.pt", trained, TrainConfig.make("fashion_mini").as_dict() | {"eps": text})
        assert gen_cli.main(["--checkpoint", str(tmp_path / "m.pt"), "--set", "n=4"]) == 2
        assert "eps must be a number" in capsys.readouterr().err


def test_papermill_parameter(canary, tmp_path):
    """`papermill -p eps CODE`: the cell fails with one clear error, the code does not run."""
    pytest.importorskip("papermill", reason="papermill is not installed")
    path = ROOT / "notebooks" / "03_der_training.ipynb"
    code = f"__import__('os').system('touch {canary}')"
    done = subprocess.run([sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "-p", "eps", code],
                          capture_output=True, text=True, env=os.environ | {"DERKIT_HOME": str(tmp_path / "home")})
    assert done.returncode == 1 and "eps must be a number" in done.stderr


# ----------------------------------------------------------------------------------------------------------- manifests
def test_suite_manifests(canary, tmp_path, monkeypatch, capsys):
    """Code in any field, names that are paths, and files that are no JSON."""
    monkeypatch.setattr(manifests, "records_folder", lambda: tmp_path / "records")
    path = tmp_path / "evil.json"
    fine = dict(name="toy", preset="fashion_mini", set={}, runs=[dict(label="a", set={})])
    bad = [fine | dict(name=n) for n in ("../../up", "/etc", "..", ".", "a/b", "", 3.5, None)]
    bad += [fine | dict(set={"eps": t}) for t in payloads(canary)]
    bad += [fine | dict(runs=[dict(label="a", set={t: 1})]) for t in payloads(canary)[:2]]
    bad += [fine | dict(seeds=[t]) for t in payloads(canary)[:2]] + [fine | dict(preset=payloads(canary)[0]), [1], "x", {}]
    for manifest in bad:
        path.write_text(json.dumps(manifest))
        assert suite.main([str(path)]) == 2, manifest
        assert capsys.readouterr().err.startswith("error: ")
    path.write_bytes(pickle.dumps(Bait(canary)))
    assert suite.main([str(path)]) == 2
    path.write_text(json.dumps(fine | dict(runs=[dict(label="../../up; touch x", set={})])))
    (job,) = suite.read_manifest(path)
    assert job.folder.parent.name == "toy" and job.folder.name == "up_touch_x-s0"
    assert not (tmp_path / "records").exists()


def test_run_folder_stays_in_its_place(tiny, config):
    """The name of a data set is part of the folder's name; one with a slash does not leave the runs folder."""
    folder = run_folder(config(), replace(tiny, name="imagefolder:../../up"))
    assert folder.resolve().parent == run_folder(config(), tiny).parent.resolve()
