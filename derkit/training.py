"""Adversarial training: one loop for every method and regulariser, in a notebook and from the shell.

    python -m derkit.training --preset fashion_mini --set method=n_fgsm --set seed=3
    torchrun --nproc-per-node 4 -m derkit.training --preset rice2020 --set device=auto
    python -m derkit.training --help
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from derkit import alarms, distributed, energy, losses, regularizers
from derkit.checkpoint import load_checkpoint, load_model, save_checkpoint
from derkit.config import TrainConfig
from derkit.data import Dataset, load_dataset
from derkit.device import autocast, choose_device, choose_precision, images_format
from derkit.errors import DerkitError, pick
from derkit.evaluation import make_generator
from derkit.models import build_model
from derkit.progress import progress
from derkit.records import (
    Run,
    append_line,
    disk_errors,
    environment,
    lock_folder,
    read_lines,
    write_json,
)
from derkit.reports import check_further, epoch_evaluation, final_evaluation, further_evaluation, missing
from derkit.run_folders import hold, is_finished, last_good, open_run, run_folder, signature_of
from derkit.schedules import SCHEDULES
from derkit.sync_bn import synced_batch_norm


def model_options(config: TrainConfig) -> dict[str, Any]:
    """The options of `build_model` that the config names."""
    own = {"small_cnn": dict(bn=config.batch_norm), "wide_resnet": dict(depth=config.depth),
           "preact_resnet18": dict(shortcut=config.shortcut, final_bn=config.final_bn)}
    return own.get(config.model, {}) | ({"width": config.width} if config.width else {})


def model_from_config(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The model that the config names, with the data set's normaliser inside, initialised from config.seed."""
    stats = dict(mean=dataset.mean, std=dataset.std) if config.normalize else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config.model, dataset.channels, len(dataset.classes), dataset.size, **stats, **model_options(config))


# ---------------------------------------------------------------------------------------------------------- a step
def train_step(step: losses.Step, context=nullcontext, attack_context=nullcontext) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss with graph, statistics (detached, on the device)) of one batch: attack, one forward of all points, loss.

    No value is read back to the host.
    """
    config = step.config
    method = losses.METHODS[config.method]
    with attack_context():
        step.x_adv, _, start = method.attack(step)
    step.x_adv = step.x_adv.detach()
    names: tuple[str, ...] = ("adv", *method.points)
    regularizer = None
    if config.regularizer != "none" and config.strength > 0:
        regularizer = regularizers.REGULARIZERS[config.regularizer]
        names += regularizer.points(config)
    points = regularizers.make_points(step, names)
    with context():
        joined = step.model(torch.cat(list(points.values()))) if len(points) > 1 else step.model(step.x_adv)
        logits = dict(zip(points, joined.split(len(step.x)), strict=True))
        loss = method.loss(logits, step)
        penalty = regularizer.value(logits, step) if regularizer else loss.new_zeros(())
        total = loss + regularizers.strength(step) * penalty if regularizer else loss
    with torch.no_grad():
        adv = energy.upcast(logits["adv"])
        reference = start if start is not None else logits.get("nat")
        aae = adv.new_full((), math.nan) if reference is None else energy.abnormal_mask(reference, adv, step.y).to(adv.dtype).mean()
        statistics = dict(loss=loss.detach(), penalty=penalty.detach(), acc=(adv.argmax(1) == step.y).to(adv.dtype).mean(),
                          aae=aae, E_adv=energy.marginal_energy(adv).mean())
    return total, statistics


# ------------------------------------------------------------------------------------------------------- the run
@dataclass
class _State:
    """Everything that changes in training and is saved to resume."""

    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    regularizer: dict[str, Tensor]
    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0

    @property
    def judged(self) -> nn.Module:
        """The weights that are evaluated and kept: the moving average if there is one."""
        return self.ema.module if self.ema else self.model

    def extra(self) -> dict[str, Any]:
        return dict(epoch=self.epoch, best=self.best, best_epoch=self.best_epoch, optimizer=self.optimizer.state_dict(),
                    scaler=self.scaler.state_dict(), regularizer=self.regularizer,
                    ema=self.ema.state_dict() if self.ema else None)

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["state"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.regularizer.update(saved["regularizer"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"])
        self.epoch, self.best, self.best_epoch = saved["epoch"], saved["best"], saved["best_epoch"]


def _new_state(config: TrainConfig, model: nn.Module, device: torch.device, precision: str) -> _State:
    model.to(device, torch.float64 if precision == "fp64" else torch.float32)
    if config.channels_last:
        model.to(memory_format=images_format(model))
    distributed.spread(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
                                nesterov=False, fused=True if device.type == "cuda" else None)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    return _State(model, ema, optimizer, torch.amp.GradScaler(device.type, enabled=precision == "fp16"), {})


def _train_epoch(state: _State, forward: nn.Module, dataset: Dataset, config: TrainConfig, precision: str) -> dict[str, Any]:
    """One epoch; returns its record. Statistics stay on the device until the epoch is over."""
    device = dataset.train.images.device
    generator = make_generator(device, "epoch", config.seed, state.epoch)
    torch.manual_seed(config.seed * 100_003 + state.epoch + distributed.rank() * 1_000_000_007)  # for dropout in a user's model
    per_epoch = math.ceil(len(dataset.train) / config.batch_size)
    rows, began = [], time.perf_counter()
    dtype = torch.float64 if precision == "fp64" else torch.float32

    def context():
        return autocast(device, precision)

    attack_context = nullcontext if precision == "fp16" else context
    memory = images_format(state.model) if config.channels_last else torch.contiguous_format
    state.model.train()
    batches = dataset.train.batches(config.batch_size, generator, config.augment, dtype)
    for i, batch in enumerate(progress(batches, desc=f"epoch {state.epoch + 1}/{config.epochs}", total=per_epoch)):
        x, y, draws = distributed.share(*batch, generator)
        weight = distributed.weight(draws)
        x = x.contiguous(memory_format=memory)
        at = (state.epoch + i / per_epoch) / config.epochs
        rate = config.lr * SCHEDULES[config.schedule](at + 0.5 / per_epoch / config.epochs, config.peak)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        step = losses.Step(forward, x, y, config, draws, at, state=state.regularizer)
        total, statistics = train_step(step, context, attack_context)
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(total * weight).backward()
        distributed.sum_gradients(state.model)
        if config.clip:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema:
            state.ema.update_parameters(state.model)
        rows.append(weight * torch.stack([v.double() if device.type != "mps" else v.float() for v in statistics.values()]))
    table = distributed.total(torch.stack(rows)).cpu()  # the epoch's only read-back
    seconds = time.perf_counter() - began
    names = list(statistics)
    series = {name: table[:, names.index(name)] for name in names}
    mean = {f"train_{k}": v.mean().item() for k, v in series.items()}
    broken = (~torch.isfinite(series["loss"] + series["penalty"])).nonzero()
    whole = torch.stack([p.isfinite().all() for p in state.model.parameters()]).all()  # a NaN gradient may hide from the loss

    def check():
        if len(broken):
            raise FloatingPointError(f"the loss is not finite at epoch {state.epoch + 1}, step {int(broken[0]) + 1} of {per_epoch}.")
        if not whole:
            raise FloatingPointError(f"the weights are not finite after epoch {state.epoch + 1}.")

    distributed.everywhere(check)
    distributed.average_statistics(state.model, state.ema)
    keep = {k: [round(v, 4) if math.isfinite(v) else None for v in series[k].tolist()] for k in ("loss", "acc", "aae")}
    return dict(**{k: round(v, 6) for k, v in mean.items()}, lr=rate, images_per_s=round(len(dataset.train) / seconds, 1),
                seconds=round(seconds, 3), processes=distributed.world(), steps=keep)


def train(config: TrainConfig, dataset: Dataset | None = None, *, model: nn.Module | None = None,
          folder: str | Path | None = None, resume: bool = True, verbose: bool = True) -> Run:
    """Train, evaluate, record; returns the run (`Run.epochs`, `Run.final`, checkpoints in `Run.folder`).

    dataset: default `load_dataset(config.dataset, ...)`. model: your own nn.Module (config.model = 'custom'), trained in
    place unless the run is only loaded: `load_model(run.folder / "best.pt", model=...)` gives the weights either way.
    folder: default `run_folder`. A finished run with the same config is loaded, not trained again; an unfinished one goes
    on from its last epoch to the same result (``resume=False``: starts anew).
    Under torchrun every process takes its share of each batch; process 0 evaluates and writes, into a folder that all see.
    Raises DerkitError on bad input before any work and where the disk is full or the folder not writable (what is there
    stays, the same call goes on later), FloatingPointError when loss or weights are not finite (it names what is good).
    """
    with distributed.processes():
        say = print if verbose and distributed.rank() == 0 else (lambda *a, **k: None)
        config, dataset, device, why = distributed.in_turn(partial(_prepare, config, dataset, model))
        distributed.everywhere(partial(_check_same_data, dataset, distributed.first(lambda: dataset.sha256)))
        folder = Path(folder) if folder else run_folder(config, dataset, model)
        if distributed.first(partial(is_finished, folder, config, dataset, model, resume)):
            say(f"loaded the finished run {folder.name} (same config; not trained again)")
            distributed.first(partial(_complete, folder, dataset, config, model, say))
            return Run(folder)
        signature, finished = signature_of(model), partial(is_finished, folder, config, dataset, model, resume)
        model = model if model is not None else model_from_config(config, dataset)
        state = _new_state(config, model, device, config.precision)
        with distributed.everywhere(lambda: hold(folder) if distributed.rank() == 0 else nullcontext()):
            if distributed.first(finished):
                return Run(folder)  # another process was quicker
            if distributed.first(lambda: resume and (folder / "last.pt").is_file()):
                distributed.everywhere(lambda: state.restore(load_checkpoint(folder / "last.pt", device)))
                say(f"resuming {folder.name} after epoch {state.epoch}")
            env = environment(device, config.precision, why)
            distributed.first(partial(open_run, folder, state.epoch, dataset, config, signature, env))
            with synced_batch_norm(state.model, config.sync_bn):
                try:
                    _fit(folder, state, dataset, config, say)
                except FloatingPointError as error:
                    error.args = (f"{error} {last_good(folder)}",)
                    raise
            distributed.first(partial(_finish, folder, state, dataset, config))
        return Run(folder)


def _prepare(config: TrainConfig, dataset: Dataset | None, model: nn.Module | None):
    """(config, data set, device, why this precision) with everything checked that can be before any work."""
    device = choose_device(config.device)
    precision, why = choose_precision(config, device)
    config = config.change(precision=precision)
    pick("method", config.method, losses.METHODS)
    if config.batch_size < distributed.world():
        raise DerkitError(f"batch_size is over all processes: {config.batch_size} images cannot be shared by {distributed.world()}.")
    if dataset is None:
        dataset = load_dataset(config.dataset, config.data_dir or None, device, download=config.download,
                               train_size=config.train_size, valid_size=config.valid_size,
                               image_size=config.image_size or None, progress=progress)
    check_further(dataset, config)
    return config if model is None else config.change(model="custom"), dataset, device, why


def _check_same_data(dataset: Dataset, sha256: str) -> None:
    if dataset.sha256 != sha256:
        raise DerkitError(f"found other images of {dataset.name} ({dataset.source}) than process 0: give all machines the same data_dir.")


def _fit(folder: Path, state: _State, dataset: Dataset, config: TrainConfig, say) -> None:
    """The epochs that are left: train on all processes; evaluate and write on the first."""
    forward = torch.compile(state.model) if config.compile else state.model
    rows = read_lines(folder / "metrics.jsonl") if distributed.rank() == 0 else []  # of the epochs before an interruption
    stop = distributed.first(lambda: config.stop_on_co and bool(rows) and alarms.should_stop(rows))
    while state.epoch < config.epochs and not stop:
        record = _train_epoch(state, forward, dataset, config, config.precision)
        state.epoch += 1
        stop = distributed.first(partial(_close_epoch, folder, state, dataset, config, record, rows))
    if stop:
        say(f"stopped after epoch {state.epoch}: catastrophic-overfitting alarm")


def _close_epoch(folder: Path, state: _State, dataset: Dataset, config: TrainConfig, record: dict[str, Any], rows: list) -> bool:
    """Evaluate, keep the best on validation, write the line and the checkpoint; returns whether the alarm ends the run."""
    record = dict(epoch=state.epoch) | epoch_evaluation(state.judged, dataset, config, state.epoch) | record
    if not math.isfinite(record["valid_loss"]):
        raise FloatingPointError(f"the validation loss is not finite after epoch {state.epoch}.")
    rows.append(record)
    with disk_errors(folder):
        if record["valid_pgd"] > state.best:
            state.best, state.best_epoch = record["valid_pgd"], state.epoch
            _save(folder / "best.pt", state, config)
        append_line(folder / "metrics.jsonl", record)
        stop = config.stop_on_co and alarms.should_stop(rows)
        if state.epoch % config.save_every == 0 or state.epoch == config.epochs or stop:
            save_checkpoint(folder / "last.pt", state.model, config.as_dict(), **state.extra())
    return stop


def _save(path: Path, state: _State, config: TrainConfig) -> None:
    save_checkpoint(path, state.judged, config.as_dict(), epoch=state.epoch)


def _finish(folder: Path, state: _State, dataset: Dataset, config: TrainConfig) -> None:
    """Test both checkpoints, last and best-on-validation, and write final.json: the mark of a finished run."""
    with disk_errors(folder):
        _save(folder / "final.pt", state, config)
    result = dict(last=final_evaluation(state.judged, dataset, config), last_epoch=state.epoch, best_epoch=state.best_epoch)
    if state.best_epoch == state.epoch:
        result["best"] = result["last"]
    else:
        model = copy.deepcopy(state.judged)  # a user's module keeps the last weights
        model.load_state_dict(load_checkpoint(folder / "best.pt", dataset.train.images.device)["state"])
        result["best"] = final_evaluation(model, dataset, config)
    with disk_errors(folder):
        write_json(folder / "final.json", result)


def _complete(folder: Path, dataset: Dataset, config: TrainConfig, model: nn.Module | None, say) -> None:
    """Give a finished run the PGD-50-10 and AutoAttack that the config asks for and that it lacks, from its checkpoints."""
    result = Run(folder).final
    if not any(missing(result[which], dataset, config) for which in ("last", "best")):
        return
    with disk_errors(folder), lock_folder(folder):
        for which, file in (("last", "final.pt"), ("best", "best.pt")):
            if which == "best" and result["best_epoch"] == result["last_epoch"]:
                result["best"] = result["last"]
            elif lacking := missing(result[which], dataset, config):
                say(f"evaluating {folder.name}, {which} epoch: {', '.join(lacking)}")
                judged = load_model(folder / file, model=copy.deepcopy(model), device=dataset.train.images.device)
                result[which] |= further_evaluation(judged, dataset, config, result[which])
            write_json(folder / "final.json", result)


if __name__ == "__main__":
    from derkit.cli import main

    raise SystemExit(main())
