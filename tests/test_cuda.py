"""What only a GPU can show. These tests run where there is one."""

import pytest
import torch

from derkit import attacks
from derkit.checkpoint import load_state
from derkit.data import load_dataset
from derkit.generation.generate import generate
from derkit.training.loop import train
from derkit.util import images_format
from tests.test_training import interrupted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def data():
    return load_dataset(device="cuda", train_size=256)


@pytest.mark.parametrize("options", [dict(method="rs_fgsm", regularizer="der"),
                                     dict(method="pgd", ema=0.9)], ids=lambda o: o["method"])
def test_a_run_and_its_resume(options, data, config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    c = config(device="cuda", precision="auto", epochs=3, width=8, **options)
    whole = train(c, data, folder=tmp_path / "whole", verbose=False)
    with interrupted("train_epoch", 2):
        train(c, data, folder=tmp_path / "run", verbose=False)
    train(c, data, folder=tmp_path / "run", verbose=False)
    a, b = (load_state(tmp_path / n / "last.pt", "cpu")["model"] for n in ("whole", "run"))
    for name, value in a.items():  # kernels of a GPU may add in another order
        torch.testing.assert_close(b[name], value, rtol=1e-2, atol=1e-2)
    assert whole.env["device"] == "cuda" and whole.env["gpu"]


def test_attacks_and_memory_format(data, net):
    model, x, y = net().cuda(), data.test.floats(0, 8), data.test.labels[:8]
    assert images_format(model) == torch.channels_last
    for x_adv in (attacks.fgsm(model, x, y, 0.1), attacks.pgd(model, x, y, 0.1, steps=3)):
        assert x_adv.is_cuda and (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_generation_twice_gives_the_same_bytes(data, net):
    options = dict(init="pca", stop="fixed", steps=3)
    first, second = (generate(net().cuda(), data, 8, **options).images for _ in range(2))
    assert torch.equal(first, second)
