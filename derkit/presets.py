"""Named recipes for `TrainConfig.make`, each with where it comes from. Plain values: the config checks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Named values for ``TrainConfig.make``, and where they come from."""

    about: str
    values: dict[str, Any]


_CIFAR = dict(dataset="cifar10", augment="crop_flip", model="preact_resnet18", eps=8 / 255, batch_size=128, weight_decay=5e-4,
              eval_size=1000, probe_size=256, final_size=0, final_steps=20, strong_size=1000, pgd50_size=1000, autoattack_size=1000)
_FAST = _CIFAR | dict(method="rs_fgsm", epochs=30, lr=0.2, schedule="triangular", peak=0.5, shortcut="x")
_RICE = _CIFAR | dict(method="pgd", steps=10, epochs=200, lr=0.1, schedule="piecewise", augment="crop_reflect_flip", shortcut="bn")
_MINI = dict(dataset="fashion_mini", model="small_cnn", width=8, precision="fp64")

PRESETS: dict[str, Preset] = {
    "fashion_mini": Preset("bundled data, small net, float64: same digits on every CPU; single-step training at eps 0.2",
                           _MINI | dict(train_size=3000, epochs=30, eps=0.2)),
    "fashion_co": Preset("bundled data, FGSM at a radius where it collapses: catastrophic overfitting",
                         _MINI | dict(method="fgsm", train_size=3000, epochs=24, eps=0.22, eval_size=100, probe_size=64,
                                      final_size=500)),
    "fashion_ro": Preset("bundled data, PGD training of a wider net on few images: robust overfitting",
                         _MINI | dict(width=16, train_size=250, batch_size=32, epochs=45, eps=0.07, method="pgd", steps=4, lr=0.05,
                                      weight_decay=0.0, attack_bn="eval", eval_size=128, eval_steps=5, probe_size=50,
                                      final_size=500)),
    "fashion_mnist": Preset("full Fashion-MNIST, small net",
                            dict(dataset="fashion_mnist", model="small_cnn", width=16, epochs=15, eps=0.2)),
    "cifar10": Preset("paper scale: PreActResNet-18, eps 8/255, 30 epochs, triangular LR 0.2 (Wong et al. 2020, N-FGSM 2022)", _FAST),
    "wong2020": Preset("RS-FGSM, 15 epochs (arXiv 2001.03994)", _FAST | dict(epochs=15)),
    "nfgsm2022": Preset("N-FGSM, k = 2, alpha = eps (arXiv 2202.01181)", _FAST | dict(method="n_fgsm")),
    "gradalign2020": Preset("FGSM + GradAlign, LR peak 0.3 at 2/5, no final BN, no normaliser (arXiv 2007.02617)",
                            _FAST | dict(method="fgsm", regularizer="gradalign", lr=0.3, peak=0.4, final_bn=False,
                                         normalize=False, precision="fp32")),
    "rice2020": Preset("PGD-10, 200 epochs, LR 0.1 / 10 at 50 % and 75 % (arXiv 2002.11569)", _RICE),
    "trades2019": Preset("TRADES, beta 6, one-cycle LR 0.1, 100 epochs (recipe of arXiv 2407.06315)",
                         _RICE | dict(method="trades", epochs=100, schedule="onecycle", augment="crop_flip", normalize=False)),
    "weat2024": Preset("WEAT, TRADES weighted by 1/log(1 + e^|E(x)|) (arXiv 2407.06315)",
                       _RICE | dict(method="weat", epochs=100, schedule="onecycle", augment="crop_flip", normalize=False)),
    "cifar100": Preset("RS-FGSM on CIFAR-100, recipe of the cifar10 preset", _FAST | dict(dataset="cifar100")),
    "rice2020_svhn": Preset("PGD-10 on SVHN, LR 0.01, alpha 1/255, no augmentation",
                            _RICE | dict(dataset="svhn", lr=0.01, alpha=1 / 255, augment="none")),
    "imagefolder": Preset("your own images: RS-FGSM, small net", dict(model="small_cnn", width=16, augment="flip", eps=8 / 255)),
}
DEFAULT_PRESET = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn": "rice2020_svhn", "fashion_mnist": "fashion_mnist",
                  "imagefolder": "imagefolder"}
