"""TrainConfig: types, ranges, names, presets, what 'auto' stands for, identity of a run."""

import dataclasses
import json
import math

import pytest

from derkit.attacks import BN_MODES, NORMS
from derkit.augment import AUGMENTATIONS
from derkit.config import TrainConfig, check_names, help_text, parse_eps
from derkit.errors import DerkitError
from derkit.models import MODELS
from derkit.presets import DEFAULT_PRESET, PRESETS


@pytest.mark.parametrize(
    "value, expected", [("8/255", 8 / 255), ("0.03", 0.03), (0.03, 0.03), (0, 0.0), (1, 1.0), ("1e-2", 0.01)]
)
def test_eps_accepted(value, expected):
    assert parse_eps(value) == expected


@pytest.mark.parametrize(
    "value", [8, "8", -0.1, "-0.1", "abc", "8/0", "1/2/3", "", None, True, math.nan, math.inf, "nan", [0.1]]
)
def test_eps_rejected(value):
    with pytest.raises(DerkitError, match="eps"):
        parse_eps(value)


def test_eps_in_byte_units_is_explained():
    with pytest.raises(DerkitError, match="Did you mean 8/255"):
        TrainConfig.make(eps=8)


def test_text_values_become_typed():
    """The command line and papermill give text, papermill also floats for whole numbers."""
    c = TrainConfig.make(
        epochs="1e1", seed=3.0, download="false", final_bn="True", lr="1e-3", eps="8/255", alpha="2/255", weight="2"
    )
    assert (c.epochs, c.seed, c.download, c.final_bn, c.lr) == (10, 3, False, True, 1e-3)
    assert (c.eps, c.alpha, c.weight) == (8 / 255, 2 / 255, 2.0)
    assert isinstance(c.epochs, int) and isinstance(c.seed, int)


@pytest.mark.parametrize(
    "name, value",
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", "ten"),
        ("epochs", True),
        ("epochs", "inf"),
        ("train_size", -1),
        ("batch_size", 0),
        ("download", "maybe"),
        ("lr", "fast"),
        ("lr", math.nan),
        ("lr", -1),
        ("lr", True),
        ("weight", -1),
        ("weight", "heavy"),
        ("alpha", 8),
        ("momentum", 1.0),
        ("ema", 1),
        ("warmup", 1.5),
        ("peak", 2),
        ("steps", 0),
        ("seed", -1),
        ("depth", 9),
        ("method", "rsfgsm"),
        ("variant", "marginall"),
        ("penalty", "l1"),
        ("schedule", "step"),
        ("norm", "l1"),
        ("precision", "fp8"),
        ("model", "resnet"),
        ("augment", "cutout"),
        ("regularizer", "derr"),
    ],
)
def test_bad_value_is_one_clear_error(name, value):
    with pytest.raises(DerkitError) as error:
        TrainConfig.make(**{name: value})
    assert name in str(error.value) or name in ("momentum", "ema")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value, near",
    [
        ("method", "rsfgsm", "rs_fgsm"),
        ("regularizer", "DER", "der"),
        ("variant", "segmnet", "segment"),
        ("model", "preactresnet18", "preact_resnet18"),
    ],
)
def test_nearest_name_is_offered(name, value, near):
    with pytest.raises(DerkitError, match=f"Did you mean '{near}'"):
        TrainConfig.make(**{name: value})


def test_unknown_parameter_and_preset():
    with pytest.raises(DerkitError, match="'learning_rate'"):
        TrainConfig.make(learning_rate=0.1)
    with pytest.raises(DerkitError, match="Did you mean 'epochs'"):
        check_names({"epoch": 3})
    with pytest.raises(DerkitError, match="Did you mean 'rice2020'"):
        TrainConfig.make("rice2002")
    with pytest.raises(DerkitError, match="Did you mean 'seed'"):
        TrainConfig.make().change(sed=1)


def test_impossible_combinations():
    for bad in (
        dict(regularizer="gradalign", compile=True),
        dict(regularizer="gradalign", precision="bf16"),
        dict(method="standard", regularizer="der"),
        dict(method="rs_fgsm", norm="l2"),
    ):
        with pytest.raises(DerkitError):
            TrainConfig.make(**bad)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert isinstance(TrainConfig.make(preset), TrainConfig)


def test_published_values_of_presets():
    """The recipes' numbers, from the papers."""
    rice, wong, nfgsm = TrainConfig.make("rice2020"), TrainConfig.make("wong2020"), TrainConfig.make("nfgsm2022")
    assert (rice.epochs, rice.lr, rice.schedule, rice.steps, rice.step_size) == (200, 0.1, "piecewise", 10, 2 / 255)
    assert (wong.schedule, wong.lr, wong.peak) == ("triangular", 0.2, 0.5) and math.isclose(wong.step_size, 10 / 255)
    assert (nfgsm.method, nfgsm.epochs, nfgsm.step_size) == ("n_fgsm", 30, 8 / 255)
    align = TrainConfig.make("gradalign2020")
    assert (align.lr, align.peak, align.final_bn, align.normalize) == (0.3, 0.4, False, False) and math.isclose(
        align.strength, 0.2
    )
    svhn = TrainConfig.make("rice2020_svhn")
    assert (svhn.lr, svhn.step_size, svhn.augment) == (0.01, 1 / 255, "none")
    assert TrainConfig.make("trades2019").beta == 6


def test_data_set_chooses_the_preset():
    """`-p dataset cifar10` alone is the paper-scale recipe."""
    c = TrainConfig.make(dataset="cifar10")
    assert (c.model, c.eps, c.epochs, c.augment, c.batch_size) == ("preact_resnet18", 8 / 255, 30, "crop_flip", 128)
    assert TrainConfig.make().dataset == "fashion_mini"
    assert TrainConfig.make(dataset="imagefolder:/x").dataset == "imagefolder:/x"
    assert TrainConfig.make(dataset="imagefolder:/x").augment == PRESETS["imagefolder"].values["augment"]
    assert set(DEFAULT_PRESET.values()) <= set(PRESETS)
    assert TrainConfig.make(dataset="cifar10", epochs=1).epochs == 1


def test_auto_values():
    make = TrainConfig.make
    assert make(method="rs_fgsm", eps=0.2).step_size == 0.25 and make(method="n_fgsm", eps=0.2).step_size == 0.2
    assert make(method="pgd", eps=0.2).step_size == 0.05 and make(method="pgd", eps=0.2, alpha=0.1).step_size == 0.1
    assert make(method="trades").bn_mode == "eval" and make(method="pgd").bn_mode == "train"
    assert make(method="pgd", attack_bn="eval").bn_mode == "eval"
    text = TrainConfig.__dataclass_fields__["weight"].metadata["help"]
    for name in ("der", "elle"):  # the help says what 'auto' stands for
        assert f"{make(regularizer=name).strength:g} ({name})" in text
    assert make().strength == 0
    assert (
        make(regularizer="gradalign", eps="16/255").strength
        == pytest.approx(2)
        == make(regularizer="gradalign", eps=0.5).strength
    )
    assert make(regularizer="der", weight=0).strength == 0


def test_round_trip_through_json():
    c = TrainConfig.make(regularizer="der", weight="auto", eps="8/255")
    again = TrainConfig(**json.loads(json.dumps(c.as_dict())))
    assert again == c and again.hash("abc") == c.hash("abc")


def test_hash_follows_results_only():
    c = TrainConfig.make()
    assert len(c.hash()) == 8 and c.hash() != c.hash("other data")
    for f in dataclasses.fields(TrainConfig):
        value = getattr(c, f.name)
        other = {
            "data_dir": "/x",
            "dataset": "svhn",
            "alpha": 0.1,
            "weight": 1.0,
            "device": "cpu",
            "depth": 16,
            "warmup": 0.1,
            "peak": 0.1,
            "momentum": 0.5,
            "ema": 0.5,
            "eps": 0.1,
            "norm": "l2",
        }.get(f.name)
        if other is None:
            choices = [x for x in f.metadata["choices"] if x != value]
            other = choices[-1] if choices else (not value if isinstance(value, bool) else value + 1)
        base = c.change(method="n_fgsm" if f.name == "k" else "pgd")
        changed = base.change(**{f.name: other if f.name != "method" else "fgsm"})
        assert (changed.hash() != base.hash()) == f.metadata["identity"], f.name


def test_choices_match_the_tables():
    choices = {f.name: set(f.metadata["choices"]) for f in dataclasses.fields(TrainConfig)}
    assert choices["model"] == {*MODELS, "custom"} and choices["augment"] == set(AUGMENTATIONS)
    assert choices["norm"] == set(NORMS) and choices["attack_bn"] == {*BN_MODES, "auto"}


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig.make().seed = 1


def test_help_names_every_field_and_preset():
    text = help_text()
    for f in dataclasses.fields(TrainConfig):
        assert f"  {f.name}=" in text and f.metadata["help"] in text
    for name, preset in PRESETS.items():
        assert f"  {name}: {preset.about}" in text


def test_a_step_that_fgsm_would_ignore_is_refused():
    with pytest.raises(DerkitError, match="the step of fgsm is eps, found alpha 0.1"):
        TrainConfig.make("fashion_mini", method="fgsm", alpha=0.1)
    assert TrainConfig.make("fashion_mini", method="rs_fgsm", alpha=0.1).step_size == 0.1


def test_noise_that_the_method_would_ignore_is_refused():
    with pytest.raises(DerkitError, match="k is the noise of n_fgsm, found k 3 with method 'rs_fgsm'"):
        TrainConfig.make("fashion_mini", method="rs_fgsm", k=3)
    assert TrainConfig.make("fashion_mini", method="n_fgsm", k="1.5").k == 1.5
