"""Images from a classifier read as an energy-based model: 16 of them in memory, or 50,000 into a folder that survives
a kill.

    python -m derkit.generation --checkpoint FILE --set n=5000 --set init=local_pca
    python -m derkit.generation --help
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from derkit import attacks
from derkit.checkpoint import state_hash
from derkit.config import AUTO
from derkit.data import Dataset
from derkit.errors import DerkitError, pick
from derkit.fits import Pool, fit_pool
from derkit.gen_config import GenerateConfig
from derkit.inits import INITS, Draw, local_parts
from derkit.models import describe
from derkit.progress import progress
from derkit.records import append_line, environment, read_lines, write_json
from derkit.sampler import STOPS, Chains, sample
from derkit.samples import (Samples, concatenate, disk_errors, file_sha256, from_chains, load_samples, read_shard, shard_path,
                            write_shard)
from derkit.targets import Reference, energy_targets, reference_energies


@dataclass(frozen=True)
class Job:
    """Everything prepared and checked for a generation; a sample is a function of the job and its global index."""

    model: nn.Module
    dataset: Dataset
    config: GenerateConfig
    pool: Pool
    reference: Reference
    classes: tuple[int, ...]
    model_sha256: str

    def draw(self, index: Tensor, candidate: int = 0) -> Draw:
        """Label and rank of samples by their global index (B,): classes take turns."""
        index = index.to(self.pool.images.device)
        labels = torch.tensor(self.classes, device=index.device)[index % len(self.classes)]
        return Draw(index, labels, index // len(self.classes), self.config.seed, candidate)

    def starts(self, index: Tensor) -> Tensor:
        """x0 (B, C, H, W) in [0, 1]; with best_of > 1 the start whose E(x0, y) is nearest to the target."""
        best, gap = None, None
        for candidate in range(self.config.best_of):
            draw = self.draw(index, candidate)
            x = INITS[self.config.init].start(draw, self.pool, self.config).clamp(0, 1).view(-1, *self.pool.shape)
            if self.config.best_of == 1:
                return x
            with torch.no_grad(), attacks.attack_mode(self.model, "eval"):
                now = -self.model(x).double().gather(1, draw.labels[:, None]).squeeze(1)
            now = (now - self.targets(draw)).abs()
            take = torch.ones_like(now, dtype=torch.bool) if gap is None else now < gap
            best = x if best is None else torch.where(take.view(-1, 1, 1, 1), x, best)
            gap = now if gap is None else torch.where(take, now, gap)
        return best

    def targets(self, draw: Draw) -> Tensor:
        """e* per sample, (B,)."""
        return energy_targets(self.reference, draw.index, draw.labels, self.config.seed, self.config.low, self.config.high)

    def run(self, index: Sequence[int] | Tensor, *, trace: bool = False, frames_every: int = 0) -> Chains:
        """One batch of samples by their global numbers, as floats; with energy traces and frames if asked for."""
        draw = self.draw(torch.as_tensor(index, dtype=torch.int64))
        with _reproducible():
            return sample(self.model, self.starts(draw.index), draw.labels, draw.index, self.config, self.reference,
                          trace=trace, frames_every=frames_every)

    def between(self, first: int, second: int, points: int = 9, **options: Any) -> Chains:
        """Interpolation of two local-PCA starts of one class, each point then sampled towards the same target.

        x0(t) = (1 - t) m_1 + t m_2 + tau (cos(a) d_1 + sin(a) d_2), a = t pi/2: between two draws of local Gaussians
        the spread stays what it is in them. Raises DerkitError for another init, or samples of two classes.
        """
        draw = self.draw(torch.tensor([first, second]))
        if self.config.init != "local_pca" or draw.labels[0] != draw.labels[1]:
            raise DerkitError("between() joins two starts of one class with init=local_pca (samples whose numbers differ by a "
                              f"multiple of {len(self.classes)}).")
        mean, deviation = local_parts(draw, self.pool, self.config)
        t = torch.linspace(0, 1, points, dtype=mean.dtype, device=mean.device)[:, None]
        angle = t * math.pi / 2
        x0 = torch.lerp(*mean, t) + self.config.tau * (angle.cos() * deviation[0] + angle.sin() * deviation[1])
        same = draw.index[:1].expand(points)
        with _reproducible():
            return sample(self.model, x0.clamp(0, 1).view(-1, *self.pool.shape), draw.labels[:1].expand(points), same,
                          self.config, self.reference, **options)


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Fixed algorithms and no TF32 on a GPU, so that a shard comes out the same when it is made again."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


def prepare(model: nn.Module, dataset: Dataset, config: GenerateConfig | None = None, **overrides: Any) -> Job:
    """Check everything and fit the init; the work itself starts with `Job.run` or `generate`.

    model: any classifier of images in [0, 1], on the data's device; it is not changed. Raises DerkitError: unknown
    init or stop, k larger than a class, a class with no correctly classified image where energies are needed, a model
    that does not fit the data.
    """
    config = (config or GenerateConfig()).change(**overrides)
    kind = pick("init", config.init, INITS)
    pick("stop", config.stop, STOPS)
    classes = config.class_numbers(dataset.classes)
    sha256 = state_hash(model.state_dict())
    model, dtype = _at_precision(model, config.precision)
    _check_model(model, dataset, dtype)
    pca = config.kept if kind.needs == "pca" else None
    pool = fit_pool(dataset, classes, pca=pca, k=config.k if kind.needs == "near" else 0, rank=config.rank, dtype=dtype)
    reference = reference_energies(model, dataset, config.reference, f"{sha256}-{dtype}")
    if config.stop != "fixed" or config.best_of > 1:
        reference.require(classes, f"stop={config.stop}" if config.stop != "fixed" else f"best_of={config.best_of}")
    return Job(model, dataset, config, pool, reference, tuple(classes), sha256)


def _at_precision(model: nn.Module, precision: str) -> tuple[nn.Module, torch.dtype]:
    """The model (a copy, if its type has to change) and the type that images have in it."""
    own = next((p.dtype for p in model.parameters()), torch.float32)
    wanted = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}.get(precision, own)
    if precision == AUTO and own not in (torch.float32, torch.float64):
        wanted = torch.float32
    return (model if wanted == own else copy.deepcopy(model).to(wanted)), wanted


def _check_model(model: nn.Module, dataset: Dataset, dtype: torch.dtype) -> None:
    x = dataset.train.floats(0, 1, dtype)
    try:
        with torch.no_grad(), attacks.attack_mode(model, "eval"):
            found = model(x).shape
    except RuntimeError as error:
        raise DerkitError(f"the model does not take the images of {dataset.name}, {tuple(x.shape[1:])} on {x.device}: "
                          f"{str(error).splitlines()[0]}") from error
    if found != (1, len(dataset.classes)):
        raise DerkitError(f"the model has {found[-1]} classes, {dataset.name} has {len(dataset.classes)}: a checkpoint of another "
                          "data set?")


# ------------------------------------------------------------------------------------------------------- generate
def generate(model: nn.Module, dataset: Dataset, n: int | None = None, *, config: GenerateConfig | None = None,
             folder: str | Path | None = None, fresh: bool = False, verbose: bool = True, **overrides: Any) -> Samples:
    """Generate n images (fields of `GenerateConfig` as keywords: init='pca', stop='fixed', seed=3, ...).

    folder: write shards of ``shard_size`` images there; what is already there is kept, so that the same call after a
    kill goes on and ends with the same bytes. Without it everything stays in memory. fresh: delete the folder's
    samples first. Raises DerkitError before any work on bad input, on a folder of another config, and when the disk
    is full.
    """
    job = prepare(model, dataset, config, **overrides | ({} if n is None else {"n": n}))
    if folder is None:
        began = time.perf_counter()
        samples = _range(job, 0, job.config.n, "sampling")
        seconds = time.perf_counter() - began
        samples.record = manifest(job) | samples.statistics() | dict(seconds_per_1000=1000 * seconds / len(samples))
        return samples
    return _to_folder(job, Path(folder), fresh, print if verbose else (lambda *a: None))


def _range(job: Job, start: int, stop: int, desc: str) -> Samples:
    """Samples [start, stop) in batches."""
    size = job.config.batch_size
    batches = [range(i, min(stop, i + size)) for i in range(start, stop, size)]
    return from_chains([job.run(b) for b in progress(batches, desc=desc)])


def manifest(job: Job) -> dict[str, Any]:
    """What the samples are made from: config, model, data, image source."""
    spec = getattr(job.model, "spec", None)
    return dict(config=job.config.as_dict(), seed=job.config.seed, model_sha256=job.model_sha256,
                model=describe(spec) if spec else type(job.model).__name__, dataset=job.dataset.name, source=job.dataset.source,
                data_sha256=job.dataset.sha256, classes=[job.dataset.classes[c] for c in job.classes])


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two manifests disagree on, of all that changes results."""
    def flat(m: dict[str, Any]) -> dict[str, Any]:
        return GenerateConfig(**m["config"]).identity() | {k: m[k] for k in ("model_sha256", "data_sha256")}

    a, b = flat(old), flat(new)
    return [f"{k}: {str(a[k])[:12]} there, {str(b[k])[:12]} here" for k in b if a[k] != b[k]]


def _to_folder(job: Job, folder: Path, fresh: bool, say) -> Samples:
    new = json.loads(json.dumps(manifest(job)))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        _open(folder, new, fresh)
        if (folder / "summary.json").is_file():
            say(f"loaded the finished samples in {folder} (same config; not generated again)")
            return load_samples(folder)
        with disk_errors(folder / "manifest.json"):
            write_json(folder / "manifest.json", new)
            device = job.pool.images.device
            write_json(folder / "env.json", environment(device, job.config.precision, "images keep the model's type"))
        n, size = job.config.n, job.config.shard_size
        shards = [(i, a, min(n, a + size)) for i, a in enumerate(range(0, n, size))]
        parts = {i: read_shard(shard_path(folder, i), a, b) for i, a, b in shards}
        kept = sum(p is not None for p in parts.values())
        if kept:
            say(f"resuming {folder}: {kept} of {len(shards)} shards are there")
        for i, a, b in progress([s for s in shards if parts[s[0]] is None], desc=f"shards of {size}"):
            began = time.perf_counter()
            parts[i] = _range(job, a, b, f"shard {i + 1}/{len(shards)}")
            write_shard(shard_path(folder, i), parts[i])
            with disk_errors(folder / "timing.jsonl"):
                append_line(folder / "timing.jsonl", dict(shard=i, n=b - a, seconds=round(time.perf_counter() - began, 3)))
        return _finish(folder, new, concatenate(list(parts.values()), new))


def _open(folder: Path, new: dict[str, Any], fresh: bool) -> None:
    """Refuse a folder of another config; remove what a kill left half-written, and with ``fresh`` everything."""
    path = folder / "manifest.json"
    if path.is_file() and not fresh:
        try:
            differences = _differences(json.loads(path.read_text()), new)
        except (ValueError, KeyError, TypeError) as error:
            raise DerkitError(f"{path} is not a manifest of samples ({error}). Choose another folder.") from error
        if differences:
            raise DerkitError(f"{folder} holds samples of another config ({'; '.join(differences)}). Choose another folder, use "
                              "the old settings to go on with it, or replace it with fresh=True (--fresh).")
    for pattern in (".*.tmp", *(("part_*.npz", "timing.jsonl", "summary.json", "manifest.json") if fresh else ())):
        for file in folder.glob(pattern):
            file.unlink()


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """One process at a time writes to a folder; the lock ends with the process, also when it is killed."""
    try:
        import fcntl
    except ImportError:  # not on this system: no lock
        yield
        return
    with disk_errors(folder / ".lock"), open(folder / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DerkitError(f"another process is writing to {folder}: wait for it, or choose another folder.") from None
        yield


def _finish(folder: Path, record: dict[str, Any], samples: Samples) -> Samples:
    """Write summary.json: statistics, speed, and the hash of every shard."""
    timing = read_lines(folder / "timing.jsonl")
    made = sum(t["n"] for t in timing)
    summary = samples.statistics() | dict(
        seconds_per_1000=1000 * sum(t["seconds"] for t in timing) / made if made else None,
        shards={p.name: file_sha256(p) for p in sorted(folder.glob("part_*.npz"))})
    with disk_errors(folder / "summary.json"):
        write_json(folder / "summary.json", summary)
    samples.record = record | summary
    return samples


if __name__ == "__main__":
    from derkit.gen_cli import main

    raise SystemExit(main())
