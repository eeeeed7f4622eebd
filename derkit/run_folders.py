"""The folder of a run: its name, whose run it holds, who writes to it, and what a new or resumed run finds in it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Any

from torch import nn

from derkit.checkpoint import load_checkpoint
from derkit.config import TrainConfig
from derkit.data import Dataset
from derkit.errors import DerkitError
from derkit.records import Run, disk_errors, keep_epochs, lock_folder, remove_temporary, runs_folder, write_json


def signature_of(model: nn.Module | None) -> str:
    """What tells a user's modules apart, which the config only calls 'custom': their layers, names and shapes."""
    if model is None:
        return ""
    shapes = [(k, tuple(v.shape)) for k, v in model.state_dict().items()]
    return hashlib.sha256(f"{model!r} {shapes}".encode()).hexdigest()[:16]


def run_folder(config: TrainConfig, dataset: Dataset, model: nn.Module | None = None) -> Path:
    """$DERKIT_HOME/runs/<readable name>-<hash of config, data and, if it is the user's own, model>."""
    parts = [dataset.name, config.method, config.regularizer if config.regularizer != "none" else "",
             config.variant if config.regularizer == "der" else "", f"eps{config.eps:.4g}", f"s{config.seed}"]
    return runs_folder() / "-".join([*filter(None, parts), config.hash(dataset.sha256 + signature_of(model))])


def refuse_other_run(folder: Path, config: TrainConfig, dataset: Dataset, model: nn.Module | None) -> None:
    """Raise DerkitError where the folder holds a run of another config, other data or another model."""
    found = Run(folder).config
    try:
        same = {"another config": TrainConfig(**found["train"]).hash() == config.hash(),
                "other data": found["data_sha256"] == dataset.sha256,
                "another model": found.get("model", "") == signature_of(model)}
    except (KeyError, TypeError) as error:  # not written by this kit, or by another version of it
        raise DerkitError(f"{folder / 'config.json'} is not the config of a run ({error}). Choose another folder, or "
                          "resume=False to replace it.") from error
    for what in (w for w, equal in same.items() if not equal):
        raise DerkitError(f"{folder} holds a run of {what}. Choose another folder, or resume=False to replace it.")


def is_finished(folder: Path, config: TrainConfig, dataset: Dataset, model: nn.Module | None, resume: bool) -> bool:
    """Is there a finished run to load? Raises DerkitError where the folder holds another run; ``resume`` false: never."""
    if resume and ((folder / "final.json").is_file() or (folder / "last.pt").is_file()):
        refuse_other_run(folder, config, dataset, model)
    return resume and (folder / "final.json").is_file()


def hold(folder: Path) -> IO[str]:
    """Make the folder and hold it against other processes, until what is returned is closed."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return lock_folder(folder)


def open_run(folder: Path, epoch: int, dataset: Dataset, config: TrainConfig, signature: str, env: dict[str, Any]) -> None:
    """Remove what the checkpoint does not know, and write what the run depends on."""
    with disk_errors(folder):
        remove_temporary(folder)
        if epoch:
            keep_epochs(folder / "metrics.jsonl", epoch)
        else:
            for old in ("metrics.jsonl", "final.json", "last.pt", "best.pt", "final.pt"):
                (folder / old).unlink(missing_ok=True)
        sizes = dict(train=len(dataset.train), valid=len(dataset.valid), test=len(dataset.test))
        write_json(folder / "config.json", dict(train=config.as_dict(), dataset=dataset.name, source=dataset.source,
                                                data_sha256=dataset.sha256, sizes=sizes, classes=dataset.classes, model=signature))
        write_json(folder / "env.json", env)


def last_good(folder: Path) -> str:
    """What a run that stopped on NaN has left, in words."""
    if not (folder / "last.pt").is_file():
        return "No checkpoint was written before."
    return f"The last good one is {folder / 'last.pt'} (epoch {load_checkpoint(folder / 'last.pt')['epoch']})."
