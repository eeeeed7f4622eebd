"""Records: one folder a run, with config.json, metrics.jsonl (a line an epoch), env.json, final.json and checkpoints."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch

from derkit.data_sources import home
from derkit.errors import DerkitError


def runs_folder() -> Path:
    """Where runs are kept: $DERKIT_HOME/runs."""
    return home() / "runs"


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically; numbers that JSON cannot hold become null."""
    atomic_write(path, json.dumps(_plain(value), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into a DerkitError that says what is kept and how to go on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make the folder writable"
        raise DerkitError(f"could not write {path} ({error.strerror or error}). Nothing half-written is kept and finished "
                          f"files stay: {remedy} and run the same again to go on.") from error


def append_line(path: Path, record: dict[str, Any]) -> None:
    """One JSON line at the end of a file, on the disk when this returns. The torn line of a killed writer is dropped
    first; a write that fails leaves the file as it was."""
    line = (json.dumps(_plain(record)) + "\n").encode()
    with open(path, "ab+", buffering=0) as f:
        _drop_torn_line(f)
        end = f.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that fills up takes a part, and then says why
                line = line[f.write(line) :]
            os.fsync(f.fileno())
        except BaseException:
            f.truncate(end)
            raise


def _drop_torn_line(f: Any) -> None:
    """Cut an open binary file after its last line break, if a write broke off behind it."""
    size = f.seek(0, os.SEEK_END)
    if not size:
        return
    f.seek(size - 1)
    if f.read(1) != b"\n":
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file. A truncated last line is skipped with a warning; a broken one elsewhere is an error."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):  # broken JSON, or a character cut in half
            if i < len(lines) - 1:
                raise DerkitError(f"{path}, line {i + 1} is not JSON.") from None
            warnings.warn(f"{path.name}: the last line is truncated and was skipped.", stacklevel=2)
    return rows


def keep_epochs(path: Path, epochs: int) -> None:
    """Drop lines of epochs that the checkpoint does not know (a kill fell between the line and the checkpoint)."""
    rows = [r for r in read_lines(path) if r["epoch"] <= epochs]
    atomic_write(path, "".join(json.dumps(r) + "\n" for r in rows))


def remove_temporary(folder: Path) -> None:
    """Delete what a writer that was killed left beside its files. Only for the holder of the folder's lock."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def lock_file(path: Path, *, shared: bool = False, refusal: str = "") -> IO[str]:
    """Hold a lock until the returned file is closed (or the process ends, however it ends).

    shared: beside others that hold it shared. ``refusal``: the DerkitError raised where the lock is not free; without it, wait.
    Without file locks (Windows) nothing is checked.
    """
    handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 (kept open on purpose); "a": a look changes nothing
    try:
        import fcntl
    except ImportError:
        return handle
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if refusal else 0))
    except OSError as error:
        handle.close()
        if refusal and isinstance(error, BlockingIOError):
            raise DerkitError(refusal) from None
        raise
    return handle


def lock_folder(folder: Path) -> IO[str]:
    """Hold a run folder, as `lock_file` does; DerkitError where another process holds it."""
    return lock_file(folder / "lock", refusal=f"another process is training in {folder}. Wait for it, or choose another folder.")


def environment(device: torch.device, precision: str, why: str) -> dict[str, Any]:
    """What the numbers depend on beside the config: versions, hardware, threads, precision and the reason for it."""
    import numpy
    import torchvision

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                numpy=numpy.__version__, system=f"{platform.system()} {platform.machine()}", device=device.type, gpu=gpu,
                cpu=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(), precision=precision,
                precision_reason=why)


class Run:
    """A finished or running run, read from its folder. ``epochs`` is a DataFrame, one row per epoch."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise DerkitError(f"{self.folder} is not a run folder (no config.json).")
        self.config: dict[str, Any] = self._json("config.json")
        self.env: dict[str, Any] = self._json("env.json")
        self.final: dict[str, Any] = self._json("final.json")
        self.epochs = pd.DataFrame(read_lines(self.folder / "metrics.jsonl"))

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are no text
            raise DerkitError(f"{path} is not JSON ({error}). Restore or delete it.") from None
        if not isinstance(found, dict):
            raise DerkitError(f"{path} holds a {type(found).__name__}, not a record. Restore or delete it.")
        return found

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        return bool(self.final)

    def steps(self, column: str) -> list[float]:
        """A per-step series of the whole run: 'loss', 'acc' or 'aae' (accuracy on x*, share of AAEs)."""
        return [v for row in self.epochs["steps"] for v in row[column]]

    def __repr__(self) -> str:
        return f"Run({self.name}, {len(self.epochs)} epochs{', finished' if self.finished else ''})"


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """All runs under a folder, sorted by name (committed records and live run folders look alike)."""
    return [Run(p.parent) for p in sorted(Path(folder).glob("*/config.json"))]
