"""What test_distributed.py starts: `python -m torch.distributed.run tests/workers.py CASES FOLDER`.

CASES is JSON: {name: fields of the config, and 'mode': what goes wrong}. Each is trained in
FOLDER/name on 51 bundled images; an error that all processes share is printed by each.
"""

import json
import os
import sys
from pathlib import Path

import torch

from derkit import util
from derkit.config import TrainConfig
from derkit.data import load_dataset
from derkit.training import loop
from tests.conftest import SMALL

TOY = SMALL | dict(method="fgsm", batch_norm=False, batch_size=25, precision="fp64", lr=0.05)
train_step, train_epoch = loop.train_step, loop.train_epoch


def main(cases, folder):
    torch.set_num_threads(1)
    mode = ""

    def step(*args, **options):
        """Process 1 alone fails: by an error, or by a loss of NaN."""
        total, statistics = train_step(*args, **options)
        if util.rank() == 1 and mode == "raise":
            raise RuntimeError("process 1 has had enough")
        if util.rank() == 1 and mode == "nan":
            statistics["loss"] = statistics["loss"] * torch.nan
        return total, statistics

    def epoch(state, dataset, bar):
        if mode == "half" and state.epoch == 1:
            raise util.DerkitError("stopped half-way")
        return train_epoch(state, dataset, bar)

    loop.train_step, loop.train_epoch = step, epoch
    data = load_dataset(train_size=51)
    with util.processes():
        for name, fields in json.loads(cases).items():
            mode = fields.pop("mode", "")
            config = TrainConfig.make("fashion_mini", **TOY | fields)
            try:
                loop.train(config, data, folder=Path(folder) / name, verbose=False)
            except (util.DerkitError, FloatingPointError) as error:
                os.write(1, f"{name}, process {util.rank()}: {error}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
