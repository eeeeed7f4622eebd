"""Properties over drawn cases: attacks on every shape, configs through text and JSON, records cut anywhere."""

import dataclasses
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from derkit import attacks, energy
from derkit.attack_losses import LOSSES
from derkit.cli import parse_sets
from derkit.config import AUTO, METHOD_NAMES, TrainConfig
from derkit.errors import DerkitError
from derkit.gen_config import GenerateConfig
from derkit.losses import METHODS, Step
from derkit.presets import PRESETS
from derkit.records import append_line, read_lines


# ----------------------------------------------------------------------------------------------------------- attacks
class Net(nn.Module):
    """A small net for any number of channels and any size."""

    def __init__(self, channels, classes, dtype, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm, self.head = nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, classes)
        self.to(dtype)

    def forward(self, x):
        return 5 * self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64)):
    """(model, x, y, eps): batches from 1 image, 1 to 4 channels, odd and oblong sizes, images at 0 and 1, 2 classes and more."""
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 50))
    shape = draw(st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 4]), st.integers(1, 9), st.integers(1, 9)))
    classes = draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(shape, generator=generator, dtype=dtype) * draw(st.sampled_from([1.0, 3.0])) - draw(st.sampled_from([0, 1.0])))
    y = torch.randint(classes, shape[:1], generator=generator)
    model = Net(shape[1], classes, dtype, seed).train(draw(st.booleans()))
    return model, x.clamp(0, 1), y, draw(st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 1.0]))


OPTIONS = st.fixed_dictionaries(
    {},
    optional=dict(
        steps=st.integers(0, 4), alpha=st.sampled_from([1e-4, 0.1, 2.0]), loss=st.sampled_from([n for n in LOSSES if n != "dlr"]),
        norm=st.sampled_from(attacks.NORMS), restarts=st.integers(1, 3), random_start=st.booleans(), decay=st.booleans(),
        any_iterate=st.booleans(), bn_mode=st.sampled_from(attacks.BN_MODES), targeted=st.booleans(),
    ),
)  # fmt: skip


def fits(model, options, x):
    """A batch of one with one pixel has no batch statistics; KL has no targeted form."""
    enough = options.get("bn_mode") != "train" or x.numel() // x.shape[1] > 1
    return enough and not (options.get("targeted") and options.get("loss") == "kl")


def assert_valid(x_adv, x, eps, norm="linf", reach=1.0):
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.isfinite().all()
    far = (x_adv - x).flatten(1)
    far = far.abs().amax(1) if norm == "linf" else far.norm(dim=1)
    assert far.max() <= reach * eps * (1 + 1e-5) + 1e-6


@given(cases(), OPTIONS, st.integers(0, 5))
def test_pgd_stays_where_it_must(case, options, seed):
    """Every option: range, ball, shape, dtype; the model as it was; the same again from the same generator."""
    model, x, y, eps = case
    if not fits(model, options, x):
        return
    before = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    x_adv = attacks.pgd(model, x, y, eps, generator=torch.Generator().manual_seed(seed), **options)
    assert_valid(x_adv, x, eps, options.get("norm", "linf"))
    assert torch.equal(x_adv, attacks.pgd(model, x, y, eps, generator=torch.Generator().manual_seed(seed), **options))
    assert model.training == before[1] and all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    if eps == 0:
        assert torch.equal(x_adv, x)


@given(cases(), st.sampled_from(["fgsm", "rs_fgsm", "n_fgsm"]), st.sampled_from(attacks.BN_MODES))
def test_single_steps_stay_where_they_must(case, name, bn_mode):
    """N-FGSM alone may reach (k + 1) eps."""
    model, x, y, eps = case
    if not fits(model, dict(bn_mode=bn_mode), x):
        return
    x_adv = attacks.ATTACKS[name](model, x, y, eps, bn_mode=bn_mode, generator=torch.Generator().manual_seed(0))
    assert_valid(x_adv, x, eps, reach=3.0 if name == "n_fgsm" else 1.0)


@given(cases((torch.float64,)), st.sampled_from(METHOD_NAMES))
@settings(max_examples=60)
def test_every_training_method_attacks_inside_its_ball(case, name):
    """Through the table that training uses."""
    model, x, y, eps = case
    config = TrainConfig.make(method=name, eps=eps, steps=2, attack_bn="eval", precision="fp64")
    x_adv, start, _ = METHODS[name].attack(Step(model, x, y, config, torch.Generator().manual_seed(0)))
    assert_valid(x_adv, x, eps, reach={"n_fgsm": 3.0, "standard": 0.0}.get(name, 1.0))
    if start is not None:
        assert_valid(start, x, eps, reach=2.0 if name == "n_fgsm" else 1.0)


@given(cases((torch.float64,)), st.sampled_from(["ce", "margin"]), st.sampled_from(attacks.NORMS))
def test_an_image_is_attacked_alone(case, loss, norm):
    """A batch of one gives what the batch gives: no image influences another's attack."""
    model, x, y, eps = case
    options = dict(steps=3, loss=loss, norm=norm, random_start=False)
    together = attacks.pgd(model, x, y, eps, **options)
    alone = torch.cat([attacks.pgd(model, x[i : i + 1], y[i : i + 1], eps, **options) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)


@given(cases((torch.float64,)))
def test_more_restarts_fool_no_fewer(case):
    """An image counts as fooled if any restart fools it."""
    model, x, y, eps = case
    model.eval()
    fooled = []
    for restarts in (1, 3):
        x_adv = attacks.pgd(model, x, y, eps, steps=2, restarts=restarts, any_iterate=True, generator=torch.Generator().manual_seed(1))
        fooled.append((model(x_adv).argmax(1) != y).sum().item())
    assert fooled[1] >= fooled[0]


@given(st.integers(0, 3), st.integers(1, 5), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
       st.sampled_from([1e-30, 1.0, 1e4]))  # fmt: skip
def test_energies_of_any_shape(batch, classes, dtype, scale):
    """Shapes, dtypes and finite values of every energy; CE is never negative; one class has none."""
    generator = torch.Generator().manual_seed(batch)
    f, g = ((torch.randn(batch, classes, generator=generator) * scale).to(dtype) for _ in range(2))
    y = torch.randint(classes, (batch,), generator=generator)
    u = torch.rand(batch, generator=generator, dtype=energy.upcast(f).dtype)
    results = [energy.marginal_energy(f), energy.joint_energy(f, y), energy.cross_entropy(f, y), energy.delta_energy(f, g),
               energy.delta_energy(f, g, y), *energy.trades_decomposition(f, g), energy.energy_linearity(f, f, g, u),
               energy.loss_linearity(f, f, g, u, y)]  # fmt: skip
    for value in results:
        assert value.shape == (batch,) and value.isfinite().all() and value.dtype == energy.upcast(f).dtype
    assert (results[2] >= 0).all() and energy.abnormal_mask(f, g, y).dtype == torch.bool
    if classes == 1:
        assert (results[2] == 0).all() and torch.equal(results[0], results[1])


# ------------------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_through_text_and_json(preset):
    """What a command line, a notebook parameter and config.json hold gives back the same config, field for field."""
    overrides = dict(dataset="imagefolder:/a folder/x") if preset == "imagefolder" else {}
    config = TrainConfig.make(preset, **overrides)
    text = parse_sets([f"{k}={v}" for k, v in config.as_dict().items()])
    for again in (TrainConfig(**json.loads(json.dumps(config.as_dict()))), TrainConfig.make(**text), TrainConfig.make("rice2020", **text)):
        assert again == config and again.hash() == config.hash()
        assert [type(v) for v in again.as_dict().values()] == [type(v) for v in config.as_dict().values()]


def values(f):
    """Valid values of a field."""
    meta = f.metadata
    if meta["choices"]:
        kind = st.sampled_from(meta["choices"])
    elif meta["eps"] or meta["auto"] == "eps":
        kind = st.floats(0, 1) | st.integers(0, 255).map(lambda n: f"{n}/255")
    elif f.type == "bool":
        kind = st.booleans()
    elif f.type == "int":
        kind = st.integers(int(meta["low"] or 0), 10**6)
    elif f.type == "float" or meta["auto"] == "float":
        kind = st.floats(max(meta["low"] or 0, 1e-3), 0.9)
    else:
        kind = st.just(f.default)
    return kind | st.just(AUTO) if meta["auto"] else kind


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig])
@given(data=st.data())
@settings(max_examples=150)
def test_any_config_through_text_and_json(cls, data):
    """Random fields: a config that can be made at all survives both; one that cannot gives DerkitError, nothing else."""
    chosen = data.draw(st.lists(st.sampled_from(dataclasses.fields(cls)), max_size=6, unique_by=lambda f: f.name))
    try:
        config = cls.make(**{f.name: data.draw(values(f), f.name) for f in chosen})
    except DerkitError:
        return
    text = parse_sets([f"{k}={v}" for k, v in config.as_dict().items()])
    assert cls.make(**text) == config == cls(**json.loads(json.dumps(config.as_dict())))
    assert cls.make(**text).hash() == config.hash() and config.change() == config


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.lists(st.integers(), max_size=2)


@pytest.mark.parametrize("cls", [TrainConfig, GenerateConfig])
@given(data=st.data())
@settings(max_examples=200)
def test_any_value_is_taken_or_refused_in_words(cls, data):
    """No value of any type raises anything but a DerkitError that names the field."""
    f = data.draw(st.sampled_from(dataclasses.fields(cls)))
    value = data.draw(ANYTHING)
    try:
        cls.make(**{f.name: value})
    except DerkitError as error:
        assert str(error)


# ------------------------------------------------------------------------------------------------------------ records
VALUES = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
ROWS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, min_size=1), min_size=1, max_size=4)


@given(rows=ROWS, data=st.data())
def test_records_cut_at_any_byte(rows, data, tmp_path_factory):
    """All lines before the cut are there; a torn last one is skipped WITH a warning, and the next line is not lost with it."""
    path = tmp_path_factory.mktemp("records") / "metrics.jsonl"
    ends = [0]
    for row in rows:
        append_line(path, row)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = sum(end - 1 <= cut for end in ends[1:])  # the line break itself may be missing
    torn = cut not in ends and cut + 1 not in ends
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_lines(path) == rows[:complete]
    assert [str(w.message) for w in caught] == (["metrics.jsonl: the last line is truncated and was skipped."] if torn else [])
    append_line(path, {"next": 1})
    kept = rows[: sum(end <= cut for end in ends[1:])]
    assert read_lines(path) == [*kept, {"next": 1}]
