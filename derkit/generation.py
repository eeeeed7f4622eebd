"""Images from a classifier read as an energy-based model: 16 in memory, or 50,000 in a folder that survives a kill.

    python -m derkit.generation --checkpoint FILE --set n=5000 --set init=local_pca
    torchrun --nproc-per-node 4 -m derkit.generation --checkpoint FILE --set n=50000 --folder DIR
    python -m derkit.generation --help
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from derkit import samples as store
from derkit.data import Dataset
from derkit.errors import DerkitError
from derkit.gen_config import GenerateConfig
from derkit.jobs import Job, prepare
from derkit.models import describe
from derkit.progress import progress
from derkit.records import append_line, disk_errors, environment, lock_file, read_lines, write_json
from derkit.samples import Samples, concatenate, from_chains, shard_path

Part = tuple[int, int]


def generate(model: nn.Module, dataset: Dataset, n: int | None = None, *, config: GenerateConfig | None = None,
             folder: str | Path | None = None, fresh: bool = False, part: Part = (1, 1), verbose: bool = True,
             **overrides: Any) -> Samples:
    """Generate n images (fields of `GenerateConfig` as keywords: init='pca', stop='fixed', seed=3, ...).

    folder: write shards of ``shard_size`` images there; what is already there is kept, so that the same call after a
    kill goes on and ends with the same bytes. Without it everything stays in memory. fresh: delete the folder's
    samples first. part: (i, n), i from 1: this process makes every n-th shard, others the rest, in any order and number;
    the one that finds all done returns all samples and writes summary.json, the others return their own.
    Raises DerkitError before any work on bad input, on a folder of another config, and when the disk is full.
    """
    job = prepare(model, dataset, config, **overrides | ({} if n is None else {"n": n}))
    _check_part(part, job.config, folder, fresh)
    if folder is None:
        began = time.perf_counter()
        n, size = job.config.n, job.config.shard_size  # the same batches as in a folder, and so the same bytes
        samples = concatenate([_range(job, a, min(n, a + size), "sampling") for a in range(0, n, size)], {})
        seconds = time.perf_counter() - began
        samples.record = manifest(job) | samples.statistics() | dict(seconds_per_1000=1000 * seconds / len(samples))
        return samples
    return _to_folder(job, Path(folder), fresh, part, print if verbose else (lambda *a: None))


def _check_part(part: Part, config: GenerateConfig, folder: str | Path | None, fresh: bool) -> None:
    i, n = part
    shards = -(-config.n // config.shard_size)
    if not 1 <= i <= n:
        raise DerkitError(f"part is i/n with 1 <= i <= n, found {i}/{n}.")
    if n > shards:
        raise DerkitError(f"part {i}/{n} of {shards} shards: some parts would have nothing to do. Use at most {shards} parts, or a "
                          f"shard_size of at most {config.n // n} (found {config.shard_size}).")
    if n > 1 and folder is None:
        raise DerkitError("several parts meet in a folder: pass one.")
    if n > 1 and fresh:
        raise DerkitError("fresh would delete what the other parts have made: delete the folder, then start them all.")


def _range(job: Job, start: int, stop: int, desc: str) -> Samples:
    """Samples [start, stop) in batches."""
    size = job.config.batch_size
    batches = [range(i, min(stop, i + size)) for i in range(start, stop, size)]
    try:
        return from_chains([job.run(b) for b in progress(batches, desc=desc)])
    except torch.OutOfMemoryError as error:
        raise DerkitError(f"out of memory with batch_size={size}: set a smaller one (finished shards stay).") from error


def manifest(job: Job) -> dict[str, Any]:
    """What the samples are made from: config, model, data, image source."""
    spec = getattr(job.model, "spec", None)
    return dict(config=job.config.as_dict(), seed=job.config.seed, model_sha256=job.model_sha256,
                model=describe(spec) if spec else type(job.model).__name__, dataset=job.dataset.name,
                source=job.dataset.source, data_sha256=job.dataset.sha256,
                classes=[job.dataset.classes[c] for c in job.classes])


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two manifests disagree on, of all that changes results."""
    def flat(m: dict[str, Any]) -> dict[str, Any]:
        return GenerateConfig(**m["config"]).identity() | {k: m[k] for k in ("model_sha256", "data_sha256")}

    a, b = flat(old), flat(new)
    return [f"{k}: {str(a[k])[:12]} there, {str(b[k])[:12]} here" for k in b if a[k] != b[k]]


def _to_folder(job: Job, folder: Path, fresh: bool, part: Part, say: Callable[[str], None]) -> Samples:
    new = json.loads(json.dumps(manifest(job)))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _writer(folder, part):
        with _turn(folder):
            _open(folder, new, fresh, alone=part[1] == 1)
            if (folder / "summary.json").is_file():
                say(f"loaded the finished samples in {folder} (same config; not generated again)")
                return store.load_samples(folder)
            if not (folder / "manifest.json").is_file():
                with disk_errors(folder / "manifest.json"):
                    write_json(folder / "env.json", environment(job.pool.images.device, str(job.pool.dtype), "the images'"))
                    write_json(folder / "manifest.json", new)
        n, size = job.config.n, job.config.shard_size
        shards = [(i, a, min(n, a + size)) for i, a in enumerate(range(0, n, size))]
        own = shards[part[0] - 1 :: part[1]]
        parts = {i: store.read_shard(shard_path(folder, i), a, b) for i, a, b in own}
        kept = sum(p is not None for p in parts.values())
        if kept:
            say(f"resuming {folder}: {kept} of {len(own)} shards are there")
        timing = folder / (f"timing_{part[0]}.jsonl" if part[1] > 1 else "timing.jsonl")
        for i, a, b in progress([s for s in own if parts[s[0]] is None], desc=f"shards of {size}"):
            began = time.perf_counter()
            parts[i] = _range(job, a, b, f"shard {i + 1}/{len(shards)}")
            store.write_shard(shard_path(folder, i), parts[i])
            with disk_errors(timing):
                append_line(timing, dict(shard=i, n=b - a, seconds=round(time.perf_counter() - began, 3)))
        with _turn(folder):
            timed = {t["shard"] for t in _timings(folder)}
            for i, a, b in own:  # of a process that was killed before it could say how long they took
                if i not in timed:
                    append_line(timing, dict(shard=i, n=b - a, seconds=None))
            for i, a, b in shards:  # of the other parts; one without its time is not over yet
                if i not in parts:
                    parts[i] = store.read_shard(shard_path(folder, i), a, b) if i in timed else None
            missing = sum(p is None for p in parts.values())
            if (folder / "summary.json").is_file():  # the last of the other parts was quicker
                return concatenate([parts[i] for i, _, _ in own], new)
            if missing:
                say(f"part {part[0]}/{part[1]} is done; {missing} of {len(shards)} shards of other parts are still to come")
                return concatenate([parts[i] for i, _, _ in own], new)
            return _finish(folder, new, concatenate([parts[i] for i, _, _ in shards], new))


def _open(folder: Path, new: dict[str, Any], fresh: bool, alone: bool) -> None:
    """Refuse a folder of another config; remove what a kill left half-written (if no other part may be writing), and with
    ``fresh`` everything."""
    path = folder / "manifest.json"
    if path.is_file() and not fresh:
        try:
            differences = _differences(json.loads(path.read_text()), new)
        except (ValueError, KeyError, TypeError) as error:
            raise DerkitError(f"{path} is not a manifest of samples ({error}). Choose another folder.") from error
        if differences:
            raise DerkitError(f"{folder} holds samples of another config ({'; '.join(differences)}). Choose another "
                              "folder, use the old settings to go on with it, or replace it with fresh=True (--fresh).")
    replaced = ("summary.json", "manifest.json", "part_*.npz", "timing*.jsonl") if fresh else ()
    for pattern in (*replaced, ".part_*.npz.*.tmp", ".*.json.*.tmp") if alone else ():
        for file in folder.glob(pattern):
            file.unlink()


def _writer(folder: Path, part: Part) -> IO[str]:
    """One process at a time writes to a folder, or parts of one work, which share it."""
    with disk_errors(folder):
        return lock_file(folder / ".lock", shared=part[1] > 1,
                         refusal=f"another process is writing to {folder}: wait, or choose another folder.")


def _turn(folder: Path) -> IO[str]:
    """Parts open and finish a folder one after the other."""
    with disk_errors(folder):
        return lock_file(folder / ".turn")


def _timings(folder: Path) -> list[dict[str, Any]]:
    """A line per shard that was made: shard, n, seconds."""
    return [line for path in sorted(folder.glob("timing*.jsonl")) for line in read_lines(path)]


def _finish(folder: Path, record: dict[str, Any], samples: Samples) -> Samples:
    """Write summary.json: statistics, seconds of computing (summed over processes), and the hash of every shard."""
    timing = [t for t in _timings(folder) if t["seconds"] is not None]
    made = sum(t["n"] for t in timing)
    summary = samples.statistics() | dict(
        seconds_per_1000=1000 * sum(t["seconds"] for t in timing) / made if made else None,
        shards={p.name: store.file_sha256(p) for p in sorted(folder.glob("part_*.npz"))})
    with disk_errors(folder / "summary.json"):
        write_json(folder / "summary.json", summary)
    samples.record = record | summary
    return samples


if __name__ == "__main__":
    from derkit.gen_cli import main

    raise SystemExit(main())
