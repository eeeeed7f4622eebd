"""Trainings at toy size that are killed again and again: `python -m tests.survivor FOLDER`.

Every attempt is a fork of this process, so torch is imported once.
"""

import os
import random
import signal
import sys
import traceback
from pathlib import Path

import torch

from derkit import util
from derkit.checkpoint import load_checkpoint, load_state
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.records import read_lines
from derkit.training import loop, monitor
from tests.conftest import SMALL

# Where a training can die: a function, and the module in which it is looked up.
POINTS = {
    "train_step": loop, "save_checkpoint": loop, "save_state": loop, "write_lines": loop,
    "epoch_evaluation": monitor, "final_evaluation": monitor, "write_json": util,
    "replace": os, "fsync": os,
}  # fmt: skip


def plain(value):
    """Values that can be compared whole, tensors by their bytes, times left out."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.numpy().tobytes()
    if isinstance(value, dict):
        timing = ("seconds", "images_per_s")
        return {name: plain(part) for name, part in value.items() if name not in timing}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else repr(value)


def record(folder: Path):
    """What a run leaves behind and what must not depend on how often it was killed."""
    tables = [util.read_json(folder / name) for name in ("config.json", "final.json")]
    weights = [load_checkpoint(folder / f"{which}.safetensors") for which in ("best", "final")]
    return plain([*tables, *weights, load_state(folder / "last.pt"),
                  read_lines(folder / "metrics.jsonl")])


def arm(owner, where: str, call: int, moment: str) -> None:
    """Kill this process at the n-th call of a function: 'before' it, 'after', or 'torn'."""
    original, left = getattr(owner, where), [call]

    def armed(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and where == "fsync" and moment == "torn":  # half of it is written
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        if left[0] or moment == "after":
            out = original(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, where, armed)


def attempt(work, folder: Path, *kill) -> int:
    """Exit status of a fork that works in the folder: 0, or -9 where it was killed (`arm`)."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if kill:
            arm(*kill)
        work(folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(root: Path) -> None:
    """Kill trainings, at most four times each, let them finish, compare with an undisturbed one."""
    torch.set_num_threads(1)
    data, config = load_dataset(train_size=64), TrainConfig.make(**SMALL | dict(epochs=3))

    def work(folder):
        loop.train(config, data, folder=folder, verbose=False)

    work(root / "whole")
    expected, deaths, rng = record(root / "whole"), 0, random.Random(0)
    kills = [(where, moment) for where in POINTS for moment in ("before", "after")]
    kills += [("fsync", "torn")] * 6
    rng.shuffle(kills)
    for i in range(0, len(kills), 4):
        folder = root / str(i)
        for where, moment in kills[i : i + 4]:
            status = attempt(work, folder, POINTS[where], where, rng.randint(1, 3), moment)
            assert status in (0, -signal.SIGKILL), (where, moment)
            deaths += status != 0
        assert attempt(work, folder) == 0 and record(folder) == expected, kills[i : i + 4]
        assert not list(folder.glob(".*.tmp")), "what a killed writer left is removed"
    assert deaths >= 12, deaths
    print(f"survived {deaths} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
