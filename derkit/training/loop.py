"""Adversarial training: one loop for every method and regulariser, notebooks and shell alike.

Under torchrun the loss of a step goes through DistributedDataParallel, while attacks and
regularisers see the bare module. Every process takes its slice of the same permutation; process 0
evaluates and writes."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from derkit import energy, util
from derkit.attacks import attack_mode
from derkit.checkpoint import load_checkpoint, load_model, load_state, save_checkpoint, save_state
from derkit.config import TrainConfig
from derkit.data import Dataset, load_dataset
from derkit.diagnosis.evaluation import check_autoattack
from derkit.diagnosis.overfitting import should_stop
from derkit.models import build_model
from derkit.records import Run, environment, run_folder, signature_of, write_lines
from derkit.training import monitor
from derkit.training.objectives import Objective, awp_weights, make_regularizer, weight_at
from derkit.util import DerkitError


# ------------------------------------------------------------------------------- learning rates
# By hand and without state: a resumed run knows the rate of a step from its number alone.
def onecycle(p: float, peak: float) -> float:
    """1/25 -> 1 -> 4e-6 by cosines, the top at ``peak`` (torch's OneCycleLR with its defaults)."""
    start, stop, q = 1 / 25, 1.0, p / max(peak, 1e-12)
    if p >= peak:
        start, stop, q = 1.0, 1 / 25 / 1e4, min((p - peak) / max(1 - peak, 1e-12), 1.0)
    return stop + (start - stop) * 0.5 * (1 + math.cos(math.pi * q))


SCHEDULES: dict[str, Callable[[float, float], float]] = {  # (progress, peak) -> factor
    "constant": lambda p, peak: 1.0,
    "cosine": lambda p, peak: 0.5 * (1 + math.cos(math.pi * p)),
    "piecewise": lambda p, peak: 0.1 ** ((p >= 0.5) + (p >= 0.75)),  # Rice et al.
    "triangular": lambda p, peak: p / peak if p < peak else (1 - p) / max(1 - peak, 1e-12),
    "onecycle": onecycle,
}


def model_from_config(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The config's model, the data set's normaliser inside, initialised from config.seed."""
    own = dict(one_layer=dict(filters=config.filters), small_cnn=dict(bn=config.batch_norm),
               wide_resnet=dict(depth=config.depth),
               preact_resnet18=dict(shortcut=config.shortcut, final_bn=config.final_bn))
    options = own.get(config.model, {})
    if config.width and config.model != "one_layer":
        options["width"] = config.width
    if config.normalize:
        options |= dict(mean=dataset.mean, std=dataset.std)
    shape = dataset.channels, len(dataset.classes), dataset.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config.model, *shape, **options)


def forward_together(model: nn.Module, points: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits of all points, (B, C, H, W) each, from one forward pass."""
    images = list(points.values())
    joined = model(torch.cat(images) if len(images) > 1 else images[0])
    return dict(zip(points, joined.split([len(x) for x in images]), strict=True))


def train_step(model: nn.Module, x: Tensor, y: Tensor, objective: Objective, regularizer=None,
               weight: float = 0.0, rng: torch.Generator | None = None, *, awp: float = 0.0,
               forward: nn.Module | None = None, context=nullcontext,
               attack_context=nullcontext) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss with its graph, statistics) of one batch x (B, C, H, W) in [0, 1] with labels y (B,).

    ``weight`` is lambda at this moment, ``awp`` the size of `awp_weights`. ``forward``: what the
    loss goes through where that is not the bare model. Nothing is read back to the host."""
    with attack_context():
        x_adv, _, start = objective.attack(model, x, y, rng)
    points = {"adv": x_adv.detach(), **objective.points(x)}
    if regularizer:
        points |= regularizer.points(x, points["adv"], rng)
    forward = forward or model
    with context():
        if awp:
            with attack_mode(model, "train"):  # BatchNorm's running statistics stay
                raised = objective(forward_together(model, points), y)
            moved = awp_weights(model, raised, awp)
            forward = lambda images: functional_call(model, moved, (images,))  # noqa: E731
        logits = forward_together(forward, points)
        if start is not None:
            logits["start"] = start
        total = loss = objective(logits, y)
        penalty = loss.new_zeros(())
        if regularizer:
            penalty = regularizer(logits, y)
            total = loss + weight * penalty
    with torch.no_grad():
        adv = energy.upcast(logits["adv"])
        if start is None or awp or objective.config.bn_mode != "train":  # not in the step's state
            start = logits.get("nat")
        abnormal = adv.new_full((), math.nan)  # not known for attacks that keep no start
        if start is not None:
            abnormal = energy.abnormal_mask(start, adv, y).to(adv.dtype).mean()
        accuracy = (adv.argmax(1) == y).to(adv.dtype).mean()
        statistics = dict(loss=loss.detach(), penalty=penalty.detach(), acc=accuracy,
                          aae=abnormal, E_adv=energy.marginal_energy(adv).mean())
    return total, statistics


class State:
    """What changes in training; the model is moved, and trained, in place. ``attacked``: the model,
    compiled if asked for. ``forward``: that, wrapped for several processes. ``rows``: a record per
    epoch. ``best``: PGD accuracy on validation images."""

    def __init__(self, config: TrainConfig, model: nn.Module, device: torch.device) -> None:
        if util.world() > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(device, torch.float64 if config.precision == "fp64" else torch.float32)
        self.memory = torch.contiguous_format
        if config.channels_last:
            self.memory = util.images_format(model)
        model.to(memory_format=self.memory)
        average = dict(multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.ema = AveragedModel(model, **average) if config.ema else None
        common = dict(lr=config.lr, weight_decay=config.weight_decay, fused=device.type == "cuda")
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam(model.parameters(), **common)
        else:
            common["momentum"] = config.momentum
            self.optimizer = torch.optim.SGD(model.parameters(), **common)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.config, self.model = config, model
        self.attacked = attacked = torch.compile(model) if config.compile else model
        self.forward = DistributedDataParallel(attacked) if util.world() > 1 else attacked
        self.rows: list[dict[str, Any]] = []
        self.best = -1.0

    epoch = property(lambda self: len(self.rows))  # finished ones
    # what is evaluated and kept: the moving average if there is one
    judged = property(lambda self: self.ema.module if self.ema else self.model)

    def save(self, path: Path) -> None:
        """Everything that a killed run needs to go on to the same bytes."""
        parts = dict(model=self.model, ema=self.ema, optimizer=self.optimizer, scaler=self.scaler)
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        save_state(path, state | dict(rows=self.rows, best=self.best))

    def restore(self, path: Path, device: torch.device) -> None:
        """Go back to what `save` wrote."""
        saved = load_state(path, device)
        for name in ("model", "ema", "optimizer", "scaler"):
            if name in saved:
                getattr(self, name).load_state_dict(saved[name])
        self.rows, self.best = saved["rows"], saved["best"]


def _batches(state: State, dataset: Dataset, rng: torch.Generator):
    """(x, y, share): this process's slice of every batch, and what its mean counts for in DDP's
    mean over processes. A batch with fewer images than processes is computed by all of them."""
    config, world = state.config, util.world()
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    for x, y in dataset.train.batches(config.batch_size, rng, config.augment, dtype):
        total, share = len(y), 1.0
        if world > 1 and total >= world:
            x, y = x[util.rank() :: world], y[util.rank() :: world]
            share = len(y) * world / total
        yield x.contiguous(memory_format=state.memory), y, share


def train_epoch(state: State, dataset: Dataset, bar: Iterator = iter(())) -> dict[str, Any]:
    """One epoch; returns its record. Statistics stay on the device until the epoch is over.
    ``bar`` is advanced by one for every step."""
    config, device, rank = state.config, dataset.train.images.device, util.rank()
    order = util.make_generator(device, "epoch", config.seed, state.epoch)  # the same everywhere
    rng = order if rank == 0 else util.make_generator(device, config.seed, state.epoch, rank)
    torch.manual_seed(config.seed * 100_003 + state.epoch + rank * 1_000_000_007)  # for dropout
    context = partial(util.autocast, device, config.precision)
    attack_context = nullcontext if config.precision == "fp16" else context
    objective, regularizer = Objective(config), make_regularizer(config, state.attacked)
    per_epoch = math.ceil(len(dataset.train) / config.batch_size)
    table, began = [], time.perf_counter()
    state.model.train()
    for i, (x, y, share) in enumerate(_batches(state, dataset, order)):
        done = (state.epoch + i / per_epoch) / config.epochs
        active = regularizer if done >= config.start else None
        total, statistics = train_step(
            state.attacked, x, y, objective, active, weight_at(config, done), rng, awp=config.awp,
            forward=state.forward, context=context, attack_context=attack_context)
        rate = _update(state, total * share, done + 0.5 / per_epoch / config.epochs)
        values = [value.detach().double() for value in statistics.values()]
        table.append(torch.stack(values) * share / util.world())
        next(bar, None)
    table = torch.stack(table)
    if util.world() > 1:
        dist.all_reduce(table)
    table = dict(zip(statistics, table.T.tolist(), strict=True))  # the epoch's only read-back
    seconds = time.perf_counter() - began
    util.everywhere(partial(_check_finite, state, table))
    record = {f"train_{name}": round(sum(v) / len(v), 6) for name, v in table.items()}
    record |= dict(lr=rate, images_per_s=round(len(dataset.train) / seconds, 1))
    return record | dict(seconds=round(seconds, 3), processes=util.world())


def _update(state: State, loss: Tensor, done: float) -> float:
    """One step of the optimiser at this share of training; returns the learning rate."""
    config = state.config
    rate = config.lr * SCHEDULES[config.schedule](done, config.peak)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    if config.clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        state.ema.update_parameters(state.model)
    return rate


def _check_finite(state: State, table: dict[str, list[float]]) -> None:
    """Raise FloatingPointError for a loss or weights that are not (NaN may hide from the loss)."""
    steps = zip(table["loss"], table["penalty"], strict=True)
    broken = [i for i, values in enumerate(steps, 1) if not all(map(math.isfinite, values))]
    where = f"epoch {state.epoch + 1}"
    if broken:
        of = len(table["loss"])
        raise FloatingPointError(f"the loss is not finite at {where}, step {broken[0]} of {of}.")
    if not all(p.isfinite().all() for p in state.model.parameters()):
        raise FloatingPointError(f"the weights are not finite after {where}.")


def train(config: TrainConfig, dataset: Dataset | None = None, *, model: nn.Module | None = None,
          folder: str | Path | None = None, resume: bool = True, verbose: bool = True) -> Run:
    """Train, evaluate, record; returns the run (`Run.epochs`, `Run.final`, `Run.model()`).

    dataset: default `load_dataset(config.dataset, ...)`. model: your own nn.Module (config.model
    becomes 'custom'), trained in place unless the run is only loaded: `run.model(model=...)` gives
    the weights either way. folder: default `records.run_folder`. A finished run with the same
    config is loaded, not trained again; an unfinished one goes on from its last epoch to the same
    result (``resume=False``: starts anew). Raises DerkitError for bad input before any work and for
    files that cannot be written (what is there stays), FloatingPointError for a loss or weights
    that are not finite."""
    with util.processes(), torch.random.fork_rng(devices=[]):
        say = print if verbose and util.rank() == 0 else (lambda text: None)
        config, dataset, env = util.in_turn(partial(_prepare, config, dataset, model))
        device, signature = dataset.train.images.device, signature_of(model)
        folder = Path(folder) if folder else run_folder(config, dataset, signature)
        is_finished = partial(_is_finished, folder, config, dataset, signature, resume)
        if util.first(is_finished):
            say(f"loaded the finished run {folder.name} (same config; not trained again)")
            util.first(partial(_finish, folder, dataset, config, model, say))
            return Run(folder)
        own = model if model is not None else model_from_config(config, dataset)
        state = State(config, own, device)
        hold = partial(util.hold, folder, "training") if util.rank() == 0 else nullcontext
        with util.everywhere(hold):
            util.first(is_finished)  # another process may have been quicker, with another config
            if util.first(lambda: resume and (folder / "last.pt").is_file()):
                util.everywhere(partial(state.restore, folder / "last.pt", device))
                say(f"resuming {folder.name} after epoch {state.epoch}")
            util.first(partial(_open, folder, state, dataset, signature, env))
            try:
                _fit(folder, state, dataset, say)
            except FloatingPointError as error:
                left = "No checkpoint was written before."
                if (folder / "last.pt").is_file():
                    epoch = len(load_state(folder / "last.pt", "cpu")["rows"])
                    left = f"The last good one is {folder / 'last.pt'} (epoch {epoch})."
                error.args = (f"{error} {left}",)
                raise
            util.first(partial(_finish, folder, dataset, config, model, lambda text: None))
        return Run(folder)


def _prepare(config: TrainConfig, dataset: Dataset | None, model: nn.Module | None):
    """(config, data set, environment), with everything checked that can be before any work."""
    device = util.choose_device(config.device)
    precision, why = util.choose_precision(config.precision, config.regularizer, device)
    if config.model == "custom" and model is None:
        raise DerkitError("model 'custom' is a module of your own: pass model=YourModule().")
    own = {} if model is None else {"model": "custom"}
    config = config.change(precision=precision, **own)
    if (config.regularizer == "gradalign" or config.awp) and util.world() > 1:
        raise DerkitError("gradalign's double backward and awp's moved weights do not go through "
                          "DistributedDataParallel: train them with one process.")
    if config.batch_size < util.world():
        raise DerkitError(f"batch_size is over all processes: {config.batch_size} images cannot be "
                          f"shared by {util.world()}.")
    if dataset is None:
        dataset = load_dataset(
            config.dataset, config.data_dir or None, device, download=config.download,
            train_size=config.train_size, valid_size=config.valid_size,
            image_size=config.image_size or None)
    elif dataset.name not in (config.dataset, f"imagefolder-{Path(config.dataset).name}"):
        config = config.change(dataset=dataset.name)  # what checkpoints say that they were made on
    if config.autoattack_size:
        check_autoattack(config.eps, len(dataset.classes))
    return config, dataset, environment(device, precision, why)


def _is_finished(folder: Path, config: TrainConfig, dataset: Dataset, signature: str,
                 resume: bool) -> bool:
    """Is there a finished run to load? Raises DerkitError where the folder holds another run."""
    finished = (folder / "final.json").is_file()
    if not resume or not (finished or (folder / "last.pt").is_file()):
        return False
    found, advice = Run(folder).config, "Choose another folder, or resume=False to replace it."
    try:
        same = {"another config": TrainConfig.read(found["train"]).hash() == config.hash(),
                "other data": found["data_sha256"] == dataset.sha256,
                "another model": found.get("model", "") == signature}
    except (KeyError, DerkitError) as error:
        raise DerkitError(f"{folder / 'config.json'} is not the config of a run ({error}). "
                          f"{advice}") from error
    for what, equal in same.items():
        if not equal:
            raise DerkitError(f"{folder} holds a run of {what}. {advice}")
    return finished


def _open(folder: Path, state: State, dataset: Dataset, signature: str, env: dict) -> None:
    """Remove what the resume state does not know, and write what the run depends on."""
    with util.disk_errors(folder):
        util.remove_temporary(folder)
        if not state.rows:
            for path in [folder / "final.json", folder / "last.pt", *folder.glob("*.safetensors")]:
                path.unlink(missing_ok=True)
        write_lines(folder / "metrics.jsonl", state.rows)
        sizes = {name: len(getattr(dataset, name)) for name in ("train", "valid", "test")}
        about = dict(dataset=dataset.name, source=dataset.source, data_sha256=dataset.sha256)
        about |= dict(sizes=sizes, classes=dataset.classes, model=signature)
        util.write_json(folder / "config.json", dict(train=state.config.as_dict()) | about)
        util.write_json(folder / "env.json", env)


def _fit(folder: Path, state: State, dataset: Dataset, say) -> None:
    """The epochs that are left: train on all processes; evaluate and write on the first."""
    alarm, steps = state.config.stop_on_co, math.ceil(len(dataset.train) / state.config.batch_size)
    left = range(state.epoch * steps, state.config.epochs * steps)
    bar = iter(util.progress(left, f"training {folder.name}"))
    stop = util.first(lambda: alarm and bool(state.rows) and should_stop(state.rows))
    while state.epoch < state.config.epochs and not stop:
        record = train_epoch(state, dataset, bar)
        row = util.first(partial(_close_epoch, folder, state, dataset, record))
        if util.rank():
            state.rows.append(row)
        stop = alarm and should_stop(state.rows)
    for _ in bar:  # to its end, after an early stop, too: there it is taken away
        pass
    if stop:
        say(f"stopped after epoch {state.epoch}: catastrophic-overfitting alarm")
    util.first(partial(_save_weights, folder / "final.safetensors", state))


def _close_epoch(folder: Path, state: State, dataset: Dataset, record: dict) -> dict[str, Any]:
    """Evaluate, keep the best on validation images, write; returns the epoch's whole record."""
    config, epoch = state.config, state.epoch + 1
    row = dict(epoch=epoch)
    if epoch > config.eval_from * config.epochs:
        row |= monitor.epoch_evaluation(state.judged, dataset, config, epoch)
    if not math.isfinite(row.get("valid_loss", 0)):
        raise FloatingPointError(f"the validation loss is not finite after epoch {epoch}.")
    state.rows.append(row | record)
    with util.disk_errors(folder):
        if row.get("valid_pgd", -1) > state.best:
            state.best = row["valid_pgd"]
            _save_weights(folder / "best.safetensors", state)
        if config.keep_every and epoch % config.keep_every == 0:
            _save_weights(folder / f"epoch-{epoch}.safetensors", state)
        state.save(folder / "last.pt")
        write_lines(folder / "metrics.jsonl", state.rows)
    return state.rows[-1]


def _save_weights(path: Path, state: State) -> None:
    with util.disk_errors(path):
        save_checkpoint(path, state.judged, state.config.as_dict(), epoch=state.epoch)


def _finish(folder: Path, dataset: Dataset, config: TrainConfig, model, say) -> None:
    """Test the last and the best epoch, as far as final.json, the mark of a finished run, lacks
    what the config asks for."""
    before = Run(folder).final
    result, device = dict(before), dataset.train.images.device
    for which, file in dict(last="final.safetensors", best="best.safetensors").items():
        known = result.get(which, {})
        if not monitor.lacking(known, dataset, config, which == "best"):
            continue
        epoch = load_checkpoint(folder / file)["epoch"]
        if which == "best" and epoch == result["last_epoch"]:
            known = result["last"]
        else:
            say(f"evaluating the {which} epoch of {folder.name}")
            judged = load_model(folder / file, model=copy.deepcopy(model), device=device)
            known = monitor.final_evaluation(judged, dataset, config, known, which == "best")
        result |= {which: known, f"{which}_epoch": epoch}
    if result != before:
        with util.disk_errors(folder):
            util.write_json(folder / "final.json", result)
