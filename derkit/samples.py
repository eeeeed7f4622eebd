"""Generated images with everything known about them, and the folder that a long generation is written to.

A folder holds manifest.json (written first: what is being made), part_00000.npz, part_00001.npz, ... (each written
whole or not at all), timing.jsonl and summary.json (written last: the mark of a finished folder).
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from derkit.data import Split
from derkit.errors import DerkitError
from derkit.gen_config import GenerateConfig
from derkit.records import atomic_write, disk_errors
from derkit.sampler import Chains


@dataclass
class Samples:
    """Generated images. ``images``, ``x0`` (n, C, H, W) uint8 (rounded, as real ones are stored); ``labels``,
    ``index``, ``steps`` (n,) int64; ``reached`` (n,) bool; energies E(x, y), E(x), p(y|x) of results and starts (n,)
    float64: ``joint``, ``marginal``, ``prob``, ``joint0``, ``marginal0``, ``prob0``; ``target`` (n,): e*. ``record``:
    how they were made."""

    images: Tensor
    x0: Tensor
    labels: Tensor
    index: Tensor
    steps: Tensor
    reached: Tensor
    joint: Tensor
    marginal: Tensor
    prob: Tensor
    joint0: Tensor
    marginal0: Tensor
    prob0: Tensor
    target: Tensor
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def split(self) -> Split:
        """Images and labels as a data split."""
        return Split(self.images, self.labels)

    def statistics(self) -> dict[str, float]:
        """Steps used, share of chains that never moved, that reached their stop, that the classifier calls y;
        saturated pixels."""
        return dict(n=len(self), steps=self.steps.double().mean().item(),
                    stopped_at_0=(self.steps == 0).double().mean().item(), reached=self.reached.double().mean().item(),
                    prob=self.prob.mean().item(), saturated=saturated(self.images), saturated_x0=saturated(self.x0))


ARRAYS = tuple(name for name in Samples.__dataclass_fields__ if name != "record")


def saturated(images: Tensor) -> float:
    """Share of pixels at 0 or 255 (compare with real images: Fashion-MNIST has a black background)."""
    return ((images == 0) | (images == 255)).double().mean().item()


def quantise(x: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8, rounded to nearest."""
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def from_chains(parts: list[Chains], record: dict[str, Any] | None = None) -> Samples:
    """Samples (on the CPU) from the sampler's batches."""
    def join(take) -> Tensor:
        return torch.cat([take(p) for p in parts]).cpu()

    end, start = (torch.cat([getattr(p, k) for p in parts], 1).double().cpu() for k in ("end", "start"))
    return Samples(join(lambda p: quantise(p.x)), join(lambda p: quantise(p.x0)), *(
        join(lambda p, k=k: getattr(p, k)) for k in ("labels", "index", "steps", "reached")),
        *end, *start, join(lambda p: p.target), record or {})


def concatenate(parts: list[Samples], record: dict[str, Any]) -> Samples:
    """One `Samples` of several, in order."""
    return Samples(**{k: torch.cat([getattr(p, k) for p in parts]) for k in ARRAYS}, record=record)


# --------------------------------------------------------------------------------------------------------- shards
def shard_path(folder: Path, i: int) -> Path:
    """part_00000.npz, ..."""
    return folder / f"part_{i:05d}.npz"


def write_shard(path: Path, samples: Samples) -> None:
    """One shard, atomically and always with the same bytes for the same samples. Raises DerkitError when the disk is
    full."""
    buffer = io.BytesIO()
    np.savez(buffer, **{k: getattr(samples, k).numpy() for k in ARRAYS})
    with disk_errors(path):
        atomic_write(path, buffer.getvalue())


def read_shard(path: Path, start: int, stop: int) -> Samples | None:
    """The samples [start, stop) of a shard; None if the file is missing, damaged or holds others."""
    try:
        with zipfile.ZipFile(path) as z:
            if z.testzip() is not None:
                return None
        with np.load(path, allow_pickle=False) as z:
            samples = Samples(**{k: torch.from_numpy(z[k]) for k in ARRAYS})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
    return samples if torch.equal(samples.index, torch.arange(start, stop)) else None


def file_sha256(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_samples(folder: str | Path) -> Samples:
    """The samples of a finished folder. Raises DerkitError for one that is not a folder of samples, unfinished or
    damaged."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise DerkitError(f"{folder} is not a folder of samples (no manifest.json).")
    if not (folder / "summary.json").is_file():
        raise DerkitError(f"{folder} is not finished (no summary.json): run its generation again, it goes on.")
    try:
        manifest, summary = (json.loads((folder / f"{k}.json").read_text()) for k in ("manifest", "summary"))
        config = GenerateConfig(**manifest["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise DerkitError(f"{folder} is not a folder of samples (manifest.json or summary.json: {error}).") from error
    n, size = config.n, config.shard_size
    parts = []
    for i, start in enumerate(range(0, n, size)):
        part = read_shard(shard_path(folder, i), start, min(n, start + size))
        if part is None:
            raise DerkitError(f"{shard_path(folder, i)} is missing or damaged: delete {folder / 'summary.json'} and "
                              "run the generation again, it makes only what is missing.")
        parts.append(part)
    return concatenate(parts, manifest | summary)
