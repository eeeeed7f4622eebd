"""Properties over drawn cases: attacks on every shape, configs through text, records cut."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from derkit import attacks, energy
from derkit.config import METHOD_NAMES, PRESETS, GenerateConfig, TrainConfig
from derkit.records import read_lines, write_lines
from derkit.training.objectives import Objective
from derkit.util import DerkitError


class Net(nn.Module):
    """A small net for any number of channels and any size."""

    def __init__(self, channels, classes, dtype):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, classes)
        self.to(dtype)

    def forward(self, x):
        return 5 * self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64)):
    """(model, x, y, eps): from 1 image, odd and oblong sizes, many pixels at 0 and 1, 2 classes."""
    dtype, classes = draw(st.sampled_from(dtypes)), draw(st.integers(2, 6))
    batch, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 4]))
    shape = (batch, channels, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 50)))
        model = Net(channels, classes, dtype).train(draw(st.booleans()))
        x = torch.rand(shape, dtype=dtype) * draw(st.sampled_from([1.0, 3.0]))
        y = torch.randint(classes, (batch,))
    x = (x - draw(st.sampled_from([0.0, 1.0]))).clamp(0, 1)
    return model, x, y, draw(st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 1.0]))


OPTIONS = st.fixed_dictionaries({}, optional=dict(
    steps=st.integers(0, 4), alpha=st.sampled_from([1e-4, 0.1, 2.0]),
    loss=st.sampled_from(["ce", "kl", "margin"]), norm=st.sampled_from(attacks.NORMS),
    restarts=st.integers(1, 3), random_start=st.booleans(), decay=st.booleans(),
    any_iterate=st.booleans(), bn_mode=st.sampled_from(attacks.BN_MODES), targeted=st.booleans(),
))  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_valid(x_adv, x, eps, norm="linf", reach=1.0):
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    far = (x_adv - x).flatten(1)
    far = far.abs().amax(1) if norm == "linf" else far.norm(dim=1)
    assert far.max() <= reach * eps * (1 + 1e-5) + 1e-6
    assert eps > 0 or torch.equal(x_adv, x)


@given(cases(), OPTIONS, st.sampled_from(sorted(attacks.ATTACKS)))
@settings(max_examples=100)
def test_attacks_stay_where_they_must(case, options, name):
    """Every option. The model stays as it was, and the same generator gives the same x*."""
    model, x, y, eps = case
    if name != "pgd":
        options = {k: v for k, v in options.items() if k == "bn_mode"}
    if options.get("targeted") and options.get("loss") == "kl":
        return  # has no targeted form
    if options.get("bn_mode") == "train" and x[:, 0].numel() == 1:
        return  # one pixel has no statistics
    before = [v.clone() for v in model.state_dict().values()], model.training
    one, two = (
        attacks.ATTACKS[name](model, x, y, eps, generator=generator(), **options) for _ in range(2)
    )
    assert_valid(one, x, eps, options.get("norm", "linf"), reach=3.0 if name == "n_fgsm" else 1.0)
    assert torch.equal(one, two)
    torch.testing.assert_close([*model.state_dict().values()], before[0], rtol=0, atol=0)
    assert model.training == before[1] and all(p.grad is None for p in model.parameters())


@given(cases((torch.float64,)), st.sampled_from(METHOD_NAMES))
def test_every_training_method_attacks_inside_its_ball(case, name):
    model, x, y, eps = case
    config = TrainConfig.make(method=name, eps=eps, steps=2, attack_bn="eval", precision="fp64")
    x_adv, start, logits = Objective(config).attack(model, x, y, generator())
    assert_valid(x_adv, x, eps, reach={"n_fgsm": 3.0, "standard": 0.0}.get(name, 1.0))
    single = name.endswith("fgsm") or name == "zerograd"
    assert (start is not None) == (logits is not None) == single


@given(cases((torch.float64,)), st.sampled_from(["ce", "margin"]), st.sampled_from(attacks.NORMS))
def test_an_image_is_attacked_alone(case, loss, norm):
    """A batch of one gives what the batch gives: no image influences another's attack."""
    model, x, y, eps = case
    options = dict(steps=3, loss=loss, norm=norm, random_start=False)
    together = attacks.pgd(model, x, y, eps, **options)
    pairs = zip(x.split(1), y.split(1), strict=True)
    alone = torch.cat([attacks.pgd(model, a, b, eps, **options) for a, b in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@given(st.integers(0, 3), st.integers(1, 5), DTYPES, st.sampled_from([1e-30, 1, 1e4]))
def test_energies_of_any_shape(batch, classes, dtype, scale):
    """Shapes, dtypes and finite values; CE is never negative; one class has none."""
    f, g = (torch.randn(2, batch, classes, generator=generator(batch)) * scale).to(dtype)
    y = torch.randint(classes, (batch,), generator=generator())
    u = torch.rand(batch, generator=generator(), dtype=energy.upcast(f).dtype)
    ce = energy.cross_entropy(f, y)
    results = [energy.marginal_energy(f), energy.joint_energy(f, y), energy.delta_energy(f, g), ce]
    results += [energy.delta_energy(f, g, y), *energy.trades_decomposition(f, g)]
    results += [energy.loss_linearity(f, f, g, u, y)]
    for value in results:
        assert value.shape == (batch,) and value.isfinite().all()
        assert value.dtype == energy.upcast(f).dtype
    assert (ce >= 0).all() and energy.abnormal_mask(f, g, y).dtype == torch.bool
    assert classes > 1 or ((ce == 0).all() and torch.equal(results[0], results[1]))


# ----------------------------------------------------------------------------------------- configs
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_through_text_and_json(preset):
    """Command lines, notebook parameters and config.json give back the same config."""
    config = TrainConfig.make(preset, dataset="imagefolder:/a folder/x")
    text = {name: str(value) for name, value in config.as_dict().items()}
    back = TrainConfig.read(json.loads(json.dumps(config.as_dict())))
    for again in (back, TrainConfig.make(**text), TrainConfig.make("rice2020", **text)):
        assert again == config and again.hash() == config.hash()
        kinds = zip(again.as_dict().values(), config.as_dict().values(), strict=True)
        assert all(type(a) is type(b) for a, b in kinds)


NUMBERS = st.integers(-2, 10**6) | st.floats(0, 1) | st.integers(0, 255).map(lambda n: f"{n}/255")
ANYTHING = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=12) | st.just([1])


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig])
@given(data=st.data())
@settings(max_examples=200)
def test_any_config_is_refused_in_words_or_survives_text_and_json(cls, data):
    """No value of any type raises anything but a DerkitError."""
    names = data.draw(st.lists(st.sampled_from(sorted(cls.model_fields)), max_size=4, unique=True))
    words = {n: [*getattr(cls.model_fields[n].annotation, "__args__", ())] for n in names}
    values = {n: data.draw(ANYTHING | st.sampled_from([*words[n], "auto"])) for n in names}
    try:
        config = cls(**values)
    except DerkitError as error:
        assert str(error)
        return
    text = {name: str(value) for name, value in config.as_dict().items()}
    assert cls(**text) == config == cls.read(json.loads(json.dumps(config.as_dict())))
    assert cls(**text).hash() == config.hash() and config.change() == config


# ----------------------------------------------------------------------------------------- records
VALUES = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
ROWS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, min_size=1), max_size=4)


@given(rows=ROWS, data=st.data())
def test_records_cut_at_any_byte(rows, data, tmp_path_factory):
    """Whole lines are read as they were written; a torn line is a DerkitError, never a value."""
    path = tmp_path_factory.mktemp("records") / "metrics.jsonl"
    write_lines(path, rows)
    whole = path.read_bytes()
    assert read_lines(path) == rows
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    try:
        assert read_lines(path) == rows[: len(whole[:cut].splitlines())]
    except DerkitError as error:
        assert "not a JSON record" in str(error)
