"""What test_distributed.py starts with torchrun: `python -m torch.distributed.run tests/workers.py CASES FOLDER`.

CASES is JSON: {name: fields of the config, and 'mode': what goes wrong}; each is trained in FOLDER/name on the first 50 bundled images.
"""

import json
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from derkit import distributed, training
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.errors import DerkitError

TOY = dict(width=4, epochs=2, batch_size=24, steps=2, eval_steps=1, eval_size=16, probe_size=8, final_size=16, final_steps=1,
           strong_size=0, device="cpu", precision="fp64", batch_norm=False, lr=0.05, schedule="constant", warmup=0.0)


def data():
    mini = load_dataset()
    parts = {s: getattr(mini, s).take(slice(n)) for s, n in (("train", 50), ("valid", 16), ("test", 16))}
    return replace(mini, **parts, sha256="toy")


def config(fields):
    return TrainConfig.make("fashion_mini", **(TOY | fields))


class Stop(KeyboardInterrupt):
    """As by Ctrl-C, on all processes at the same place."""


def _stop_in_epoch_2(original):
    def epoch(state, *args):
        if state.epoch == 1:
            raise Stop
        return original(state, *args)

    return epoch


def _break_rank_1(original, kind):
    """Process 1 alone fails in its second step."""
    count = iter(range(100))

    def step(*args):
        total, statistics = original(*args)
        if distributed.rank() == 1 and next(count) == 1:
            if kind == "raise":
                raise RuntimeError("process 1 has had enough")
            statistics["loss"] = statistics["loss"] * float("nan")
        return total, statistics

    return step


def _no_space(*args):
    raise OSError(28, "No space left on device")


def fault(mode):
    """What goes wrong in a run: 'half' (interrupted after the first epoch), 'raise', 'nan', 'disk'."""
    if mode == "half":
        return patch.object(training, "_train_epoch", _stop_in_epoch_2(training._train_epoch))
    if mode in ("raise", "nan"):
        return patch.object(training, "train_step", _break_rank_1(training.train_step, mode))
    return patch.object(training, "append_line", _no_space) if mode == "disk" else nullcontext()


def main(cases, folder):
    """Train every case; an error that all processes share is printed by each, and the next case is trained."""
    torch.set_num_threads(1)
    tiny = data()
    with distributed.processes():
        for name, fields in json.loads(cases).items():
            try:
                with suppress(Stop), fault(fields.pop("mode", "")):
                    training.train(config(fields), tiny, folder=Path(folder) / name, verbose=False)
            except (DerkitError, FloatingPointError) as error:
                line = f"{name}, process {distributed.rank()}: {error}\n"
                os.write(1, line.encode())  # in one piece: the processes share the pipe


if __name__ == "__main__":
    main(*sys.argv[1:])
