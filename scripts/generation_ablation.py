"""Which part of the generator does what? Init x stop, k and tau, guidance and target, on the bundled data, several
seeds.

    python scripts/generation_ablation.py                                          # 3 seeds, every part
    python scripts/generation_ablation.py --parts recipe --models "TRADES,SAT + DER" --suffix _models
    python scripts/generation_ablation.py --seeds 1 --n 200 --parts grid --out /tmp/try    # a quick look
    python scripts/generation_ablation.py --dataset cifar10 --n 10000 --checkpoint SAT=RUN/final.pt \\
        --checkpoint "SAT + DER=RUN/final.pt" --out figures/records/generation_cifar10     # classifiers of your own

Seed s stands for the classifier trained with seed s and for the samples drawn with seed s; with --checkpoint the
classifier is that file for every seed. The data needs its extractor: scripts/train_extractor.py. Writes one JSON file a
part (grid, start, dial, recipe) with all rows, per-class values and the protocol into
figures/records/generation_fashion_mini/. """

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from derkit.checkpoint import load_checkpoint, load_model
from derkit.config import TrainConfig
from derkit.data import Dataset, load_dataset
from derkit.device import choose_device
from derkit.extractor import extractor_for
from derkit.gen_results import generation_summary
from derkit.generation import generate
from derkit.metrics import metrics_table
from derkit.records import write_json
from derkit.training import train

OUT = Path(__file__).resolve().parents[1] / "figures" / "records" / "generation_fashion_mini"
TRAINING = dict(width=16, precision="fp32", epochs=12, train_size=0, eps=0.1)
DER = dict(regularizer="der")  # the default variant, our reading
MODELS = {"SAT": dict(method="pgd", steps=5), "standard": dict(method="standard", strong_size=0),
          "TRADES": dict(method="trades", steps=5), "SAT + DER": dict(method="pgd", steps=5) | DER,
          "RS-FGSM": dict(method="rs_fgsm"), "RS-FGSM + DER": dict(method="rs_fgsm") | DER}
INITS = {"uniform": dict(init="uniform"), "class Gaussian": dict(init="class_gaussian"),
         "PCA as published": dict(init="pca_published"), "PCA, scale 1": dict(init="pca"),
         "local PCA": dict(init="local_pca"), "noisy images": dict(init="noisy_images")}
STOPS = {"fixed 4": dict(stop="fixed", steps=4), "fixed 20": dict(stop="fixed", steps=20), "mean band": dict(stop="mean_band"),
         "quantile": dict(stop="quantile")}
ECCV24 = dict(init="pca_published", rule="plain", momentum=0.0, stop="fixed")

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "grid": {f"{i} | {s}": a | b for i, a in INITS.items() for s, b in STOPS.items()},
    "start": {f"k={k} tau={tau}": dict(init="local_pca", k=k, tau=tau)
              for k in (4, 32, 128) for tau in (0.0, 0.4, 0.7, 1.0)}
    | {f"PCA scale={s}": dict(init="pca", scale=s) for s in (0.354, 0.7, 1.0)},
    "dial": {f"w={w}": dict(tau=0.7, w=w) for w in (0.0, 1.0, 2.0, 5.0)}
    | {f"target {low}-{high}": dict(tau=0.7, low=low, high=high)
       for low, high in ((0.25, 0.75), (0.0, 1.0), (0.0, 0.5), (0.0, 0.25), (0.0, 0.05))}
    | {f"fixed {n}": dict(tau=0.7, stop="fixed", steps=n) for n in (1, 2, 4, 8, 16, 32)},
    # the published recipe at every step size and length that its code names and that fits, so that it is tuned too
    "recipe": {f"ECCV'24, eta {eta}, {steps} steps": ECCV24 | dict(eta=eta, steps=steps)
               for eta, steps in ((0.05, 20), (0.05, 50), (0.2, 20), (0.2, 50), (0.8, 20), (0.8, 50))}
    | {"ECCV'24, eta 0.2, momentum 0.8": ECCV24 | dict(eta=0.2, momentum=0.8, steps=20),
       "ECCV'24, eta 0.2, mean band": ECCV24 | dict(eta=0.2, steps=50, stop="mean_band"),
       "local PCA, quantile stop": dict(), "local PCA, tau .7, quantile stop": dict(tau=0.7),
       "local PCA, tau .7, w 2, quantile stop": dict(tau=0.7, w=2.0)},
}


PICTURES = ("ECCV'24, eta 0.8, 20 steps", "local PCA, quantile stop", "local PCA, tau .7, quantile stop")


def classifier(name: str, seed: int, dataset: Dataset, files: dict[str, str]):
    """(model, what a record says of it): a file that was given, or one row of MODELS, trained once."""
    device = dataset.train.images.device
    if name in files:
        return load_model(files[name], classes=len(dataset.classes), device=device), dict(training=load_checkpoint(files[name])["config"])
    run = train(TrainConfig.make("fashion_mini", **TRAINING | MODELS[name] | dict(seed=seed)), dataset, verbose=False)
    accuracy = {k: run.final["last"][k] for k in ("clean", "pgd")}
    model = load_model(run.folder / "final.pt", classes=len(dataset.classes), device=device)
    return model, dict(test=accuracy, training=run.config["train"])


def measure(part: str, dataset: Dataset, models: list[str], files: dict[str, str], seeds: int, n: int, reference: str) -> dict[str, Any]:
    """All rows of a part, every model and seed."""
    extractor = extractor_for(dataset)
    rows, per_class, protocols, used = [], [], [], []
    for name in models:
        for seed in range(seeds):
            model, origin = classifier(name, seed, dataset, files)
            began = time.perf_counter()
            sets = {k: generate(model, dataset, n, seed=seed, **settings) for k, settings in PARTS[part].items()}
            table = metrics_table(sets, dataset, extractor, reference)
            tag = dict(model=name, seed=seed)
            record = table.record()
            rows += [tag | r for r in record["overall"]]
            per_class += [tag | r for r in record["per_class"]]
            for key, s in sets.items():
                used.append(tag | dict(images=key) | s.statistics())
            used_by_all = {k: v for k, v in record["protocol"].items() if k != "samples"}
            protocols.append(used_by_all | tag | dict(model_sha256=next(iter(sets.values())).record["model_sha256"]) | origin)
            print(f"{part}, {name}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    return dict(part=part, n=n, reference=reference, settings=PARTS[part], protocols=protocols, rows=rows,
                per_class=per_class, chains=used)


def pictures(dataset: Dataset, files: dict[str, str], out: Path, n: int = 100) -> None:
    """The first n starts and results of three settings, SAT with seed 0: what the sample grids are drawn from."""
    model, _ = classifier("SAT", 0, dataset, files)
    arrays = {}
    for name, settings in {k: PARTS["recipe"][k] for k in PICTURES}.items():
        s = generate(model, dataset, n, seed=0, **settings)
        arrays |= {f"{name}: x0 only": s.x0.numpy(), name: s.images.numpy(), "labels": s.labels.numpy()}
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "pictures.npz", **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default="SAT,standard", help=f"of: {', '.join(MODELS)}")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FILE", help="a classifier of your own; repeatable")
    parser.add_argument("--dataset", default="fashion_mini")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--reference", default="test", choices=("test", "train"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--suffix", default="", help="added to the name of the file, for other models")
    parser.add_argument("--pictures", action="store_true", help="also keep the first 100 images of three settings")
    options = parser.parse_args()
    files = dict(pair.split("=", 1) for pair in options.checkpoint)
    models = list(files) or options.models.split(",")
    if not files and options.dataset != "fashion_mini":
        parser.error("classifiers are trained here on fashion_mini only: give --checkpoint NAME=FILE")
    dataset = load_dataset(options.dataset, options.data_dir, choose_device())
    if options.pictures:
        pictures(dataset, files, options.out)
    for part in filter(None, options.parts.split(",")):
        name = f"{part}{options.suffix}.json"
        record = measure(part, dataset, models, files, options.seeds, options.n, options.reference)
        write_json(options.out / name, record)
        print(generation_summary(record).round(2).to_string(), flush=True)


if __name__ == "__main__":
    main()
