"""The configurations of training and generation: typed, checked, one help text per field.

Values may be text, as of shells ('8/255', 'true', '1e3'). Every bad value is one DerkitError."""

import hashlib
import json
import warnings
from collections import namedtuple
from contextlib import suppress
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
from pydantic import BeforeValidator, Field

from derkit.util import AUTO, DerkitError, pick, unknown

ASIDE = "does not change results"  # marks fields that `Config.hash` leaves out
RETIRED = dict(penalty="abs", sync_bn=False, save_every=1)  # fields of older records, what stayed


def parse_eps(value: Any, name: str = "eps") -> float:
    """A radius in pixel units of [0, 1] from 0.03, '0.03' or '8/255'; DerkitError for others."""
    try:
        top, bottom = str(value).split("/") if "/" in str(value) else (str(value), 1)
        number = float(top) / float(bottom)
    except (ValueError, ZeroDivisionError):
        need = "a number in [0, 1] or a fraction such as 8/255"
        raise DerkitError(f"{name} must be {need}, found {value!r}.") from None
    if not 0 <= number <= 1:  # NaN is not, either
        hint = f" Did you mean {number:g}/255?" if 1 < number <= 255 else ""
        raise DerkitError(f"{name} is in pixel units of [0, 1], found {value!r}.{hint}")
    return number


Radius = Annotated[float, BeforeValidator(lambda value, info: parse_eps(value, info.field_name))]
Count, Positive = Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]
Amount, Share = Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0, le=1)]
Decay, Kept = Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]
Auto = Literal["auto"]
Augment = Literal["none", "flip", "crop", "crop_flip", "crop_reflect_flip"]
Model = Literal["one_layer", "small_cnn", "preact_resnet18", "wide_resnet", "custom"]
Method = Literal["standard", "fgsm", "rs_fgsm", "n_fgsm", "zerograd", "pgd", "trades", "weat"]
Regularizer = Literal["none", "der", "gradalign", "elle", "aaer"]
Variant = Literal["norm", "marginal", "segment", "ball"]
Schedule = Literal["piecewise", "triangular", "cosine", "onecycle", "constant"]
Init = Literal["uniform", "class_gaussian", "pca_published", "pca", "local_pca", "noisy_images"]
Precision = Literal["auto", "fp32", "fp64", "bf16", "fp16"]
Stop, Rule = Literal["fixed", "mean_band", "quantile"], Literal["normalised", "plain"]
METHOD_NAMES, REGULARIZER_NAMES, VARIANT_NAMES = map(get_args, (Method, Regularizer, Variant))


def option(default: Any, help: str) -> Any:
    """A field with its default and help."""
    return Field(default, description=help)


class Config(pydantic.BaseModel):
    """Frozen, checked values, given as such or as text; base of `TrainConfig`, `GenerateConfig`."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise self._explain(error.errors()[0]) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise DerkitError(f"a config cannot be changed in place: use config.change({name}=...).")

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """'1e3' as a whole number, paths as text, and no truth value where a number belongs."""
        kind = cls.model_fields[info.field_name].annotation
        if kind is str:
            return "" if value is None else str(value)
        if kind is int and isinstance(value, str) and "e" in value.lower():
            with suppress(ValueError):
                return float(value)
        return str(value) if isinstance(value, bool) and kind is not bool else value

    @classmethod
    def _explain(cls, error: Any) -> DerkitError:
        """pydantic's error as ours: the field, what was found, what is allowed."""
        kind, found = error["type"], error["input"]
        if kind == "value_error":  # raised by a check of ours
            return error["ctx"]["error"]
        name = str(error["loc"][0])
        if kind == "extra_forbidden":
            return unknown("parameter", name, cls.model_fields)
        allowed = get_args(cls.model_fields[name].annotation)
        if kind == "literal_error":
            return unknown(name, found, allowed)
        need, auto = error["msg"].removeprefix("Input should be "), " or 'auto'" * (Auto in allowed)
        return DerkitError(f"{name} must be {need.partition(',')[0]}{auto}, found {found!r}.")

    @classmethod
    def read(cls, record: dict[str, Any]) -> Self:
        """The config in a record; other values of retired fields are ignored, with a warning."""
        if not isinstance(record, dict):
            raise DerkitError(f"a config is a table of values, found a {type(record).__name__}.")
        kept = {name: value for name, value in record.items() if name not in RETIRED}
        other = [name for name, value in RETIRED.items() if record.get(name, value) != value]
        if other:
            warnings.warn(f"retired fields are ignored: {', '.join(other)}.", stacklevel=2)
        return cls(**kept)

    def change(self, **overrides: Any) -> Self:
        """A copy with some fields changed, checked as those of a new one."""
        return type(self)(**(self.as_dict() | overrides))

    as_dict = pydantic.BaseModel.model_dump  # a plain dict that JSON can hold

    def hash(self, *more: str) -> str:
        """Eight hex digits over every field that changes results, and ``more`` (model, data)."""
        aside = {name for name, field in type(self).model_fields.items() if ASIDE in field.metadata}
        text = json.dumps(self.model_dump(exclude=aside), sort_keys=True) + "".join(more)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class TrainConfig(Config):
    """Everything that a training run depends on; `TrainConfig.make` is the usual way in."""

    dataset: str = option("fashion_mini", "a data set of `data.SPECS`, or imagefolder:<path>")
    data_dir: Annotated[str, ASIDE] = option("", "folder of the data; empty: usual places")
    download: Annotated[bool, ASIDE] = option(True, "allow the download of data not found")
    train_size: Count = option(0, "training images, class-balanced; 0 = all (published: all)")
    valid_size: Positive = option(1000, "images held out to choose the best epoch (Rice: 1000)")
    image_size: Count = option(0, "square size of imagefolder images; 0 = 32")
    augment: Augment = option("none", "on the device (published: crop_flip; SVHN: none)")
    model: Model = option("small_cnn", "network (published: preact_resnet18)")
    filters: Positive = option(4, "one_layer: filters of its convolution")
    width: Count = option(0, "first block's channels, wide_resnet: factor; 0 = 16, 64 or 10")
    batch_norm: bool = option(True, "small_cnn: BatchNorm after every convolution")
    depth: Annotated[int, Field(ge=10)] = option(28, "wide_resnet: 6n + 4 (published: 28 or 34)")
    shortcut: Literal["x", "bn"] = option("bn", "preact_resnet18: x (Wong), BN-ReLU(x) (Rice)")
    final_bn: bool = option(True, "preact_resnet18: BN-ReLU before the head (GradAlign: false)")
    normalize: bool = option(True, "normaliser inside the model (GradAlign, WEAT: false)")
    method: Method = option("rs_fgsm", "how adversarial examples are made and weighed")
    eps: Radius = option(0.2, "radius in pixel units (published: 8/255)")
    alpha: Radius | Auto = option(AUTO, "step; auto: eps; rs_fgsm 1.25, zerograd 2, pgd 1/4 of it")
    k: Amount = option(2.0, "n_fgsm: noise in units of eps (published: 2; SVHN 3, WRN 4)")
    q: Decay = option(0.35, "zerograd: share of each gradient that is zeroed (published: 0.35)")
    steps: Positive = option(10, "attack steps of pgd, trades and weat (published: 10)")
    norm: Literal["linf", "l2"] = option("linf", "ball of pgd, trades, weat and the evaluation")
    attack_bn: Literal["auto", "train", "eval"] = option(AUTO, "auto: eval for trades and weat")
    beta: Amount = option(6.0, "weight of the KL term of trades and weat (published: 6)")
    regularizer: Regularizer = option("none", "added to the method's loss")
    variant: Variant = option("norm", "DER: which energies are smoothed, and where")
    mask: Literal["auto", "abnormal", "all"] = option(AUTO, "DER; auto: abnormal for norm only")
    gamma: Amount = option(0.0, "DER norm: the distance that costs nothing (reported: 0 or 0.2)")
    weight: Amount | Auto = option(AUTO, "lambda; auto: norm 0.5, other DER 8, elle 50, aaer 1")
    start: Share = option(0.0, "share of training from which the regulariser acts")
    warmup: Share = option(0.0, "share after it in which lambda rises from 0 (der, elle)")
    epochs: Positive = option(30, "epochs (N-FGSM: 30, WEAT: 100, Rice: 200)")
    batch_size: Positive = option(128, "images a step, over all processes (published: 128)")
    lr: Amount = option(0.1, "peak learning rate (Rice: 0.1, Wong: 0.2, GradAlign: 0.3)")
    schedule: Schedule = option("onecycle", "of the learning rate (Rice: piecewise)")
    peak: Share = option(0.25, "share at which onecycle and triangular peak (Wong: 0.5)")
    optimizer: Literal["sgd", "adam"] = option("sgd", "sgd with momentum, or adam")
    momentum: Decay = option(0.9, "of sgd (published: 0.9)")
    weight_decay: Amount = option(5e-4, "times the weights, onto gradients (published: 5e-4)")
    clip: Amount = option(0.0, "largest gradient norm; 0 = no clipping")
    awp: Amount = option(0.0, "size of AWP's weight perturbation (published: 0.01); 0 = off")
    ema: Decay = option(0.0, "decay of a moving average of the weights, evaluated; 0 = off")
    eval_steps: Positive = option(10, "PGD steps after every epoch (published: 10)")
    eval_size: Positive = option(256, "validation images after every epoch")
    eval_from: Decay = option(0.0, "share of training after which epochs are evaluated")
    probe_size: Positive = option(128, "training images to follow energies on (GradAlign: 256)")
    probe_every: Positive = option(1, "epochs between gradient cosine and E_lin")
    final_size: Count = option(1000, "test images at the end; 0 = all (published: 10000)")
    final_steps: Positive = option(20, "PGD steps at the end (published: 20 or 50)")
    strong_size: Count = option(200, "test images of the strong evaluation; 0 = none")
    pgd50_size: Annotated[Count, ASIDE] = option(0, "test images of PGD-50-10; 0 = none")
    autoattack_size: Annotated[Count, ASIDE] = option(0, "test images of AutoAttack; 0 = none")
    judge_best: Annotated[bool, ASIDE] = option(True, "the best epoch gets all of these, too")
    stop_on_co: bool = option(False, "stop at the catastrophic-overfitting alarm")
    seed: Count = option(0, "seed of everything random")
    device: Annotated[str, ASIDE] = option(AUTO, "auto, cpu, cuda, cuda:1")
    precision: Precision = option(AUTO, "auto: bf16 where a GPU has it, else fp32")
    channels_last: Annotated[bool, ASIDE] = option(True, "memory format of images and weights")
    compile: Annotated[bool, ASIDE] = option(False, "torch.compile the model (not: gradalign)")
    keep_every: Annotated[Count, ASIDE] = option(0, "epochs between weights that are kept; 0: none")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        bad, method = "", self.method
        if self.regularizer == "gradalign" and (self.compile or self.precision in ("bf16", "fp16")):
            bad = "gradalign needs a double backward: set compile=false, precision fp32 or fp64."
        if self.norm != "linf" and method not in ("pgd", "trades", "weat"):
            bad = f"norm {self.norm!r} is for the methods pgd, trades and weat, found {method!r}."
        if method == "fgsm" and self.alpha not in (AUTO, self.eps):
            bad = f"the step of fgsm is eps, found alpha {self.alpha:g}: use rs_fgsm or n_fgsm."
        if method != "n_fgsm" and self.k != 2:
            bad = f"k is the noise of n_fgsm, found k {self.k:g} with method {method!r}."
        if method != "zerograd" and self.q != 0.35:
            bad = f"q is a setting of zerograd, found q {self.q:g} with method {method!r}."
        if self.regularizer == "aaer" and method not in ("fgsm", "rs_fgsm", "n_fgsm", "zerograd"):
            bad = f"aaer is for single-step methods, found {method!r}."
        if self.regularizer == "aaer" and (self.awp or self.bn_mode == "eval"):
            bad = "aaer compares logits of one state of the network: set awp 0, attack_bn train."
        if method == "standard" and self.regularizer != "none":
            bad = f"{self.regularizer} needs adversarial examples; method 'standard' makes none."
        if bad:
            raise DerkitError(bad)
        return self

    @classmethod
    def make(cls, preset: str | None = None, **overrides: Any) -> Self:
        """Preset values, then overrides. Without a preset, the data set chooses it."""
        dataset = str(overrides.get("dataset", "")).split(":")[0]
        preset = preset or DEFAULT_PRESET.get(dataset, "fashion_mini")
        return cls(**(pick("preset", preset, PRESETS).values | overrides))

    @property
    def step_size(self) -> float:
        """alpha of the training attack, with 'auto' resolved."""
        scale = dict(fgsm=1, rs_fgsm=1.25, n_fgsm=1, zerograd=2).get(self.method, 0.25)
        return self.eps * scale if self.alpha == AUTO else self.alpha

    @property
    def bn_mode(self) -> str:
        """BatchNorm mode of the training attack, with 'auto' resolved."""
        auto = "eval" if self.method in ("trades", "weat") else "train"
        return auto if self.attack_bn == AUTO else self.attack_bn

    @property
    def strength(self) -> float:
        """lambda of the regulariser, with 'auto' resolved (GradAlign: arXiv 2007.02617)."""
        align = min(0.02 * 10 ** (self.eps * 255 / 8), 2.0)
        der = 0.5 if self.variant == "norm" else 8.0
        auto = dict(none=0.0, der=der, elle=50.0, gradalign=align, aaer=1.0)[self.regularizer]
        return auto if self.weight == AUTO else self.weight

    @property
    def masked(self) -> bool:
        """Does DER act on abnormal examples only?"""
        return self.mask == "abnormal" or (self.mask == AUTO and self.variant == "norm")


Preset = namedtuple("Preset", "about values")  # where values for `TrainConfig.make` come from
_MINI = dict(width=8, precision="fp64", train_size=3000)
_ONE = dict(model="one_layer", method="fgsm", optimizer="adam", lr=0.003, schedule="triangular",
            peak=0.4, precision="fp32", eval_size=1000, strong_size=1000)
_CO = _ONE | dict(train_size=3000, eps="40/255")
_CO_CIFAR = _ONE | dict(dataset="cifar10", filters=16, train_size=10000, eps="10/255")
_RO = _MINI | dict(method="pgd", steps=4, eps=0.07, attack_bn="eval", epochs=45, lr=0.05, width=16,
                   train_size=250, batch_size=32, weight_decay=0, eval_size=128, eval_steps=5,
                   probe_size=50, final_size=500, warmup=0.15)
_CIFAR = dict(dataset="cifar10", augment="crop_flip", model="preact_resnet18", eps="8/255",
              eval_size=1000, probe_size=256, final_size=0, strong_size=1000, pgd50_size=1000,
              autoattack_size=1000)
_FAST = _CIFAR | dict(lr=0.2, schedule="triangular", peak=0.5, shortcut="x")
_ALIGN = _FAST | dict(method="fgsm", regularizer="gradalign", lr=0.3, peak=0.4, precision="fp32",
                      final_bn=False, normalize=False)
_RICE = _CIFAR | dict(method="pgd", epochs=200, schedule="piecewise", augment="crop_reflect_flip")
_SVHN = _RICE | dict(dataset="svhn", lr=0.01, alpha="1/255", augment="none")
_DER = dict(regularizer="der", gamma=0, epochs=50)
_DER_AT = dict(regularizer="der", weight=6, gamma=0.2, mask="all", start=0.8, epochs=100)
_TRADES = _CIFAR | dict(method="trades", epochs=100, normalize=False)

PRESETS = {
    "fashion_mini": Preset("bundled data, small net, float64: same digits on every CPU", _MINI),
    "fashion_co": Preset("bundled data, one layer, FGSM: it collapses within a minute", _CO),
    "cifar10_co": Preset("10,000 images of CIFAR-10, one layer of 16 filters, FGSM", _CO_CIFAR),
    "fashion_ro": Preset("bundled data, PGD on few images: robust overfitting", _RO),
    "fashion_mnist": Preset("full data", dict(dataset="fashion_mnist", width=16, epochs=15)),
    "cifar10": Preset("PreActResNet-18, 30 epochs, LR 0.2 (Wong et al. 2020, N-FGSM 2022)", _FAST),
    "wong2020": Preset("RS-FGSM, 15 epochs (arXiv 2001.03994)", _FAST | dict(epochs=15)),
    "nfgsm2022": Preset("N-FGSM, k 2, alpha eps (arXiv 2202.01181)", _FAST | {"method": "n_fgsm"}),
    "gradalign2020": Preset("FGSM + GradAlign, no normaliser (arXiv 2007.02617)", _ALIGN),
    "rice2020": Preset("PGD-10, 200 epochs, LR / 10 at 50 % and 75 % (arXiv 2002.11569)", _RICE),
    "rs_der": Preset("RS-FGSM + DER, as a third party reports", _FAST | _DER | {"weight": 0.5}),
    "n_der": Preset("N-FGSM + DER, likewise", _FAST | _DER | dict(method="n_fgsm", weight=0.1)),
    "der_at": Preset("PGD-10, DER in the final fifth, as a third party reports", _RICE | _DER_AT),
    "trades2019": Preset("TRADES, beta 6, 100 epochs (recipe of arXiv 2407.06315)", _TRADES),
    "weat2024": Preset("TRADES weighed by energy (arXiv 2407.06315)", _TRADES | {"method": "weat"}),
    "cifar100": Preset("the cifar10 recipe on CIFAR-100", _FAST | {"dataset": "cifar100"}),
    "rice2020_svhn": Preset("PGD-10 on SVHN, LR 0.01, alpha 1/255, no augmentation", _SVHN),
    "imagefolder": Preset("your images", dict(width=16, augment="flip", eps="8/255")),
}
DEFAULT_PRESET = {name: name for name in ("cifar10", "cifar100", "fashion_mnist", "imagefolder")}
DEFAULT_PRESET |= dict(svhn="rice2020_svhn")


class GenerateConfig(Config):
    """What generated images depend on beside the model and the data. "published": the code of arXiv
    2407.06315 (ECCV'24). Local PCA, the quantile stop and w are our reading of the abstract of
    arXiv 2505.22486, whose body could not be obtained."""

    n: Positive = option(64, "images, spread evenly over the classes (published: 10000)")
    seed: Count = option(0, "seed of everything random")
    classes: str = option("all", "all, or class names or numbers separated by commas")
    init: Init = option("local_pca", "where chains start (published: pca_published)")
    scale: Amount = option(1.0, "pca, class_gaussian: spread in deviations (published: 0.354)")
    retained: Kept | Auto = option(AUTO, "share of variance of a PCA; auto: 0.95, local_pca: 1")
    k: Annotated[int, Field(ge=2)] = option(32, "local_pca: neighbours of the anchor in its class")
    tau: Amount = option(1.0, "local_pca: spread in standard deviations of the neighbourhood")
    rank: Positive = option(128, "local_pca: class-PCA coordinates that tell neighbours")
    best_of: Positive = option(1, "starts a sample; the one nearest to the target is kept")
    image_noise: Amount = option(0.3, "noisy_images: its deviation (published: 1.57, test images)")
    # descent on E(x) + w (-log p(y|x))
    w: Amount = option(1.0, "guidance: 0 = E(x), 1 = E(x, y), more = class over-emphasised")
    rule: Rule = option("normalised", "step: -eta g/|g|, or plain -eta/2 g (published: plain)")
    eta: Amount = option(0.25, "step size (published: 0.025 to 0.8)")
    momentum: Decay = option(0.8, "zeta (published: 0 or 0.8)")
    noise: Amount = option(1e-3, "of a step, none on the last (published: 0.3 to 1.4e-3)")
    steps: Count = option(50, "most steps of a chain; stop=fixed: all (published: 20 to 500)")
    stop: Stop = option("quantile", "when a chain ends (published: fixed or mean_band)")
    low: Share = option(0.0, "quantile: lowest one of the class's real energies to aim at")
    high: Share = option(0.5, "quantile: highest one")
    band: Amount = option(0.5, "mean_band: half-width in deviations of the real energies")
    min_steps: Count = option(0, "steps before a chain may stop")
    p_min: Decay = option(0.0, "p(y|x) below which a chain may not stop")
    reference: Literal["train", "valid"] = option("train", "split that gives the real energies")
    precision: Literal["auto", "fp32", "fp64", "bf16"] = option(AUTO, "auto: the model's")
    batch_size: Annotated[Positive, ASIDE] = option(256, "chains at a time")
    shard_size: Positive = option(1000, "images a file")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise DerkitError(f"low must be <= high, found {self.low} and {self.high}.")
        return self

    @property
    def kept(self) -> float:
        """``retained`` with 'auto' resolved."""
        auto = 1.0 if self.init == "local_pca" else 0.95
        return auto if self.retained == AUTO else self.retained

    def class_numbers(self, names: list[str]) -> list[int]:
        """The chosen classes as numbers. Raises DerkitError for one that the data do not have."""
        words = names if self.classes == "all" else self.classes.split(",")
        table = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
        numbers = [pick("class", word.strip(), table) for word in words]
        if len(set(numbers)) < len(numbers):
            raise DerkitError(f"classes names a class twice: {self.classes!r}.")
        return numbers
