"""Errors, files, the lock of a folder, devices, bars."""

import errno
import math
import os

import pytest
import torch

from derkit import util
from derkit.util import DerkitError


def test_errors_name_the_nearest():
    assert util.nearest("xyz", ["pgd"]) == "" and util.pick("method", "pgd", {"pgd": 3}) == 3
    with pytest.raises(DerkitError) as caught:
        util.pick("method", "FGMS", {"fgsm": 1, "pgd": 2})
    assert str(caught.value) == "unknown method 'FGMS'. Did you mean 'fgsm'? Allowed: fgsm, pgd."


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_failing_write_leaves_the_old_file(fails, tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file"
    util.atomic_write(path, b"\x00")
    util.atomic_write(path, "é")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(DerkitError, match="No space left.*free some space"), util.disk_errors(path):
        util.atomic_write(path, "new")
    assert path.read_bytes() == "é".encode() and list(path.parent.iterdir()) == [path]


def test_json(tmp_path):
    path = tmp_path / "a.json"
    assert util.read_json(path) == {}
    util.write_json(path, dict(a=math.nan, b=[math.inf, 1.5], c=(1, -math.inf)))
    assert util.read_json(path) == dict(a=None, b=[None, 1.5], c=[1, None])
    for broken in (b"{", b"[]", b"3", b"\xff", b"[" * 100_000):
        path.write_bytes(broken)
        with pytest.raises(DerkitError, match="a.json is not a JSON record"):
            util.read_json(path)


def test_a_folder_has_one_holder(tmp_path):
    with util.hold(tmp_path / "run", "training"):
        with pytest.raises(DerkitError, match="another process is training in .*run"):
            util.hold(tmp_path / "run", "training")
        (tmp_path / "run" / ".a.1.tmp").touch()
        util.remove_temporary(tmp_path / "run")
    with util.hold(tmp_path / "run", "training"):
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_generators():
    seeds = ("a", 3), ("a", 3), ("a", 4), ("b", 3)
    draws = [torch.rand(2, generator=util.make_generator("cpu", *s)).sum().item() for s in seeds]
    assert draws[0] == draws[1] and len({*draws}) == 3


@pytest.mark.parametrize("name, gpus, words", [
    ("cuda", 0, "no GPU of its own, found 0"),
    ("auto", 1, "Start at most 1"),
    ("cuda:1", 2, "'cuda:1' is one device for 2 processes"),
])  # fmt: skip
def test_devices(name, gpus, words, monkeypatch):
    """Several processes take a GPU each, and are told where that cannot be."""
    with pytest.raises(DerkitError, match="'nowhere' is not usable here"):
        util.choose_device("nowhere")
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(variable, "2" if variable == "WORLD_SIZE" else "1")
    assert util.launched() == (1, 2) and util.rank() == 1 and util.world() == 1
    assert util.choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(DerkitError, match=words):
        util.choose_device(name)


@pytest.mark.parametrize("bf16, capability, best", [(1, 8, "bf16"), (0, 7, "fp16"), (0, 6, "fp32")])
def test_precision(bf16, capability, best, monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    assert util.choose_precision("auto", "none", gpu)[0] == best
    assert util.choose_precision("auto", "gradalign", gpu)[0] == "fp32"
    assert util.choose_precision("auto", "none", cpu) == ("fp32", "auto on cpu")
    assert util.choose_precision("bf16", "none", cpu) == ("bf16", "set in the config")


def test_bars_are_silent_on_request(monkeypatch):
    """TQDM_DISABLE is set for all tests; without it, a terminal gets a bar."""
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    items = [1, 2]
    assert util.progress(items, "name") is items
    monkeypatch.delenv("TQDM_DISABLE")
    assert util.progress(items, "name") is not items
