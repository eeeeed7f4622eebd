"""The configs: types, ranges, names, presets, what 'auto' stands for, identity of a run."""

import math
import warnings
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from derkit.attacks import NORMS
from derkit.config import ASIDE, DEFAULT_PRESET, PRESETS, GenerateConfig, TrainConfig, parse_eps
from derkit.data import AUGMENTATIONS
from derkit.models import MODELS
from derkit.util import DerkitError

make = TrainConfig.make


# -------------------------------------------------------------------------------- one value
@pytest.mark.parametrize("value", [
    8, "8", -0.1, "-0.1", "abc", "8/0", "1/2/3", "", None, True, math.nan, math.inf, "nan", [0.1],
    "1e999999999", "1/1e-400"])
def test_eps_rejected(value):
    with pytest.raises(DerkitError, match="^alpha (must be a number|is in pixel units)"):
        parse_eps(value, "alpha")


@given(st.integers(0, 255))
def test_eps_accepted(n):
    assert make(eps=f"{n}/255").eps == parse_eps(n / 255) == parse_eps(str(n / 255)) == n / 255
    assert parse_eps(f"{n}.5/256") == (n + 0.5) / 256


def test_text_becomes_typed():
    """The command line and papermill give text, papermill also floats for whole numbers."""
    c = make(epochs="1e1", seed=3.0, download="false", final_bn="True", lr="1e-3", eps="8/255",
             alpha="2/255", weight="2", data_dir=Path("/x"), train_size="9007199254740993")
    assert (c.epochs, c.seed, c.download, c.final_bn, c.lr) == (10, 3, False, True, 1e-3)
    assert (c.eps, c.alpha, c.weight, c.data_dir) == (8 / 255, 2 / 255, 2.0, "/x")
    assert type(c.epochs) is int and type(c.seed) is int and c.train_size == 2**53 + 1
    assert make(data_dir=None).data_dir == "" and GenerateConfig(classes=3).classes == "3"


BAD = dict(
    epochs=(0, 1.5, "ten", True, "inf", "", None), train_size=(-1,), batch_size=(0,), seed=(-1,),
    download=("maybe", 3), lr=("fast", math.nan, -1, True, [1]), weight=(-1, "heavy", True),
    alpha=(8, "x"), momentum=(1.0,), ema=(1,), warmup=(1.5,), peak=(2,), start=(-0.1,),
    gamma=(-1,), steps=(0,), depth=(9,), method=("rsfgsm", ["x"], None), variant=("joint",),
    mask=("some",), schedule=("step",), norm=("l1",), precision=("fp8",), model=("resnet",),
    augment=("cutout",), regularizer=("derr",))


@pytest.mark.parametrize("name, value", [(name, v) for name, vs in BAD.items() for v in vs])
def test_a_bad_value_is_one_clear_error(name, value):
    with pytest.raises(DerkitError) as error:
        make(**{name: value})
    text = str(error.value)
    assert name in text and "found" in text + " found" * text.startswith("unknown")
    assert "\n" not in text and "pydantic" not in text and error.value.__cause__ is None


@pytest.mark.parametrize("call, values, message", [
    (make, dict(method="rsfgsm"), "^unknown method 'rsfgsm'. Did you mean 'rs_fgsm'"),
    (make, dict(regularizer="DER"), "^unknown regularizer 'DER'. Did you mean 'der'"),
    (make, dict(metod="fgsm"), "^unknown parameter 'metod'. Did you mean 'method'"),
    (make, dict(preset="rice2002"), "^unknown preset 'rice2002'. Did you mean 'rice2020'"),
    (make().change, dict(sed=1), "'seed'"), (GenerateConfig, dict(inti="pca"), "'init'")])
def test_the_nearest_name_is_offered(call, values, message):
    with pytest.raises(DerkitError, match=message):
        call(**values)


@pytest.mark.parametrize("values, message", [
    (dict(regularizer="gradalign", compile=True), "compile=false"),
    (dict(regularizer="gradalign", precision="bf16"), "precision fp32 or fp64"),
    (dict(regularizer="der", method="standard"), "needs adversarial examples"),
    (dict(method="rs_fgsm", norm="l2"), "norm 'l2' is for the methods pgd, trades and weat"),
    (dict(method="fgsm", alpha=0.1), "the step of fgsm is eps, found alpha 0.1"),
    (dict(method="rs_fgsm", k=3), "k is the noise of n_fgsm, found k 3 with method 'rs_fgsm'"),
    (dict(method="fgsm", q=0.5), "q is a setting of zerograd, found q 0.5 with method 'fgsm'"),
    (dict(method="pgd", regularizer="aaer"), "aaer is for single-step methods, found 'pgd'"),
    (dict(method="fgsm", regularizer="aaer", awp=0.01), "aaer compares logits of one state"),
])
def test_impossible_combinations(values, message):
    with pytest.raises(DerkitError, match=message):
        make(**values)


def test_a_config_is_not_changed_in_place():
    c = make()
    with pytest.raises(DerkitError, match=r"use config.change\(seed=...\)"):
        c.seed = 1
    assert c.change(seed=1).seed == 1 and c.seed == 0


# ---------------------------------------------------------------------------------- presets
def test_published_values_of_presets():
    """Every preset is valid; the recipes' numbers are the papers'."""
    assert all(make(name).hash() and preset.about for name, preset in PRESETS.items())
    rice, wong, nfgsm = make("rice2020"), make("wong2020"), make("nfgsm2022")
    assert (rice.epochs, rice.lr, rice.schedule, rice.steps) == (200, 0.1, "piecewise", 10)
    assert (wong.schedule, wong.lr, wong.peak, wong.epochs) == ("triangular", 0.2, 0.5, 15)
    assert math.isclose(wong.step_size, 10 / 255) and rice.step_size == 2 / 255
    assert (nfgsm.method, nfgsm.epochs, nfgsm.step_size, nfgsm.k) == ("n_fgsm", 30, 8 / 255, 2)
    align = make("gradalign2020")
    assert (align.lr, align.peak, align.final_bn, align.normalize) == (0.3, 0.4, False, False)
    assert math.isclose(align.strength, 0.2)
    svhn, trades = make("rice2020_svhn"), make("trades2019")
    assert (svhn.lr, svhn.step_size, svhn.augment) == (0.01, 1 / 255, "none")
    assert (trades.beta, trades.epochs, make("weat2024").normalize) == (6, 100, False)


def test_the_data_set_chooses_the_preset():
    """`--dataset cifar10` alone is the paper-scale recipe."""
    c = make(dataset="cifar10", seed=2)
    assert (c.model, c.eps, c.epochs, c.augment) == ("preact_resnet18", 8 / 255, 30, "crop_flip")
    assert c.seed == 2 and make() == make("fashion_mini") and make().width == 8
    folders = make(dataset="imagefolder:/x")
    assert (folders.dataset, folders.augment) == ("imagefolder:/x", "flip")
    assert set(DEFAULT_PRESET.values()) <= set(PRESETS)


# ------------------------------------------------------------------------------ derived values
def test_auto_values():
    assert make(method="rs_fgsm", eps=0.2).step_size == 0.25
    assert make(method="n_fgsm", eps=0.2).step_size == make(method="fgsm", eps=0.2).step_size == 0.2
    assert make(method="pgd", eps=0.2).step_size == make(method="pgd", alpha=0.05).step_size == 0.05
    assert make(method="fgsm", eps=0.2, alpha="0.2").step_size == 0.2
    assert make(method="trades").bn_mode == "eval" and make(method="pgd").bn_mode == "train"
    assert make(method="pgd", attack_bn="eval").bn_mode == "eval"
    help = TrainConfig.model_fields["weight"].description
    found = {name: make(regularizer=name, method="fgsm") for name in ("der", "elle", "aaer")}
    der, elle, aaer = (config.strength for config in found.values())
    ball = found["der"].change(variant="ball").strength
    assert help == f"lambda; auto: norm {der:g}, other DER {ball:g}, elle {elle:g}, aaer {aaer:g}"
    align = make(regularizer="gradalign", eps="16/255")
    assert align.strength == pytest.approx(2) == align.change(eps=0.5).strength
    assert make(variant="norm").masked and not make(variant="segment").masked
    assert make(mask="abnormal").masked and not make(variant="norm", mask="all").masked
    assert make().strength == 0 == make(regularizer="der", weight=0).strength


def test_generation_values():
    assert GenerateConfig().kept == 1 and GenerateConfig(init="pca").kept == 0.95
    assert GenerateConfig(init="pca", retained="0.8").kept == 0.8
    for name, bad in dict(low=0.7, high=1.5, retained=0, p_min=1, k=1, precision="fp16").items():
        with pytest.raises(DerkitError, match=name):
            GenerateConfig(**{name: bad})


def test_class_numbers():
    names = ["bag", "boot", "3"]
    for text, numbers in (("all", [0, 1, 2]), ("boot, 0", [1, 0]), ("3", [2])):
        assert GenerateConfig(classes=text).class_numbers(names) == numbers
    for bad, message in (("shoe", "unknown class 'shoe'"), ("9", "class '9'"), ("bag,0", "twice")):
        with pytest.raises(DerkitError, match=message):
            GenerateConfig(classes=bad).class_numbers(names)


# ------------------------------------------------------------------------------------ identity


def test_retired_fields_of_a_record():
    """Read with one warning if they had another value than stayed; other bad fields are errors."""
    stayed = make().as_dict() | dict(penalty="abs", sync_bn=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TrainConfig.read(stayed) == make()
    old = make().as_dict() | dict(penalty="square", sync_bn=True)
    with pytest.warns(UserWarning, match="penalty, sync_bn") as found:
        assert TrainConfig.read(old) == make()
    assert len(found) == 1
    for bad, message in ((dict(nonsense=1), "'nonsense'"), (dict(eps=8), "8/255"),
                         (dict(variant="joint"), "unknown variant 'joint'")):
        with pytest.raises(DerkitError, match=message):
            TrainConfig.read(make().as_dict() | bad)
    with pytest.raises(DerkitError, match="found a list"):
        TrainConfig.read([1])


TEXTS = dict(data_dir="/x", dataset="svhn", device="cpu", classes="1")


@pytest.mark.parametrize("config", [make(method="n_fgsm"), GenerateConfig()], ids=type)
def test_the_hash_follows_results_only(config):
    assert len(config.hash()) == 8 and config.hash() != config.hash("other data")
    for name, field in type(config).model_fields.items():
        value, choices = getattr(config, name), get_args(field.annotation)
        other = TEXTS.get(name, 0.25)  # fits every share, radius and weight
        if isinstance(choices and choices[0], str):
            other = next(choice for choice in choices if choice != value)
        elif isinstance(value, int):
            other = not value if isinstance(value, bool) else value + 1
        if other == value:
            other = 0.3
        base = config.change(method="pgd", k=2) if name == "norm" else config
        base = config.change(method="zerograd", k=2) if name == "q" else base
        assert (base.change(**{name: other}).hash() != base.hash()) == (
            ASIDE not in field.metadata), name


def test_choices_match_the_tables():
    choices = {name: set(get_args(f.annotation)) for name, f in TrainConfig.model_fields.items()}
    assert choices["model"] == {*MODELS, "custom"} and choices["norm"] == set(NORMS)
    assert choices["augment"] == set(AUGMENTATIONS)


def test_the_reported_settings_of_der():
    """What a third party reports of the paper: RS-DER, N-DER and DER on PGD-10."""
    rs, n, at = map(TrainConfig.make, ("rs_der", "n_der", "der_at"))
    for config, method, weight, step in ((rs, "rs_fgsm", 0.5, 10), (n, "n_fgsm", 0.1, 8)):
        assert (config.method, config.strength, config.gamma) == (method, weight, 0)
        assert config.step_size == pytest.approx(step / 255) and config.epochs == 50
        assert config.variant == "norm" and config.masked
    assert (at.method, at.steps, at.weight, at.gamma, at.start) == ("pgd", 10, 6, 0.2, 0.8)
    assert at.variant == "norm" and not at.masked and at.epochs == 100
    assert TrainConfig.make(regularizer="der").variant == "norm"
