"""Make the models that come with the kit: train (or load) their runs, halve, measure, store.

    python -m scripts.make_pretrained                # all; or the names of some
    python -m scripts.make_pretrained cifar10-generator=RUN    # from a finished run's folder

Each is evaluated as it is shipped: half-precision weights, 1,000 test images, 200 for a large one.
"""

import sys

from derkit.checkpoint import ASSETS, save_checkpoint
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis import evaluation
from derkit.records import Run
from derkit.training.loop import train
from derkit.util import DerkitError, pick

FASHION = dict(preset="fashion_co", seed=0)
MODELS = {
    "fashion-standard": FASHION | dict(method="standard"),
    "fashion-robust": FASHION | dict(method="pgd"),
    "fashion-collapsed": FASHION,
    "fashion-der": FASHION | dict(regularizer="der", variant="ball", weight=8),
    # one recipe, two seeds
    "cifar10-robust": dict(preset="cifar10_co", method="rs_fgsm", seed=0),
    "cifar10-collapsed": dict(preset="cifar10_co", method="rs_fgsm", seed=1),
    "cifar10-generator": dict(preset="cifar10", width=16, epochs=10, method="pgd", steps=1,
                              norm="l2", eps=0.5, alpha=0.5, seed=0),  # of suite gen_cifar10
}


def make(name: str, folder: str = "") -> None:
    """One model, from its settings to its file; ``folder``: of a finished run with them."""
    values = pick("model", name, MODELS)
    config = TrainConfig.make(**values)
    data = load_dataset(config.dataset, train_size=config.train_size, valid_size=config.valid_size)
    run = Run(folder) if folder else train(config, data)
    other = {key for key in values if key != "preset"
             and run.config["train"][key] != getattr(config, key)}
    if other:
        raise DerkitError(f"{folder} has another {', '.join(sorted(other))} than {name}.")
    model = run.model().half().float()  # rounded to what is stored
    test = data.test.take(slice(1000 if config.model == "one_layer" else 200))
    measured = dict(
        clean=evaluation.accuracy(evaluation.predict(model, test), test.labels),
        pgd=evaluation.robust_accuracy(model, test, config.eps, norm=config.norm),
        strong=evaluation.strong_accuracy(model, test, config.eps, norm=config.norm))
    words = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in values.items())
    about = dict(data=f"{data.name}, {len(data.train)} images", eps=round(config.eps, 6),
                 command=f"derkit train {words}", images=len(test))
    save_checkpoint(ASSETS / f"model-{name}.safetensors", model.half(), run.config["train"],
                    **{key: round(value, 4) for key, value in measured.items()}, **about)
    print(name, measured)


if __name__ == "__main__":
    for word in sys.argv[1:] or MODELS:
        name, _, folder = word.partition("=")
        make(name, folder)
