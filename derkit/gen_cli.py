"""``python -m derkit.generation``: generate from a checkpoint into a folder, and measure the result."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from derkit import distributed
from derkit.cli import interrupted, parse_sets
from derkit.config import AUTO, TrainConfig
from derkit.data_sources import home
from derkit.errors import CheckpointError, DerkitError
from derkit.gen_config import GenerateConfig, help_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m derkit.generation", epilog=help_text(),
                                     description="Images from a classifier read as an energy-based model.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="final.pt or best.pt of a training run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one field; repeatable")
    parser.add_argument("--folder", help="where the shards go; default: DERKIT_HOME/generated/<name>-<hash>")
    parser.add_argument("--fresh", action="store_true", help="replace what the folder holds")
    parser.add_argument("--part", metavar="I/N", help="make every N-th shard only, the I-th (from 1); torchrun sets it")
    parser.add_argument("--dataset", help="default: the data that the checkpoint was trained on")
    parser.add_argument("--data-dir", help="where to look for the data")
    parser.add_argument("--device", default=AUTO, help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--measure", action="store_true", help="print the metrics table afterwards (derkit[eval])")
    parser.add_argument("--inception", metavar="FILE", help="Inception weights for IS, FID and KID in the table")
    return parser


def _load(options: argparse.Namespace):
    """(model, dataset, extractor or None) of the command line: what the metrics will lack is said before the work."""
    from derkit.checkpoint import load_checkpoint, load_model
    from derkit.data import load_dataset
    from derkit.device import choose_device
    from derkit.progress import progress

    device = choose_device(options.device)
    content = load_checkpoint(options.checkpoint)
    try:
        trained = TrainConfig(**content["config"])
    except TypeError as error:
        raise CheckpointError(f"{options.checkpoint} has no training config of this kit ({error}).") from error
    same = options.dataset in (None, trained.dataset)
    sizes = dict(train_size=trained.train_size if same else 0, valid_size=trained.valid_size,
                 image_size=trained.image_size or None)
    dataset = load_dataset(options.dataset or trained.dataset, options.data_dir or trained.data_dir or None, device,
                           download=trained.download, progress=progress, **sizes)
    model = load_model(options.checkpoint, classes=len(dataset.classes), device=device)
    return model, dataset, _extractor(options, dataset) if options.measure or options.inception else None


def _extractor(options: argparse.Namespace, dataset):
    from derkit.extractor import extractor_for
    from derkit.inception import inception

    return inception(options.inception, required=True) if options.inception else extractor_for(dataset)


def _part(text: str | None) -> tuple[int, int]:
    """'2/4' -> (2, 4); without it the process's place under torchrun, (1, 1) without that."""
    rank, world = distributed.launched()
    if not text:
        return rank + 1, world
    if world > 1:
        raise DerkitError("torchrun splits the work already: leave out --part, or start the parts without torchrun.")
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit()):
        raise DerkitError(f"--part is I/N such as 1/4, found {text!r}.")
    return int(i), int(n)


def main(argv: list[str] | None = None) -> int:
    """Generate, print where the images are and what they look like in numbers. Returns the exit status (2: bad
    input)."""
    options = _parser().parse_args(argv)
    try:
        config, part = GenerateConfig.make(**parse_sets(options.set)), _part(options.part)
        with distributed.processes():
            model, dataset, extractor = distributed.in_turn(partial(_load, options))
            folder = Path(options.folder) if options.folder else _default_folder(config, model, dataset)
            # a process that fails tells the others when they are done: their shards are kept, and one error is printed
            samples = distributed.everywhere(partial(_generate, model, dataset, config, folder, options.fresh, part))
            if distributed.world() > 1:  # all parts are done by now, and process 0 reports
                samples = _all(folder) if distributed.rank() == 0 else None
            if samples is not None and len(samples) == config.n:  # else another part, started by hand, ends last
                _report(samples, dataset, extractor, folder)
    except DerkitError as error:
        distributed.report(error)
        return 2
    except KeyboardInterrupt:
        return interrupted()
    return 0


def _default_folder(config: GenerateConfig, model, dataset) -> Path:
    from derkit.checkpoint import state_hash

    key = config.hash(state_hash(model.state_dict()), dataset.sha256)
    return home() / "generated" / f"{dataset.name}-{config.init}-{config.stop}-n{config.n}-s{config.seed}-{key}"


def _generate(model, dataset, config: GenerateConfig, folder: Path, fresh: bool, part: tuple[int, int]):
    from derkit.generation import generate

    return generate(model, dataset, config=config, folder=folder, fresh=fresh, part=part)


def _all(folder: Path):
    from derkit.samples import load_samples

    return load_samples(folder)


def _report(samples, dataset, extractor, folder: Path) -> None:
    """Where the samples are, their statistics and, if asked for, the metrics table."""
    from derkit.metrics import metrics_table

    print(f"samples: {folder}")
    print(json.dumps({k: v for k, v in samples.record.items() if isinstance(v, int | float) and k != "seed"}, indent=1))
    if extractor:
        print(metrics_table({"samples": samples}, dataset, extractor).overall.round(3).to_string())
