"""Images from a classifier read as an energy-based model: 16 in memory, or 50,000 in a folder.

A folder holds manifest.json (what is made), shards part_00000.npz with their seconds in
part_00000.json, and at the end summary.json. A shard that is whole and of the right numbers is
kept. In memory the same shards and batches are made, so that the images are the same."""

import contextlib
import copy
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from derkit import attacks, checkpoint, energy, models, records, util
from derkit.config import GenerateConfig
from derkit.data import Dataset
from derkit.generation import sampler
from derkit.generation.sampler import Chains, Reference, quantise, sample, saturated
from derkit.generation.starts import INITS, Draw, Pool, fit_pool, local_parts
from derkit.util import AUTO, DerkitError, images_format, progress, read_json, write_json


@dataclass
class Samples:
    """Generated images on the CPU, uint8 as real ones are stored; (n,) unless said."""

    images: Tensor  # (n, C, H, W)
    x0: Tensor  # (n, C, H, W)
    labels: Tensor
    index: Tensor  # global number
    steps: Tensor
    reached: Tensor  # does the stop rule hold at the end?
    joint: Tensor  # E(x, y) of the images
    marginal: Tensor  # E(x)
    prob: Tensor  # p(y|x)
    joint0: Tensor  # the same of x0
    marginal0: Tensor
    prob0: Tensor
    target: Tensor  # e*
    record: dict[str, Any] = field(default_factory=dict, repr=False)  # how they were made

    def __len__(self) -> int:
        return len(self.labels)

    def statistics(self) -> dict[str, float]:
        """Means: steps, chains that never moved, that reached their stop, p(y|x), saturation."""
        rows = dict(steps=self.steps, stopped_at_0=self.steps == 0, reached=self.reached)
        means = {k: v.double().mean().item() for k, v in (rows | dict(prob=self.prob)).items()}
        pixels = dict(saturated=saturated(self.images), saturated_x0=saturated(self.x0))
        return dict(n=len(self)) | means | pixels

    def write(self, path: Path) -> None:
        """Into the files of a shard: its seconds, then the arrays; each whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name).numpy() for name in ARRAYS})
        write_json(path.with_suffix(".json"), self.record)
        util.atomic_write(path, buffer.getvalue())


ARRAYS = tuple(name for name in Samples.__dataclass_fields__ if name != "record")


class Job(NamedTuple):
    """A generation, prepared and checked (`prepare`): a sample is a function of its number."""

    model: nn.Module
    config: GenerateConfig
    pool: Pool
    reference: Reference
    classes: list[int]
    manifest: dict[str, Any]  # what the samples are made from

    def draw(self, index: Tensor | range | list[int], candidate: int = 0) -> Draw:
        """Label and rank of samples by their global index (B,): classes take turns."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.pool.images.device)
        labels = torch.tensor(self.classes, device=index.device)[index % len(self.classes)]
        return Draw(index, labels, index // len(self.classes), self.config.seed, candidate)

    def starts(self, index: Tensor | range | list[int]) -> Tensor:
        """x0 (B, C, H, W) in [0, 1]; of ``best_of`` ones that with E(x0, y) nearest to e*."""
        draws = [self.draw(index, candidate) for candidate in range(self.config.best_of)]
        init, draw = INITS[self.config.init], draws[0]
        found = torch.stack([init(each, self.pool, self.config) for each in draws])
        found = found.clamp(0, 1).unflatten(2, self.pool.images.shape[1:])
        if len(found) == 1:
            return found[0]
        with torch.no_grad(), attacks.attack_mode(self.model):
            joint = torch.stack([energy.joint_energy(self.model(x), draw.labels) for x in found])
        target = sampler.energy_targets(self.reference, draw.index, draw.labels, self.config)
        best = (joint.double() - target).abs().argmin(0)
        return found[best, torch.arange(len(best), device=best.device)]

    def run(self, index: Tensor | range | list[int], **more: Any) -> Chains:
        """A batch of samples by their numbers. More: trace=True, frames_every=k (`sample`)."""
        x0, draw = self.starts(index), self.draw(index)
        return sample(self.model, x0, draw.labels, draw.index, self.config, self.reference, **more)

    def run_from(self, x0: Tensor, labels: Tensor, **more: Any) -> Chains:
        """Chains from starts of your own, x0 (B, C, H, W) in [0, 1], towards ``labels`` (B,),
        numbered from 0. Raises DerkitError where shapes, range or labels do not fit."""
        images, shape = self.pool.images, tuple(self.pool.images.shape[1:])
        if x0.shape[1:] != shape:
            raise DerkitError(f"x0 has the shape {tuple(x0.shape)}, the data's images {shape}.")
        x0, labels = x0.to(images.device, self.pool.dtype), labels.to(images.device)
        attacks.check_batch(x0, labels, self.model)
        index = torch.arange(len(x0), device=x0.device)
        return sample(self.model, x0, labels, index, self.config, self.reference, **more)

    def between(self, first: int, second: int, points: int = 9, **more: Any) -> Chains:
        """Chains from between two local-PCA starts (or DerkitError), of one class or of two; the
        first half goes to the first's label and e*, the other to the second's. a = t pi/2 keeps the
        spread: x0(t) = (1 - t) m_1 + t m_2 + tau (cos(a) d_1 + sin(a) d_2)."""
        if self.config.init != "local_pca":
            raise DerkitError(f"between() needs init=local_pca, found {self.config.init}.")
        mean, (d1, d2) = local_parts(self.draw([first, second]), self.pool, self.config)
        t = torch.linspace(0, 1, points, dtype=mean.dtype, device=mean.device)[:, None]
        deviation = (t * torch.pi / 2).cos() * d1 + (t * torch.pi / 2).sin() * d2
        x0 = (torch.lerp(*mean, t) + self.config.tau * deviation).clamp(0, 1)
        x0 = x0.unflatten(1, self.pool.images.shape[1:])
        draw = self.draw([first if u <= 0.5 else second for u in t.flatten().tolist()])
        return sample(self.model, x0, draw.labels, draw.index, self.config, self.reference, **more)

    def samples(self, numbers: range) -> Samples:
        """Samples as they are stored, made in batches; record: the seconds that they took."""
        began, size = time.perf_counter(), self.config.batch_size
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        try:
            chains = [self.run(batch) for batch in progress(batches, "batches")]
        except torch.OutOfMemoryError:
            raise DerkitError(f"out of memory with batch_size={size}: set a smaller one.") from None
        rows = [(quantise(c.x), quantise(c.x0), c.labels, c.index, c.steps, c.reached, *c.end,
                 *c.start, c.target) for c in chains]  # fmt: skip
        arrays = [torch.cat(parts).cpu() for parts in zip(*rows, strict=True)]
        return Samples(*arrays, dict(seconds=round(time.perf_counter() - began, 3)))


def prepare(model: nn.Module, dataset: Dataset, config: GenerateConfig | None = None,
            **overrides: Any) -> Job:  # fmt: skip
    """Check everything and fit the init. model: any classifier of images in [0, 1], on the data's
    device; it is copied. Raises DerkitError for bad settings, too few images of a class, classes
    without real energies where they are needed, and a model that does not fit the data."""
    config = (config or GenerateConfig()).change(**overrides)
    classes = config.class_numbers(dataset.classes)
    sha256 = checkpoint.state_hash(model.state_dict())
    own = next((p.dtype for p in model.parameters()), torch.float32)
    auto = own if own == torch.float64 else torch.float32
    dtype = {AUTO: auto, "fp64": torch.float64}.get(config.precision, torch.float32)
    model = copy.deepcopy(model).to(dtype=dtype, memory_format=images_format(model))
    pool = fit_pool(dataset, classes, config, dtype)
    reference = sampler.reference_energies(model, dataset, config.reference)
    none = [dataset.classes[c] for c in classes if not reference.counts[c]]
    if none and (config.stop != "fixed" or config.best_of > 1):
        why = f"best_of={config.best_of}" if config.stop == "fixed" else f"stop={config.stop}"
        raise DerkitError(f"{why} needs real energies, but the model gets no {config.reference} "
                          f"image of class {none[0]!r} right. Use stop=fixed with best_of=1, "
                          "another classifier, or classes=... without it.")
    name = models.describe(model.spec) if hasattr(model, "spec") else type(model).__name__
    manifest = dict(config=config.as_dict(), seed=config.seed, model=name, model_sha256=sha256,
                    dataset=dataset.name, source=dataset.source, data_sha256=dataset.sha256,
                    classes=[dataset.classes[c] for c in classes],
                    env=records.environment(pool.images.device, str(dtype), "the images'"))
    return Job(model, config, pool, reference, classes, manifest)


def _read(path: Path, numbers: range) -> Samples | None:
    """The samples of a shard, or None: its file is missing, damaged or holds others."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [torch.from_numpy(file[name]) for name in ARRAYS]
        record = dict(seconds=float(read_json(path.with_suffix(".json"))["seconds"]))
        right = {len(array) for array in arrays} == {len(numbers)}
        return Samples(*arrays, record) if right and arrays[3].tolist() == [*numbers] else None
    except Exception:  # whatever zipfile, zlib and numpy make of a damaged or foreign file
        return None


def _shards(config: GenerateConfig, folder: Path = Path()) -> dict[Path, range]:
    """The file of every shard, and the numbers of its samples."""
    size, numbers = config.shard_size, range(config.n)
    return {folder / f"part_{i // size:05d}.npz": numbers[i : i + size] for i in numbers[::size]}


def _join(parts: list[Samples], manifest: dict[str, Any]) -> Samples:
    samples = Samples(*(torch.cat([getattr(part, name) for part in parts]) for name in ARRAYS))
    seconds = 1000 * sum(part.record["seconds"] for part in parts) / len(samples)
    samples.record = manifest | samples.statistics() | dict(seconds_per_1000=seconds)
    return samples


def load_samples(folder: str | Path) -> Samples:
    """The samples of a finished folder. Raises DerkitError for any other folder."""
    folder = Path(folder)
    manifest, summary = (read_json(folder / f"{name}.json") for name in ("manifest", "summary"))
    if "config" not in manifest:
        raise DerkitError(f"{folder} is not a folder of samples (no config in manifest.json).")
    shards = _shards(GenerateConfig.read(manifest["config"]), folder)
    parts = [_read(path, numbers) for path, numbers in shards.items()]
    bad = [path.name for path, part in zip(shards, parts, strict=True) if part is None]
    if bad or not summary:
        raise DerkitError(f"{folder} is not finished: {(bad or ['summary.json'])[0]} is missing or "
                          "damaged. Run its generation again, it makes what is missing.")
    return _join(parts, manifest)


def generate(model: nn.Module, dataset: Dataset, n: int | None = None, *,
             config: GenerateConfig | None = None, folder: str | Path | None = None,
             fresh: bool = False, part: tuple[int, int] = (1, 1), verbose: bool = True,
             **overrides: Any) -> Samples:  # fmt: skip
    """Generate n images (fields of `GenerateConfig` as keywords: init='pca', seed=3, ...).

    folder: write them there; the same call after a kill goes on, to the same bytes. fresh: empty it
    first. part: (i, of) makes every of-th shard from the i-th, others the rest, in any order; who
    finds all there writes summary.json and returns all samples, the others return their own.
    Raises DerkitError on bad input, a folder of another config, a full disk or full memory."""
    config = (config or GenerateConfig()).change(**overrides | ({} if n is None else {"n": n}))
    folder, (i, of), say = folder and Path(folder), part, print if verbose else str
    shards = _shards(config, folder or Path())
    if not 1 <= i <= of <= len(shards) or (of > 1 and (fresh or not folder)):
        raise DerkitError(f"part is I/N, 1 <= I <= N <= {len(shards)} shards (of shard_size), into "
                          f"a folder, not fresh (delete the folder first); found {i}/{of}.")
    job = prepare(model, dataset, config)
    if not folder:
        return _join([job.samples(s) for s in progress(shards.values(), "shards")], job.manifest)
    with contextlib.ExitStack() as held, util.disk_errors(folder):
        others = folder.glob(".part-*") if of == 1 else ()
        for place in {folder / f".part-{i}-of-{of}", *others}:
            held.enter_context(util.hold(place, "generating"))
        _begin(job, folder, fresh)
        if of == 1:
            util.remove_temporary(folder)
        todo = [path for path in list(shards)[i - 1 :: of] if _read(path, shards[path]) is None]
        say(f"making {len(todo)} of {len(shards)} shards in {folder}")
        for path in progress(todo, "shards"):
            job.samples(shards[path]).write(path)
        found = [_read(path, numbers) for path, numbers in shards.items()]
        if None in found:
            say(f"part {i}/{of} is done; {found.count(None)} of {len(found)} shards are to come")
            return _join(found[i - 1 :: of], job.manifest)
        samples = _join(found, job.manifest)
        summary = {k: v for k, v in samples.record.items() if k not in job.manifest}
        write_json(folder / "summary.json", summary)
        return samples


def _begin(job: Job, folder: Path, fresh: bool) -> None:
    """Say in the folder what is being made, or refuse one where something else is."""
    path = folder / "manifest.json"
    if fresh:  # the manifest goes last: what it does not describe must not outlive it
        for file in [folder / "summary.json", *folder.glob("part_[0-9]*.[nj]*"), path]:
            file.unlink(missing_ok=True)
    manifest, new = read_json(path) or job.manifest, job.config.as_dict() | job.manifest
    old = GenerateConfig.read(manifest.get("config")).as_dict() | manifest
    keys = {*job.config.as_dict(), "model", "model_sha256", "data_sha256"} - {"batch_size"}
    different = [f"{key}: {str(old.get(key))[:12]} there, {str(new[key])[:12]} here"
                 for key in sorted(keys) if old.get(key) != new[key]]  # fmt: skip
    if different:
        raise DerkitError(f"{folder} holds samples of another config ({'; '.join(different)}). Use "
                          "its settings, another folder, or fresh=True (--fresh) to replace it.")
    write_json(path, manifest)
