"""Make the models that come with the kit: train (or load) their runs, halve, measure, store.

    python -m scripts.make_pretrained                # all; or the names of some

Each is evaluated as it is shipped: half-precision weights, 1,000 test images.
"""

import sys

from derkit.checkpoint import ASSETS, save_checkpoint
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis import evaluation
from derkit.training.loop import train
from derkit.util import pick

FASHION = dict(preset="fashion_co", seed=0)
MODELS = {
    "fashion-standard": FASHION | dict(method="standard"),
    "fashion-robust": FASHION | dict(method="pgd"),
    "fashion-collapsed": FASHION,
    "fashion-der": FASHION | dict(regularizer="der", variant="ball", weight=8),
    # one recipe, two seeds
    "cifar10-robust": dict(preset="cifar10_co", method="rs_fgsm", seed=0),
    "cifar10-collapsed": dict(preset="cifar10_co", method="rs_fgsm", seed=1),
}


def make(name: str) -> None:
    """One model, from its settings to its file."""
    values = pick("model", name, MODELS)
    config = TrainConfig.make(**values)
    data = load_dataset(config.dataset, train_size=config.train_size, valid_size=config.valid_size)
    model = train(config, data).model().half().float()  # rounded to what is stored
    test = data.test.take(slice(1000))
    measured = dict(
        clean=evaluation.accuracy(evaluation.predict(model, test), test.labels),
        pgd=evaluation.robust_accuracy(model, test, config.eps),
        strong=evaluation.strong_accuracy(model, test, config.eps, steps=50))
    words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())
    about = dict(data=f"{data.name}, {len(data.train)} images", eps=round(config.eps, 6),
                 command=f"derkit train {words}", images=len(test))
    save_checkpoint(ASSETS / f"model-{name}.safetensors", model.half(), config.as_dict(),
                    **{key: round(value, 4) for key, value in measured.items()}, **about)
    print(name, measured)


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        make(name)
