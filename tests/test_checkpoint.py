"""Checkpoints: bit-equal round trips, atomic writes, and nothing but data read back."""

import io
import os
import pickle

import pytest
import torch
from torch import nn

from derkit.checkpoint import FORMAT, load_checkpoint, load_model, save_checkpoint, state_hash
from derkit.errors import CheckpointError
from derkit.models import build_model, describe


class Own(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.head = nn.Linear(28 * 28, classes)

    def forward(self, x):
        return self.head(x.flatten(1))


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def saved(tmp_path, trained):
    path = tmp_path / "m.pt"
    save_checkpoint(path, trained, dict(eps=0.1, alpha="auto"), epoch=3)
    return path


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_round_trip_is_bit_equal(saved, trained, batch):
    content = load_checkpoint(saved)
    assert same(content["state"], trained.state_dict())
    assert content["epoch"] == 3 and content["config"] == dict(eps=0.1, alpha="auto")
    assert content["variant"] == describe(trained.spec) == "small_cnn(width=4)"
    model = load_model(saved, classes=10, variant="small_cnn(width=4)")
    assert not model.training and torch.equal(model(batch[0]), trained(batch[0]))
    assert model.spec == trained.spec


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_survives(tmp_path, trained, dtype):
    save_checkpoint(tmp_path / "m.pt", trained.to(dtype))
    assert same(load_model(tmp_path / "m.pt").state_dict(), trained.state_dict())


def test_channels_last_weights(tmp_path, trained, batch):
    expected = trained(batch[0])
    save_checkpoint(tmp_path / "m.pt", trained.to(memory_format=torch.channels_last))
    assert torch.equal(load_model(tmp_path / "m.pt")(batch[0]), expected)


@pytest.mark.parametrize("fails", ["os.replace", "os.fsync", "torch.save"])
def test_failed_write_leaves_the_old_checkpoint(saved, net, monkeypatch, fails):
    old = saved.read_bytes()
    monkeypatch.setattr(fails, lambda *a, **k: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(saved, net(seed=5))
    assert saved.read_bytes() == old and list(saved.parent.glob("*m.pt*")) == [saved]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(saved, share):
    raw = saved.read_bytes()
    saved.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        load_checkpoint(saved)


def test_missing_and_foreign_files(tmp_path, trained):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")
    for content in (
        trained.state_dict(),
        [1, 2],
        dict(format="derkit-0", state={}),
        dict(format=FORMAT),
        dict(format=FORMAT, state={}),
    ):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(CheckpointError, match="not a derkit checkpoint"):
            load_checkpoint(tmp_path / "foreign.pt")


def test_flipped_bytes_are_noticed(tmp_path, net):
    """Any flipped byte gives CheckpointError or leaves the weights bit-equal (padding); most must be noticed."""
    model, path = net(width=1, size=8), tmp_path / "m.pt"
    save_checkpoint(path, model, dict(eps=0.1), epoch=1)
    raw, expected, noticed = path.read_bytes(), model.state_dict(), 0
    places = range(0, len(raw), max(1, len(raw) // 250))
    for i in places:
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 0x41]) + raw[i + 1 :])
        try:
            assert same(load_checkpoint(path)["state"], expected)
        except CheckpointError:
            noticed += 1
    assert noticed > len(places) / 4


def test_changed_weight_is_noticed(saved):
    """A well-formed file whose weights were edited."""
    content = torch.load(saved, weights_only=True)
    content["state"]["1.head.bias"][0] += 1e-6
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match="sha256"):
        load_checkpoint(saved)


def test_state_hash_sees_names_shapes_dtypes_and_bytes():
    a = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    others = [
        {"v": a["w"], "n": a["n"]},
        {**a, "w": a["w"].view(3, 2)},
        {**a, "w": a["w"].view(torch.int32)},  # the same bytes
        {**a, "n": torch.tensor(4)},
        {**a, "w": a["w"] + torch.eye(2, 3) * 1e-6},
    ]
    assert state_hash(a) == state_hash({k: v.clone() for k, v in reversed(a.items())})
    assert len({state_hash(s) for s in [a, *others]}) == len(others) + 1


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_not_executed(tmp_path, zipped):
    touched, path = tmp_path / "touched", tmp_path / "evil.pt"
    content = dict(format=FORMAT, state={}, extra=Hostile(touched))
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match="not loaded|not a checkpoint"):
        load_checkpoint(path)
    assert not touched.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert touched.exists()  # the bait works: only the loader kept it from running


def test_hostile_file_is_named_as_such(tmp_path):
    torch.save(dict(format=FORMAT, state=Hostile(tmp_path / "x")), tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="holds Python objects"):
        load_checkpoint(tmp_path / "evil.pt")


def test_wrong_classes_and_variant(tmp_path, saved):
    with pytest.raises(CheckpointError, match="has 10 classes, the data has 100"):
        load_model(saved, classes=100)
    with pytest.raises(CheckpointError, match=r"holds small_cnn\(width=4\), but small_cnn\(width=8\) was asked for"):
        load_model(saved, variant="small_cnn(width=8)")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_model(saved, model=build_model("small_cnn", 1, 10, 28, width=8))


@pytest.mark.parametrize("wanted", [dict(shortcut="x"), dict(final_bn=False)])
def test_preact_variant_is_stored(tmp_path, wanted):
    """A shortcut variant has the same weights' names and shapes: only the stored variant tells them apart."""
    model = build_model("preact_resnet18", 1, 10, 28, width=2, shortcut="bn", final_bn=True)
    other = build_model("preact_resnet18", 1, 10, 28, **(dict(width=2, shortcut="bn", final_bn=True) | wanted))
    save_checkpoint(tmp_path / "m.pt", model)
    with pytest.raises(CheckpointError, match="was asked for"):
        load_model(tmp_path / "m.pt", variant=describe(other.spec))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "m.pt", model=other)


def test_custom_module(tmp_path, batch):
    path, model = tmp_path / "own.pt", Own()
    save_checkpoint(path, model)
    with pytest.raises(CheckpointError, match="pass model=YourModule"):
        load_model(path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(path, model=Own(3))
    again = load_model(path, model=Own())
    assert torch.equal(again(batch[0]), model(batch[0])) and load_checkpoint(path)["variant"] == "custom"
