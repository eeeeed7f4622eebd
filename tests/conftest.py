"""Fixtures of the test suite: a private home, one thread, tiny data and nets."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from torch.nn import functional as F

from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.models import build_model
from derkit.training.loop import train
from derkit.util import make_generator

settings.register_profile(
    "derkit", deadline=None, max_examples=40, derandomize=True, database=None
)
settings.load_profile("derkit")

SMALL = dict(width=4, epochs=2, batch_size=32, steps=2, eval_steps=2, eval_size=16, probe_size=8)
SMALL |= dict(final_size=16, final_steps=2, strong_size=0, eps=0.1, device="cpu")
SMALL |= dict(precision="fp32")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Digits are compared on one thread, and two would wait for other processes."""
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


def forty_of_each():
    """The bundled data with 40 training images of each class."""
    data = load_dataset()
    index = torch.cat([(data.train.labels == c).nonzero().squeeze(1)[:40] for c in range(10)])
    return replace(data, train=data.train.take(index), sha256="some")


some = pytest.fixture(scope="session")(forty_of_each)


@pytest.fixture(scope="session")
def tiny(mini):
    """64 training, 32 validation and 32 test images of it."""
    sizes = dict(train=64, valid=32, test=32)
    parts = {name: getattr(mini, name).take(slice(n)) for name, n in sizes.items()}
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
def robust(tmp_path_factory):
    """A small PGD-trained network (eps 0.1), from the kit's own training in float64."""
    options = dict(width=6, train_size=1000, batch_size=20, epochs=3, method="pgd", steps=3)
    config = TrainConfig.make("fashion_mini", **(SMALL | options | dict(precision="fp64")))
    folder = tmp_path_factory.mktemp("robust") / "run"
    run = train(config, load_dataset(train_size=1000), folder=folder, verbose=False)
    return run.model().float()


@pytest.fixture
def batch(mini):
    """16 test images with labels."""
    return mini.test.floats(0, 16), mini.test.labels[:16]


@pytest.fixture
def config():
    """A factory of configs at toy size."""
    return lambda **overrides: TrainConfig.make("fashion_mini", **(SMALL | overrides))


@pytest.fixture
def seeded():
    """A factory of CPU generators."""
    return lambda seed=0: torch.Generator().manual_seed(seed)
