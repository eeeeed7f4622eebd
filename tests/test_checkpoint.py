"""Checkpoints and resume states: bit-equal round trips, errors that say what a file is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import derkit
from derkit import checkpoint
from derkit.checkpoint import load_checkpoint, load_model, load_state, save_checkpoint, state_hash
from derkit.data import load_dataset
from derkit.diagnosis.evaluation import accuracy, predict, robust_accuracy
from derkit.models import build_model, describe
from derkit.util import DerkitError


class Own(nn.Module):
    """A user's module, with two names for one tensor."""

    def __init__(self, classes=10):
        super().__init__()
        self.head = self.again = nn.Linear(28 * 28, classes)


@pytest.fixture
def saved(tmp_path, trained):
    save_checkpoint(tmp_path / "m", trained, dict(eps=0.1, alpha="auto"), epoch=3)
    return tmp_path / "m"


def test_round_trip_is_bit_equal(saved, trained, batch):
    content = load_checkpoint(saved)
    assert content["sha256"] == state_hash(trained.state_dict())
    assert content["epoch"] == 3 and content["config"] == dict(eps=0.1, alpha="auto")
    model = load_model(saved, classes=10)
    assert not model.training and torch.equal(model(batch[0]), trained(batch[0]))
    assert model.spec == trained.spec and content["variant"] == describe(trained.spec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_and_formats_survive(tmp_path, trained, dtype):
    save_checkpoint(tmp_path / "m", trained.to(dtype, memory_format=torch.channels_last))
    found = load_model(tmp_path / "m").state_dict()
    assert state_hash(found) == state_hash(trained.state_dict())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_truncated(saved, tmp_path, share):
    checkpoint.save_state(tmp_path / "last.pt", dict(rows=[{}], model={"w": torch.ones(9)}))
    for path, load in ((saved, load_checkpoint), (tmp_path / "last.pt", load_state)):
        raw = path.read_bytes()
        path.write_bytes(raw[: int(share * len(raw))])
        with pytest.raises(DerkitError, match=f"{path.name} is truncated or"):
            load(path)


def test_missing_and_foreign_files(tmp_path, trained):
    for load in (load_checkpoint, load_state):
        with pytest.raises(DerkitError, match="does not exist"):
            load(tmp_path / "none")
    for metadata in (None, dict(format="derkit-1")):
        save_file(trained.state_dict(), tmp_path / "x", metadata)
        with pytest.raises(DerkitError, match="not a derkit checkpoint"):
            load_checkpoint(tmp_path / "x")
    torch.save([1, 2], tmp_path / "x")
    with pytest.raises(DerkitError, match="x is truncated or"):
        load_state(tmp_path / "x")


def test_flipped_bytes_are_noticed(tmp_path, net):
    """Any flipped byte of the weights, and any of the header that leaves no valid one."""
    path, model, noticed = tmp_path / "m", net(width=1, size=8), 0
    save_checkpoint(path, model, dict(eps=0.1), epoch=1)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for i in range(0, len(raw), max(1, len(raw) // 200)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 0x41]) + raw[i + 1 :])
        try:
            assert load_checkpoint(path)["sha256"] == state_hash(model.state_dict()) and i < header
        except DerkitError:
            noticed += 1
    assert noticed > 100


def test_the_hash_sees_names_shapes_types_and_bytes():
    a = {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}
    others = [{"v": a["w"], "n": a["n"]}, a | {"w": a["w"].view(3, 2)}, a | {"n": torch.tensor(4)},
              a | {"w": a["w"].view(torch.int32)}, a | {"w": a["w"] + torch.eye(2, 3) * 1e-6}]
    assert state_hash(a) == state_hash({k: v.clone() for k, v in reversed(a.items())})
    assert len({state_hash(s) for s in [a, *others]}) == 6


def test_wrong_networks(tmp_path):
    """Shortcuts of a PreActResNet differ in no weight's shape: only the spec tells."""
    save_checkpoint(tmp_path / "m", build_model("preact_resnet18", 1, 10, 28, width=2))
    other = build_model("preact_resnet18", 1, 10, 28, width=2, shortcut="x")
    for options, message in ((dict(classes=100), "has 10 classes, the data has 100"),
                             (dict(model=other), "does not fit the model: it is .*shortcut=x")):
        with pytest.raises(DerkitError, match=message):
            load_model(tmp_path / "m", **options)


def test_custom_module(tmp_path):
    path, model = tmp_path / "own", Own()
    save_checkpoint(path, model)
    with pytest.raises(DerkitError, match="pass model=YourModule"):
        load_model(path)
    with pytest.raises(DerkitError, match="does not fit the model: [^\n]*size mismatch"):
        load_model(path, model=Own(3))
    assert torch.equal(load_model(path, model=Own()).head.weight, model.head.weight)
    assert load_checkpoint(path)["variant"] == "custom"


def test_reference_models(tmp_path):
    """Small files that say what they are, and still reach the accuracy that they name."""
    table = checkpoint.pretrained()
    test = load_dataset("fashion_mini").test.take(slice(1000))
    assert {"fashion-standard", "fashion-robust", "fashion-collapsed", "fashion-der"} <= set(
        table.index)
    for name, row in table.iterrows():
        path = checkpoint.ASSETS / f"model-{name}.safetensors"
        assert path.stat().st_size < 1.5e6 and row["command"].startswith("derkit train --preset")
        assert str(Path.home()) not in str(load_checkpoint(path)["config"])
        if name.startswith("fashion"):
            model = derkit.load_pretrained(name)
            clean = accuracy(predict(model, test), test.labels)
            pgd = robust_accuracy(model, test, row["eps"])
            assert clean == pytest.approx(row["clean"], abs=0.005), name
            assert pgd == pytest.approx(row["pgd"], abs=0.02), "a start may round differently"
    assert table.loc["fashion-collapsed", "strong"] < 0.1 < table.loc["fashion-der", "strong"]
    assert table.loc["cifar10-collapsed", "strong"] < 0.1 < table.loc["cifar10-robust", "strong"]
    with pytest.raises(DerkitError, match="Did you mean 'fashion-robust'"):
        derkit.load_pretrained("fashion-robus")
