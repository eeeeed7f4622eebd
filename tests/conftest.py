"""Fixtures of the test suite: a private home, one thread, tiny data and nets."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from torch.nn import functional as F

from derkit.checkpoint import load_model
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.evaluation import make_generator
from derkit.models import build_model
from derkit.training import train

settings.register_profile("derkit", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("derkit")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Bit-equal results are promised on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A fresh DERKIT_HOME for every test, and no data folder from outside."""
    monkeypatch.setenv("DERKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.delenv("DERKIT_DATA", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def mini():
    """The bundled data set."""
    return load_dataset()


@pytest.fixture(scope="session")
def tiny(mini):
    """64 training, 32 validation and 32 test images of it."""
    parts = {
        "train": mini.train.take(slice(64)),
        "valid": mini.valid.take(slice(32)),
        "test": mini.test.take(slice(32)),
    }
    return replace(mini, **parts, sha256="tiny")


@pytest.fixture
def net():
    """A factory of untrained small_cnns with BatchNorm, in eval mode."""

    def build(dtype=torch.float32, seed=0, channels=1, size=28, classes=10, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build_model("small_cnn", channels, classes, size, **({"width": 4} | options))
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def _trained(mini):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("small_cnn", 1, 10, 28, [0.286], [0.353], width=4)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        generator = make_generator("cpu", "fixture")
        for _ in range(3):
            for x, y in mini.train.take(slice(2000)).batches(50, generator):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


@pytest.fixture
def trained(_trained):
    """A small_cnn that classifies most bundled images (a fresh copy)."""
    model = copy.deepcopy(_trained)
    model.spec = _trained.spec
    return model


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A factory of models of the kit's own training, on 1000 bundled images in float64; trained once a session."""
    made = {}

    def train_once(**options):
        key = tuple(sorted(options.items()))
        if key not in made:
            small = dict(width=6, train_size=1000, batch_size=32, eval_size=32, eval_steps=2, probe_size=8, final_size=32, final_steps=2,
                         strong_size=0, probe_every=100, device="cpu", precision="fp64")
            config = TrainConfig.make("fashion_mini", **(small | options))
            data, folder = load_dataset(train_size=config.train_size), tmp_path_factory.mktemp("toy") / "run"
            run = train(config, data, folder=folder, verbose=False)
            made[key] = load_model(run.folder / "final.pt").float()
        return made[key]

    return train_once


@pytest.fixture(scope="session")
def robust(toy_run):
    """A small PGD-trained network (eps 0.1)."""
    return toy_run(method="pgd", steps=3, eps=0.1, epochs=3, batch_size=20)


@pytest.fixture
def batch(mini):
    """16 test images with labels."""
    return mini.test.floats(0, 16), mini.test.labels[:16]


@pytest.fixture
def config():
    """A factory of configs at toy size."""

    def make(**overrides):
        small = dict(
            width=4,
            train_size=0,
            epochs=2,
            batch_size=32,
            steps=2,
            eval_steps=2,
            eval_size=16,
            probe_size=8,
            final_size=16,
            final_steps=2,
            strong_size=0,
            device="cpu",
            precision="fp32",
            eps=0.1,
        )
        return TrainConfig.make("fashion_mini", **(small | overrides))

    return make


@pytest.fixture
def seeded():
    """A factory of CPU generators."""
    return lambda seed=0: torch.Generator().manual_seed(seed)
