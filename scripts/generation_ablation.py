"""Which part of the generator does what? Init x stop, k and tau, guidance and target.

    python scripts/generation_ablation.py                          # 3 seeds, all parts
    python scripts/generation_ablation.py --parts recipe --models TRADES,RS-FGSM --suffix _models
    python scripts/generation_ablation.py --seeds 1 --n 200 --parts grid --out /tmp/a_quick_look
    python scripts/generation_ablation.py --dataset cifar10 --parts cifar10 --n 2000 --seeds 2 \\
        --judges own,lite0 --checkpoint L2=RUN/final.safetensors

Seed s stands for the classifier trained with seed s and for the samples drawn with seed s; with
--checkpoint the classifier is that file for every seed. Judges: the data's own extractor
(scripts/train_extractor.py), EfficientNet-Lite0 and Inception (DERKIT_INCEPTION). Writes a JSON
file for every part, with all rows, per-class values and the protocol, into
figures/records/generation_<dataset>/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from derkit.checkpoint import load_checkpoint, load_model, state_hash
from derkit.config import TrainConfig
from derkit.data import Dataset, load_dataset
from derkit.generation.extractor import Extractor, extractor_for, inception, lite0
from derkit.generation.generate import generate, prepare
from derkit.generation.metrics import generation_summary, metrics_table
from derkit.generation.sampler import quantise
from derkit.records import environment, records_folder
from derkit.training.loop import train
from derkit.util import choose_device, home, pick, read_json, write_json

TRAINING = dict(width=16, precision="fp32", epochs=12, train_size=0, eps=0.1)
SAT, RS_FGSM = dict(method="pgd", steps=5), dict(method="rs_fgsm")
DER = dict(regularizer="der", variant="segment")  # the default when the records were made
MODELS = {"SAT": SAT, "standard": dict(method="standard", strong_size=0),
          "TRADES": dict(method="trades", steps=5), "SAT + DER": SAT | DER,
          "RS-FGSM": RS_FGSM, "RS-FGSM + DER": RS_FGSM | DER}
INITS = {"uniform": "uniform", "class Gaussian": "class_gaussian",
         "PCA as published": "pca_published", "PCA, scale 1": "pca", "local PCA": "local_pca",
         "noisy images": "noisy_images"}
STOPS = {"fixed 4": dict(stop="fixed", steps=4), "fixed 20": dict(stop="fixed", steps=20),
         "mean band": dict(stop="mean_band"), "quantile": dict(stop="quantile")}
ECCV24 = dict(init="pca_published", rule="plain", momentum=0.0, stop="fixed")
LONG = dict(stop="fixed", eta=0.5, momentum=0.0)  # steps of 0.5 in L2, all of them taken
TARGETS = ((0.25, 0.75), (0.0, 1.0), (0.0, 0.5), (0.0, 0.25), (0.0, 0.05))

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "grid": {f"{i} | {s}": dict(init=init) | stop for i, init in INITS.items()
             for s, stop in STOPS.items()},
    "start": {f"k={k} tau={tau}": dict(init="local_pca", k=k, tau=tau)
              for k in (4, 32, 128) for tau in (0.0, 0.4, 0.7, 1.0)}
    | {f"PCA scale={s}": dict(init="pca", scale=s) for s in (0.354, 0.7, 1.0)},
    "dial": {f"w={w}": dict(tau=0.7, w=w) for w in (0.0, 1.0, 2.0, 5.0)}
    | {f"target {low}-{high}": dict(tau=0.7, low=low, high=high) for low, high in TARGETS}
    | {f"fixed {n}": dict(tau=0.7, stop="fixed", steps=n) for n in (1, 2, 4, 8, 16, 32)},
    # the published recipe at step sizes and lengths that its code names and that fit
    "recipe": {f"ECCV'24, eta {eta}, {steps} steps": ECCV24 | dict(eta=eta, steps=steps)
               for eta in (0.05, 0.2, 0.8) for steps in (20, 50)}
    | {"ECCV'24, eta 0.2, momentum 0.8": ECCV24 | dict(eta=0.2, momentum=0.8, steps=20),
       "ECCV'24, eta 0.2, mean band": ECCV24 | dict(eta=0.2, steps=50, stop="mean_band"),
       "local PCA, quantile stop": dict(), "local PCA, tau .7, quantile stop": dict(tau=0.7),
       "local PCA, tau .7, w 2, quantile stop": dict(tau=0.7, w=2.0)},
    "cifar10": {
        "noise, 60 steps": LONG | dict(init="uniform", steps=60),
        "class Gaussian, 20 steps": LONG | dict(init="class_gaussian", steps=20),
        "ECCV'24, eta 0.8, 20 steps": ECCV24 | dict(eta=0.8, steps=20),
        "PCA as published, 20 steps": LONG | dict(init="pca_published", steps=20),
        "PCA, scale 1, 20 steps": LONG | dict(init="pca", steps=20),
        "PCA, scale 1, quantile stop": dict(init="pca"),
        "local PCA, tau .7, 20 steps": LONG | dict(tau=0.7, steps=20),
        "local PCA, tau .7, quantile stop": dict(tau=0.7),
        "local PCA, 10 steps": LONG | dict(steps=10),
        "local PCA, quantile stop": dict()},
    # one dial at a time, from local PCA with k=32, tau=1, w=1 and the quantile stop
    "curve": {f"tau={tau}": dict(tau=tau) for tau in (0.4, 0.7, 1.0, 1.3)}
    | {f"k={k}": dict(k=k) for k in (8, 128)} | {f"w={w}": dict(w=w) for w in (0.0, 3.0, 10.0)}
    | {f"fixed {n}": dict(stop="fixed", steps=n) for n in (1, 2, 4, 8, 16)}
    | {f"PCA scale={s}": dict(init="pca", scale=s) for s in (0.5, 0.7, 1.0)}
    | {"target 0-0.5": dict(low=0.0, high=0.5), "fixed 3": dict(stop="fixed", steps=3),
       "tau=1.3 w=10.0": dict(tau=1.3, w=10.0)}  # samples are kept by position: new ones go last
    | {f"rank={rank}": dict(rank=rank) for rank in (4, 16)}
    | {f"retained={share}": dict(retained=share) for share in (0.5, 0.9)}
    | {"w=30.0": dict(w=30.0)}
    | {f"target {low}-{high}": dict(low=low, high=high) for low, high in TARGETS[:2] + TARGETS[3:]},
}
JUDGES = {"own": extractor_for, "lite0": lambda dataset: lite0(),
          "inception": lambda dataset: inception()}
PICTURES = {"recipe": ("ECCV'24, eta 0.8, 20 steps", "local PCA, quantile stop",
                       "local PCA, tau .7, quantile stop"),
            "cifar10": ("noise, 60 steps", "PCA as published, 20 steps", "PCA, scale 1, 20 steps",
                        "local PCA, tau .7, 20 steps", "local PCA, quantile stop")}

BETWEEN = {"between two of one class": (7, 17), "between two classes": (7, 9)}  # by their numbers


def classifier(name: str, seed: int, dataset: Dataset, files: dict[str, str]):
    """(model, what a record says of it): a given file, or one row of MODELS, trained once."""
    device = dataset.train.images.device
    if name in files:
        model = load_model(files[name], classes=len(dataset.classes), device=device)
        return model, dict(training=load_checkpoint(files[name])["config"])
    options = TRAINING | pick("model", name, MODELS) | dict(seed=seed)
    run = train(TrainConfig.make("fashion_mini", **options), dataset, verbose=False)
    accuracies = {metric: run.final["last"][metric] for metric in ("clean", "pgd")}
    return run.model(device=device), dict(test=accuracies, training=run.config["train"])


def measure(file: Path, part: str, dataset: Dataset, models: list[str], files: dict[str, str],
            seeds: int, n: int, reference: str, judges: list[Extractor], keep: Path) -> dict:
    """The record ``file``: all rows of a part, every model and seed. Samples are kept and found
    again, and so is what the file holds of the same settings, judges and classifiers."""
    settings = pick("part", part, PARTS)
    record: dict[str, Any] = dict(part=part, n=n, reference=reference, settings=settings)
    lists = {key: [] for key in ("protocols", "rows", "per_class", "chains")}
    old, who = read_json(file) if file.is_file() else {}, [judge.sha256 for judge in judges]
    if all(old.get(key) == value for key, value in record.items()) and all(
            [judge["sha256"] for judge in told["judges"]] == who for told in old["protocols"]):
        lists = {key: old[key] for key in lists}
    env = environment(dataset.train.images.device, "fp32", "the precision of the weights")
    done = [(told["model"], told["seed"], told["model_sha256"]) for told in lists["protocols"]]
    for name, seed in ((name, seed) for name in models for seed in range(seeds)):
        model, origin = classifier(name, seed, dataset, files)
        if (name, seed, state_hash(model.state_dict())) in done:
            continue
        began, tag = time.perf_counter(), dict(model=name, seed=seed)
        place = keep / dataset.name / f"{name}-s{seed}-{n}"
        sets = {key: generate(model, dataset, n, seed=seed, folder=place / part / f"{i:02d}",
                              verbose=False, **s) for i, (key, s) in enumerate(settings.items())}
        table = metrics_table(sets, dataset, judges, reference)
        made = table.protocol.pop("samples")
        sha256 = dict(model_sha256=next(iter(made.values()))["model_sha256"])
        lists["protocols"].append(table.protocol | tag | sha256 | origin | dict(env=env))
        for key, rows in (("rows", table.overall), ("per_class", table.per_class)):
            lists[key] += [tag | row for row in rows.reset_index().to_dict("records")]
        lists["chains"] += [tag | dict(images=key) | s.statistics() for key, s in sets.items()]
        write_json(file, record | lists)
        seconds = time.perf_counter() - began
        print(f"{part}, {name}, seed {seed}: {seconds:.0f} s", flush=True)
    return record | lists


def pictures(part: str, dataset: Dataset, name: str, files: dict[str, str], file: Path) -> None:
    """The first starts and results of some settings, and of chains between two local starts, of one
    class and of two; one classifier with seed 0, for grids."""
    n = 100 if dataset.channels == 1 else 50  # colour takes room
    model, _ = classifier(name, 0, dataset, files)
    arrays = {}
    for setting in PICTURES[part]:
        s = generate(model, dataset, n, seed=0, **PARTS[part][setting])
        arrays |= {f"{setting}: x0 only": s.x0, setting: s.images, "labels": s.labels}
    job = prepare(model, dataset, n=n, seed=0)
    for word, pair in BETWEEN.items():
        path = job.between(*pair)
        arrays |= {f"{word}: x0 only": quantise(path.x0).cpu(), word: quantise(path.x).cpu()}
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: tensor.numpy() for key, tensor in arrays.items()}
    np.savez_compressed(file, **arrays)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="grid,start,dial,recipe")
    parser.add_argument("--models", default="SAT,standard", help=f"of: {', '.join(MODELS)}")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FILE",
                        help="a classifier of your own; repeatable")
    parser.add_argument("--dataset", default="fashion_mini")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--reference", default="test", choices=("test", "train"))
    parser.add_argument("--judges", default="own", help=f"of: {', '.join(JUDGES)}")
    parser.add_argument("--out", type=Path, help="default: figures/records/generation_<dataset>")
    parser.add_argument("--keep", type=Path, default=home() / "generation",
                        help="where samples lie, so that an interrupted run goes on")
    parser.add_argument("--suffix", default="", help="added to names of files, for other models")
    parser.add_argument("--pictures", action="store_true", help="keep images of three settings")
    options = parser.parse_args(argv)
    files = dict(pair.split("=", 1) for pair in options.checkpoint)
    models = list(files) or options.models.split(",")
    if not files and options.dataset != "fashion_mini":
        parser.error("only fashion_mini has classifiers here: give --checkpoint NAME=FILE")
    dataset = load_dataset(options.dataset, options.data_dir, choose_device())
    out = options.out or records_folder() / f"generation_{dataset.name}"
    judges = [pick("judge", name, JUDGES)(dataset) for name in options.judges.split(",")]
    parts = [part for part in options.parts.split(",") if part]
    if options.pictures:
        part = "cifar10" if dataset.name == "cifar10" else "recipe"
        pictures(part, dataset, models[0], files, out / f"pictures{options.suffix}.npz")
    for part in parts:
        record = measure(out / f"{part}{options.suffix}.json", part, dataset, models, files,
                         options.seeds, options.n, options.reference, judges, options.keep)
        print(generation_summary(record).round(2).to_string(), flush=True)


if __name__ == "__main__":
    main()
