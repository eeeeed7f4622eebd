"""The configuration of a run: typed, validated, one help text per field, with the published values beside ours."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from derkit.errors import DerkitError, nearest, unknown
from derkit.presets import DEFAULT_PRESET, PRESETS

AUTO = "auto"


def parse_eps(value: Any, name: str = "eps") -> float:
    """A radius in pixel units of [0, 1]: 0.03, '0.03' and '8/255' are accepted; 8, -0.1 and 'abc' are errors."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if isinstance(value, str) and "/" in value:
            top, bottom = value.split("/")
            number = float(top) / float(bottom)
        else:
            number = float(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise DerkitError(f"{name} must be a number in [0, 1] or a fraction such as 8/255, found {value!r}.") from None
    if not (math.isfinite(number) and 0 <= number <= 1):
        hint = f" Did you mean {number:g}/255?" if 1 < number <= 255 else ""
        raise DerkitError(f"{name} is in pixel units of [0, 1], found {value!r}.{hint}")
    return number


def _bool(value: Any, name: str) -> bool:
    text = str(value).lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no"):
        return False
    raise DerkitError(f"{name} must be true or false, found {value!r}.")


def _int(value: Any, name: str) -> int:
    try:
        number = float(value)
        if isinstance(value, bool) or number != int(number):
            raise ValueError
        return int(number)
    except (ValueError, TypeError, OverflowError):
        raise DerkitError(f"{name} must be a whole number, found {value!r}.") from None


def _float(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (ValueError, TypeError):
        raise DerkitError(f"{name} must be a number, found {value!r}.") from None


def _opt(default, help: str, *, paper: str = "", choices: tuple[str, ...] = (), low: float | None = None,
         eps: bool = False, identity: bool = True, auto: str = ""):
    """One field: help text, published value, allowed names, lowest value; ``identity=False``: does not change results.

    ``auto``: the type behind a field whose default is 'auto' (chosen from the data set, method or machine).
    """
    return field(default=default, metadata=dict(help=help, paper=paper, choices=choices, low=low, eps=eps,
                                                identity=identity, auto=auto))


METHOD_NAMES = ("standard", "fgsm", "rs_fgsm", "n_fgsm", "pgd", "trades", "weat")
REGULARIZER_NAMES = ("none", "der", "gradalign", "elle")
VARIANT_NAMES = ("marginal", "joint", "both", "abnormal", "hinge", "segment", "linear", "linear_both",
                 "segment_joint", "segment_ce", "ball")
SCHEDULE_NAMES = ("piecewise", "triangular", "cosine", "onecycle", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on. ``TrainConfig.make(preset, **overrides)`` is the usual way in."""

    # data
    dataset: str = _opt("fashion_mini", "fashion_mini, fashion_mnist, cifar10, cifar100, svhn or imagefolder:<path>")
    data_dir: str = _opt("", "folder to look for the data in (and download to); empty: $DERKIT_DATA, usual places", identity=False)
    download: bool = _opt(True, "allow the download when the data is nowhere to be found", identity=False)
    train_size: int = _opt(0, "training images, class-balanced; 0 = all", paper="all", low=0)
    valid_size: int = _opt(1000, "images held out of the training set to choose the best epoch", paper="1000 (Rice)", low=1)
    image_size: int = _opt(0, "square size of imagefolder images; 0 = 32", low=0)
    augment: str = _opt("none", "batched augmentation on the device", paper="crop_flip (CIFAR), none (SVHN)",
                        choices=("none", "flip", "crop", "crop_flip", "crop_reflect_flip"))
    # model
    model: str = _opt("small_cnn", "small_cnn, preact_resnet18 or wide_resnet", paper="preact_resnet18",
                      choices=("small_cnn", "preact_resnet18", "wide_resnet", "custom"))
    width: int = _opt(0, "channels of the first block (wide_resnet: widening factor); 0 = 16, 64 or 10", low=0)
    batch_norm: bool = _opt(True, "small_cnn: BatchNorm after every convolution")
    depth: int = _opt(28, "wide_resnet: 6n + 4", paper="28 or 34", low=10)
    shortcut: str = _opt("bn", "preact_resnet18: shortcut from x or from BN-ReLU(x)", paper="bn (Rice), x (Wong)", choices=("x", "bn"))
    final_bn: bool = _opt(True, "preact_resnet18: BN-ReLU before the head", paper="True (Rice, Wong), False (GradAlign)")
    normalize: bool = _opt(True, "normaliser (inside the model) with the data set's mean and std", paper="False (GradAlign, WEAT)")
    # method
    method: str = _opt("rs_fgsm", "how adversarial examples are made and weighed in training", choices=METHOD_NAMES)
    eps: float = _opt(0.2, "radius in pixel units, e.g. 8/255", paper="8/255", eps=True)
    alpha: str | float = _opt(AUTO, "attack step; auto: 1.25 eps (rs_fgsm), eps (n_fgsm), eps/4 (others)", paper="2/255 (PGD-10)", auto="eps")
    k: float = _opt(2.0, "n_fgsm: radius of its noise in units of eps", paper="2; 3 (SVHN, 12/255), 4 (WRN, 16/255)", low=0)
    steps: int = _opt(10, "attack steps of pgd, trades and weat", paper="10", low=1)
    norm: str = _opt("linf", "ball of the attack of pgd, trades and weat, and of the evaluation", choices=("linf", "l2"))
    attack_bn: str = _opt(AUTO, "BatchNorm during the training attack; auto: eval for trades and weat, else train", choices=("train", "eval", AUTO))
    beta: float = _opt(6.0, "weight of the KL term of trades and weat", paper="6", low=0)
    # regulariser
    regularizer: str = _opt("none", "added to the method's loss", choices=REGULARIZER_NAMES)
    variant: str = _opt("segment", "DER: which energies are smoothed, and where", choices=VARIANT_NAMES)
    penalty: str = _opt("abs", "DER: what is averaged of the differences", choices=("abs", "square", "huber"))
    weight: str | float = _opt(AUTO, "lambda; auto: 8 (der), 0.02*10^(eps*255/8) up to 2 (gradalign), 50 (elle)", auto="float")
    warmup: float = _opt(0.15, "share of training over which lambda rises linearly from 0 (der, elle)", low=0)
    # optimisation
    epochs: int = _opt(30, "epochs", paper="30 (N-FGSM), 200 (Rice), 100 (WEAT)", low=1)
    batch_size: int = _opt(128, "batch size, over all processes", paper="128", low=1)
    sync_bn: bool = _opt(False, "several processes: BatchNorm over the whole batch, else over each one's share; running statistics are averaged every epoch")
    lr: float = _opt(0.1, "peak learning rate", paper="0.1 (Rice), 0.2 (Wong, N-FGSM), 0.3 (GradAlign)", low=0)
    schedule: str = _opt("onecycle", "learning-rate schedule, set per step", paper="piecewise (Rice), triangular (Wong)", choices=SCHEDULE_NAMES)
    peak: float = _opt(0.25, "share of training at which triangular and onecycle peak", paper="0.5 (Wong), 0.4 (GradAlign)", low=0)
    momentum: float = _opt(0.9, "SGD momentum", paper="0.9", low=0)
    weight_decay: float = _opt(5e-4, "SGD weight decay", paper="5e-4", low=0)
    clip: float = _opt(0.0, "largest gradient norm; 0 = no clipping", low=0)
    ema: float = _opt(0.0, "decay of an exponential moving average of the weights, evaluated instead of them; 0 = off", low=0)
    # evaluation
    eval_steps: int = _opt(10, "PGD steps of the evaluation after every epoch", paper="10", low=1)
    eval_size: int = _opt(256, "validation images of the evaluation after every epoch", low=1)
    probe_size: int = _opt(128, "fixed training images on which energies are followed", paper="256 (GradAlign)", low=1)
    probe_every: int = _opt(1, "epochs between measurements of gradient cosine and E_lin", low=1)
    final_size: int = _opt(1000, "test images of the final evaluation; 0 = all", paper="10000", low=0)
    final_steps: int = _opt(20, "PGD steps of the final evaluation", paper="20 or 50", low=1)
    strong_size: int = _opt(200, "test images of the strong evaluation (worst case over CE and margin PGD); 0 = none", low=0)
    pgd50_size: int = _opt(0, "test images of the final PGD-50-10 (50 steps of eps/4, 10 restarts); 0 = none", paper="10000", low=0, identity=False)
    autoattack_size: int = _opt(0, "test images of the final AutoAttack (extra: eval); 0 = none", paper="10000", low=0, identity=False)
    stop_on_co: bool = _opt(False, "stop when the catastrophic-overfitting alarm goes off")
    # run
    seed: int = _opt(0, "seed of everything random", low=0)
    device: str = _opt(AUTO, "auto, cpu, cuda, cuda:1, mps", identity=False)
    precision: str = _opt(AUTO, "auto: bf16 (or fp32) on a GPU, fp32 on a CPU; bf16 pays on CPUs with AVX-512 bf16 or AMX, too", choices=(AUTO, "fp32", "fp64", "bf16", "fp16"))
    channels_last: bool = _opt(True, "memory format of images and weights", identity=False)
    compile: bool = _opt(False, "torch.compile the model (not with gradalign: no double backward)", identity=False)
    save_every: int = _opt(1, "epochs between checkpoints of the last state", low=1, identity=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _coerce(f, getattr(self, f.name)))
        self._check()

    def _check(self) -> None:
        if self.momentum >= 1 or self.ema >= 1:
            raise DerkitError("momentum and ema must be below 1.")
        if not 0 <= self.warmup <= 1 or not 0 <= self.peak <= 1:
            raise DerkitError("warmup and peak are shares of training, in [0, 1].")
        if self.regularizer == "gradalign" and self.compile:
            raise DerkitError("gradalign needs double backward, which torch.compile does not support: set compile=false.")
        if self.sync_bn and self.compile:
            raise DerkitError("sync_bn talks to other processes inside the model, which is not compiled: set compile=false.")
        if self.regularizer == "gradalign" and self.precision in ("bf16", "fp16"):
            raise DerkitError("gradalign is trained in fp32 or fp64: its input gradients are too small for half precision.")
        if self.norm != "linf" and self.method not in ("pgd", "trades", "weat"):
            raise DerkitError(f"norm {self.norm!r} is for the methods pgd, trades and weat, found {self.method!r}.")
        if self.method == "fgsm" and self.alpha != AUTO and self.alpha != self.eps:
            raise DerkitError(f"the step of fgsm is eps, found alpha {self.alpha:g}. For another step use method=rs_fgsm or n_fgsm.")
        if self.method != "n_fgsm" and self.k != 2:
            raise DerkitError(f"k is the noise of n_fgsm, found k {self.k:g} with method {self.method!r}.")
        if self.method == "standard" and self.regularizer != "none":
            raise DerkitError(f"regularizer {self.regularizer!r} needs adversarial examples; method 'standard' makes none.")

    @classmethod
    def make(cls, preset: str | None = None, **overrides) -> TrainConfig:
        """Preset values, then overrides. Without a preset, the data set chooses it: cifar10 -> the paper-scale preset.

        Values may be text ('8/255', 'true', '1e-3'). Raises DerkitError for unknown names, with the nearest valid one.
        """
        check_names(overrides)
        if preset is None:
            preset = DEFAULT_PRESET.get(str(overrides.get("dataset", "fashion_mini")).split(":")[0], "fashion_mini")
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        return cls(**(PRESETS[preset].values | overrides))

    def change(self, **overrides) -> TrainConfig:
        """A copy with some fields changed (checked like ``make``)."""
        check_names(overrides)
        return replace(self, **overrides)

    # derived values: what 'auto' stands for
    @property
    def step_size(self) -> float:
        """alpha of the training attack, with 'auto' resolved."""
        if self.alpha != AUTO:
            return self.alpha
        return self.eps * {"rs_fgsm": 1.25, "n_fgsm": 1.0, "fgsm": 1.0}.get(self.method, 0.25)

    @property
    def bn_mode(self) -> str:
        """BatchNorm mode of the training attack, with 'auto' resolved."""
        if self.attack_bn != AUTO:
            return self.attack_bn
        return "eval" if self.method in ("trades", "weat") else "train"

    @property
    def strength(self) -> float:
        """lambda of the regulariser, with 'auto' resolved. GradAlign: 0.02 * 10^(eps*255/8), at most its value at 16/255."""
        if self.weight != AUTO:
            return self.weight
        return {"none": 0.0, "der": 8.0, "elle": 50.0, "gradalign": min(0.02 * 10 ** (self.eps * 255 / 8), 2.0)}[self.regularizer]

    def as_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold and ``TrainConfig(**d)`` reads back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def hash(self, data_sha256: str = "") -> str:
        """Eight hex digits over every field that changes results, and the data's hash."""
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["identity"]}
        text = json.dumps(same, sort_keys=True) + data_sha256
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _coerce(f, value: Any) -> Any:
    """One value to the field's type and range; text is read as the command line and papermill give it."""
    meta, name = f.metadata, f.name
    if meta["auto"] and value == AUTO:
        return AUTO
    if meta["eps"] or meta["auto"] == "eps":
        value = parse_eps(value, name)
    elif f.type == "bool":
        value = _bool(value, name)
    elif f.type == "int":
        value = _int(value, name)
    elif f.type == "float" or meta["auto"] == "float":
        value = _float(value, name)
    else:
        value = str(value) if value is not None else ""
    if meta["choices"] and value not in meta["choices"]:
        raise unknown(name, value, meta["choices"])
    low = 0 if meta["auto"] == "float" else meta["low"]
    if low is not None and value < low:
        raise DerkitError(f"{name} must be at least {low}, found {value}.")
    return value


def check_names(overrides: dict[str, Any]) -> None:
    """Raise DerkitError for a name that is not a field, with the nearest one."""
    names = [f.name for f in fields(TrainConfig)]
    for key in overrides:
        if key not in names:
            raise DerkitError(f"unknown parameter {key!r}.{nearest(key, names)} See python -m derkit.training --help.")


def help_text() -> str:
    """Every field with default, published value and meaning, one a line; then the presets."""
    lines = ["fields (--set name=value):"]
    for f in fields(TrainConfig):
        default = "" if f.default is MISSING else f.default
        paper = f"  [published: {f.metadata['paper']}]" if f.metadata["paper"] else ""
        choices = f"  {{{', '.join(f.metadata['choices'])}}}" if f.metadata["choices"] else ""
        lines.append(f"  {f.name}={default}  {f.metadata['help']}{choices}{paper}")
    lines.append("presets (--preset name):")
    lines += [f"  {name}: {p.about}" for name, p in PRESETS.items()]
    return "\n".join(lines)
