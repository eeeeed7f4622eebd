"""A process that forks children which train or generate at toy size and are killed at a given moment.

Started once by test_survival.py: torch is imported once, every child begins without a trace of the others. It reads one
JSON request a line, {"task", "folder", "kill"}, and answers with the child's exit status ("-9": killed).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from derkit import generation, training
from derkit.config import TrainConfig
from derkit.data import load_dataset

CONFIG = dict(
    width=4, train_size=0, epochs=3, batch_size=32, steps=2, eval_steps=2, eval_size=16, probe_size=8, final_size=16,
    final_steps=2, strong_size=8, device="cpu", precision="fp32", eps=0.1, save_every=1,
)  # fmt: skip
GENERATE = dict(shard_size=20, init="local_pca", k=8, steps=3, stop="fixed", n=80)
# Where a child can die, for each task: a function and where it is looked up. 'torn' leaves half of what it wrote.
POINTS = {
    "train": ["training.train_step", "training.epoch_evaluation", "training.final_evaluation", "training.append_line",
              "training.save_checkpoint", "training.write_json", "run_folders.write_json", "run_folders.keep_epochs",
              "records.os.replace", "records.os.fsync"],
    "generate": ["generation._range", "generation.append_line", "samples.atomic_write", "generation.write_json",
                 "records.os.replace", "records.os.fsync", "fits.cached"],
}  # fmt: skip


def data():
    """A few bundled images: 40 of each class to generate from, 64 to train on."""
    mini = load_dataset()
    index = torch.cat([(mini.train.labels == c).nonzero().squeeze(1)[:40] for c in range(10)])
    some = replace(mini, train=mini.train.take(index), sha256="some")
    parts = dict(train=mini.train.take(slice(64)), valid=mini.valid.take(slice(32)), test=mini.test.take(slice(32)))
    return dict(train=replace(mini, **parts, sha256="tiny"), generate=some)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str, call: int, moment: str) -> None:
    """Kill this process at the n-th call of a function: 'before', 'after', or with its write 'torn'."""
    module, _, name = where.rpartition(".")
    owner = importlib.import_module(f"derkit.{module.split('.')[0]}")
    for part in module.split(".")[1:]:
        owner = getattr(owner, part)
    original, left = getattr(owner, name), [call]

    def armed(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and moment == "before":
            die()
        if left[0] == 0 and moment == "torn" and name == "fsync":
            os.ftruncate(args[0], os.fstat(args[0]).st_size - os.fstat(args[0]).st_size // 3 - 1)
            die()
        out = original(*args, **kwargs)
        if left[0] == 0:
            die()
        return out

    setattr(owner, name, armed)


def work(task: str, folder: str, datasets: dict) -> None:
    os.environ["DERKIT_HOME"] = str(Path(folder).parent / "home")
    if task == "train":
        training.train(TrainConfig.make("fashion_mini", **CONFIG), datasets["train"], folder=folder, verbose=False)
    else:
        config = TrainConfig.make("fashion_mini", **CONFIG, seed=5)
        model = training.model_from_config(config, datasets["generate"]).eval()
        generation.generate(model, datasets["generate"], folder=folder, verbose=False, **GENERATE)


def main() -> None:
    torch.set_num_threads(1)
    datasets = data()
    with tempfile.TemporaryDirectory() as name:  # whatever is imported or set up on first use: once, not in every child
        for task in POINTS:
            work(task, f"{name}/{task}", datasets)
    for line in sys.stdin:
        request = json.loads(line)
        kill, began = request["kill"], time.monotonic()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if "where" in kill:
                    arm(kill["where"], kill["call"], kill["moment"])
                work(request["task"], request["folder"], datasets)
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if "delay" in kill:
            while time.monotonic() - began < kill["delay"] and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
