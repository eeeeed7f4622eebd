"""Adversarial training with DER, evaluation, generation, tables of results. Each has a --help.

    derkit train --preset cifar10 --method fgsm --eps 8/255 --seed 3
    derkit evaluate --checkpoint RUN/final.safetensors --eps 8/255 --autoattack 1000
    derkit generate --checkpoint RUN/final.safetensors --n 5000 --folder DIR --measure
    derkit results FOLDER --csv table.csv
    torchrun --nproc-per-node 4 -m -- derkit train --preset rice2020
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import tyro

from derkit import util
from derkit.checkpoint import load_checkpoint, load_model, state_hash
from derkit.config import PRESETS, Config, GenerateConfig, TrainConfig
from derkit.data import load_dataset
from derkit.diagnosis.evaluation import check_autoattack
from derkit.diagnosis.overfitting import summary
from derkit.generation.extractor import extractor_for, inception
from derkit.generation.generate import generate, load_samples
from derkit.generation.metrics import metrics_table
from derkit.records import grid
from derkit.training.loop import train
from derkit.training.monitor import final_evaluation
from derkit.util import DerkitError

SOURCE = dict(checkpoint="a run's final.safetensors or best.safetensors", data_dir="of the data",
              dataset="default: that of the training", device="default: auto; cpu, cuda, cuda:1")
FLAGS = dict(  # what the commands take beside the fields of a config
    train=dict(preset=f"{', '.join(PRESETS)}; default: the data set's", fresh="train anew",
               folder="default: DERKIT_HOME/runs/<name>-<hash>"),
    evaluate=SOURCE | dict(eps="radius, such as 8/255; default: that of the training",
                           images="for clean, FGSM and PGD; 0: all; default: 1000",
                           strong="images of the strong evaluation; default: 200",
                           pgd50="images of PGD-50-10", autoattack="images of AutoAttack"),
    generate=SOURCE | dict(folder="default: DERKIT_HOME/generated/<name>-<hash>",
                           fresh="replace what the folder holds", inception="weights: IS, FID, KID",
                           part="I/N: every N-th shard, from the I-th on; torchrun sets it",
                           measure="print the metrics table afterwards (derkit[eval])"),
    results=dict(which="epoch: last or best; default: last", csv="write the table there"))


def row(name: str, help: str, kind: Any = str) -> tuple:
    """A flag for tyro. It takes all words up to the next flag as text, which is checked later."""
    help = tyro.conf.arg(help=help, help_behavior_hint="")
    if name in ("fresh", "measure"):
        return name, Annotated[bool, tyro.conf.FlagCreatePairsOff, help], False
    choices = "|".join(choice for choice in get_args(kind) if isinstance(choice, str))
    words = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*", metavar=choices or getattr(kind, "__name__", "value").upper(),
        instance_from_str=" ".join, is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)])
    return name, Annotated[Any, words, help], None


def read_flags(command: str, argv: Sequence[str], config: Config | None = None) -> list[dict]:
    """The given flags of the command, and of the config, whose values are the defaults."""
    fields = type(config).model_fields if config else {}
    rows = [row(name, help) for name, help in FLAGS[command].items()]
    rows += [row(name, f"{field.description} (default: {getattr(config, name)})", field.annotation)
             for name, field in fields.items()]
    found, rest = tyro.cli(make_dataclass("Flags", rows), args=argv, prog=f"derkit {command}",
                           description=COMMANDS[command].__doc__, return_unknown_args=True)
    if rest:
        names = [f"--{name.replace('_', '-')}" for name, *_ in rows]
        hint = util.nearest(rest[0].partition("=")[0], names)
        raise DerkitError(f"unknown flag {rest[0]!r}.{hint} See derkit {command} --help.")
    given = {name: text for name, text in vars(found).items() if text not in (None, False)}
    return [{k: v for k, v in given.items() if k in names} for names in (FLAGS[command], fields)]


def load(flags: dict[str, str]) -> tuple:
    """(model, data set, config of the training, {} where there is none) of a checkpoint."""
    if not flags.get("checkpoint"):
        raise DerkitError("--checkpoint FILE is missing: final.safetensors of a run.")
    file, device = flags["checkpoint"], util.choose_device(flags.get("device", util.AUTO))
    found = load_checkpoint(file)["config"]
    name = flags.get("dataset") or found.get("dataset")
    if not name:
        raise DerkitError(f"{file} names no data set: add --dataset NAME.")
    trained = TrainConfig.read(found)
    folder, size = flags.get("data_dir") or trained.data_dir or None, trained.train_size
    dataset = load_dataset(
        name, folder, device, train_size=size if name == trained.dataset else 0,
        download=trained.download, valid_size=trained.valid_size, image_size=trained.image_size)
    return load_model(file, classes=len(dataset.classes), device=device), dataset, found


def run_train(argv: Sequence[str]) -> None:
    """Train, evaluate and record a run; a finished one is loaded. Presets change the defaults."""
    flags, fields = read_flags("train", argv, TrainConfig.make())
    config = TrainConfig.make(flags.get("preset"), **fields)
    run = train(config, folder=flags.get("folder"), resume="fresh" not in flags)
    if util.rank() == 0:
        print(f"run folder: {run.folder}\n{json.dumps(run.final, indent=1)}")


def run_evaluate(argv: Sequence[str]) -> None:
    """Accuracies of a checkpoint on test images, as JSON."""
    flags, _ = read_flags("evaluate", argv)
    model, dataset, found = load(flags)
    if "eps" not in found | flags:
        raise DerkitError(f"{flags['checkpoint']} names no radius: add --eps, such as 8/255.")
    if next(model.parameters()).dtype != torch.float64:
        model.float()  # files may hold half precision, in which attacks lose small gradients
    trained = TrainConfig.read(found)
    config = trained.change(
        eps=flags.get("eps", trained.eps), alpha=util.AUTO, final_size=flags.get("images", 1000),
        strong_size=flags.get("strong", 200), pgd50_size=flags.get("pgd50", 0),
        autoattack_size=flags.get("autoattack", 0))
    if config.autoattack_size:
        check_autoattack(config.eps, len(dataset.classes))
    found = {"eps": config.eps, "norm": config.norm} | final_evaluation(model, dataset, config)
    print(json.dumps(found, indent=1))


def run_generate(argv: Sequence[str]) -> None:
    """Images from a classifier read as an energy-based model, into a folder."""
    flags, fields = read_flags("generate", argv, GenerateConfig())
    config, (place, count) = GenerateConfig(**fields), util.launched()
    i, _, n = flags.get("part", f"{place + 1}/{count}").partition("/")
    if not (i.isdecimal() and n.isdecimal()) or ("part" in flags and count > 1):
        raise DerkitError(f"--part is I/N such as 1/4, torchrun sets it: found {flags['part']!r}.")

    def ready() -> tuple:  # what is missing for the metrics is said before the work
        model, dataset, _ = load(flags)
        judge = extractor_for(dataset) if "measure" in flags else None
        return model, dataset, inception(flags["inception"]) if "inception" in flags else judge

    with util.processes():
        model, dataset, judge = util.in_turn(ready)
        key = config.hash(state_hash(model.state_dict()), dataset.sha256)
        name = f"{dataset.name}-{config.init}-{config.stop}-n{config.n}-s{config.seed}-{key}"
        folder = Path(flags.get("folder") or util.home() / "generated" / name)
        job = dict(fresh="fresh" in flags, part=(int(i), int(n)), verbose=util.rank() == 0)
        samples = util.everywhere(
            lambda: generate(model, dataset, config=config, folder=folder, **job))
        if count > 1 and util.rank() == 0:  # all parts are done by now
            samples = load_samples(folder)
    if util.rank() or len(samples) < config.n:  # another part, started by hand, ends last
        return
    numbers = {k: v for k, v in samples.record.items() if type(v) in (int, float) and k != "seed"}
    print(f"samples: {folder}\n{json.dumps(numbers, indent=1)}")
    if judge:
        print(metrics_table({"samples": samples}, dataset, judge).overall.round(3).to_string())


def run_results(argv: Sequence[str]) -> None:
    """results FOLDER: one row per point of a grid, over its seeds."""
    folder, rest = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else (".", argv)
    flags, _ = read_flags("results", rest)
    which = util.pick("epoch", flags.get("which", "last"), dict(last="last", best="best"))
    table = summary(grid(Path(folder)), which)
    if "csv" in flags:
        with util.disk_errors(Path(flags["csv"])):
            table.to_csv(flags["csv"], index_label="run")
    else:
        print(table.round(3).to_string())


COMMANDS = dict(train=run_train, evaluate=run_evaluate, generate=run_generate, results=run_results)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if words[0] in ("-h", "--help"):
            print(__doc__)
        else:
            util.pick("command", words[0], COMMANDS)(words[1:])
    except (DerkitError, FloatingPointError) as error:
        util.report(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished epochs and shards are kept, run it again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
