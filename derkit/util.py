"""What every room needs: errors, files, generators, devices, progress bars, several processes."""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save

AUTO = "auto"


class DerkitError(ValueError):
    """Bad input, found before any long work starts."""


def nearest(found: object, allowed: Collection[str]) -> str:
    """' Did you mean 'x'?' for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(found).lower(), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, found: object, allowed: Collection[str]) -> DerkitError:
    """The error for a name that is not among the allowed ones."""
    hint = nearest(found, allowed)
    return DerkitError(f"unknown {kind} {found!r}.{hint} Allowed: {', '.join(allowed)}.")


def pick(kind: str, name: str, table: dict[str, Any]) -> Any:
    """``table[name]``, or the error that names the nearest valid choice."""
    if name not in table:
        raise unknown(kind, name, table)
    return table[name]


def home() -> Path:
    """The folder for runs and caches: $DERKIT_HOME, else ~/.cache/derkit."""
    return Path(os.environ.get("DERKIT_HOME") or "~/.cache/derkit").expanduser()


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary(folder: Path) -> None:
    """Delete what a killed writer left beside its files. Only for the holder of the folder."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which NaN and infinity, which JSON cannot hold, are null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, atomically; NaN and infinity become null."""
    atomic_write(path, to_json(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The record in a JSON file, {} where there is no file; DerkitError if it holds none."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:  # no text, no JSON, no record
        raise DerkitError(f"{path} is not a JSON record ({error}). Restore or delete it.") from None


def cached(kind: str, key: tuple, make: Callable[..., Any], *args: Any) -> list[torch.Tensor]:
    """The tensors of ``make(*args)`` on the CPU, kept in DERKIT_HOME/cache under the key's hash.
    A damaged file is made anew, a cache that cannot be written is skipped."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = home() / "cache" / f"{kind}-{name}.safetensors"
    with contextlib.suppress(OSError, KeyError, SafetensorError):
        found = load(path.read_bytes())
        return [found[str(i)] for i in range(len(found))]
    made = make(*args)
    tensors = [t.cpu().contiguous() for t in (made if isinstance(made, tuple) else (made,))]
    with contextlib.suppress(OSError):
        atomic_write(path, save({str(i): t for i, t in enumerate(tensors)}))
    return tensors


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into a DerkitError that says what is kept and how to go on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make the folder writable"
        raise DerkitError(
            f"could not write {path} ({error.strerror or error}). Nothing half-written is kept and "
            f"finished files stay: {remedy} and run the same again to go on.") from error


def hold(folder: Path, what: str) -> contextlib.AbstractContextManager:
    """Make the folder and hold it against other processes that are ``what`` ('training') in it."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return filelock.FileLock(folder / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            advice = "Wait for it, or choose another folder."
            raise DerkitError(f"another process is {what} in {folder}. {advice}") from None


def make_generator(device: torch.device | str, *seed: int | str) -> torch.Generator:
    """A generator on the device, seeded from numbers and words: one stream for each purpose."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))


def choose_device(name: str = AUTO) -> torch.device:
    """'auto': a GPU (each of several processes its own), else the CPU. DerkitError if it fails."""
    count, gpus = launched()[1], torch.cuda.device_count()
    if name == AUTO:
        name = "cuda" if gpus else "cpu"
    if count > 1 and name == "cuda":
        here = int(os.environ["LOCAL_RANK"])
        if here >= gpus:
            raise DerkitError(f"process {here} of this machine has no GPU of its own, found {gpus}."
                              f" Start at most {gpus} (--nproc-per-node), or set device=cpu.")
        name = f"cuda:{here}"
    elif count > 1 and name != "cpu":
        raise DerkitError(f"device {name!r} is one device for {count} processes. Use device=auto "
                          "(each takes a GPU of its own), cuda or cpu.")
    try:
        return torch.empty(1, device=name, dtype=torch.float64).device  # mps has no float64
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = f"device {name!r} is not usable here ({str(error).splitlines()[0]})."
        raise DerkitError(f"{reason} Use device=auto or cpu.") from error


def choose_precision(precision: str, regularizer: str, device: torch.device) -> tuple[str, str]:
    """(precision, reason) for the config's precision. 'auto' takes bf16 where the GPU has it."""
    if precision != AUTO:
        return precision, "set in the config"
    if device.type != "cuda":
        return "fp32", f"auto on {device.type}"
    if regularizer == "gradalign":
        return "fp32", "gradalign's input gradients are too small for half precision"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU has bf16"
    if torch.cuda.get_device_capability(device)[0] >= 7:  # input gradients underflow in fp16
        return "fp16", "the GPU has fp16 but no bf16; attacks run in fp32"
    return "fp32", "the GPU has no fast half precision"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Half precision inside the block for 'bf16' and 'fp16', and nothing for other names."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def images_format(model: torch.nn.Module) -> torch.memory_format:
    """The memory format of a model's images and weights: channels_last where it is safe and pays.

    On a CPU a pointwise convolution with stride and fewer than 8 input channels corrupts the heap
    in its float32 backward pass (AVX2; torch 2.6 to 2.14, docs/channels_last.md), and convolutions
    of fewer than 8 filters gain nothing. A network with either stays contiguous there, and so does
    one with a single convolution, whose maps would be copied back at once."""
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    on_gpu = any(p.is_cuda for p in model.parameters())
    if len(convolutions) == 1 and not on_gpu:
        return torch.contiguous_format
    for conv in convolutions if not on_gpu else []:
        strided_pointwise = conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        if conv.out_channels < 8 or (strided_pointwise and conv.in_channels < 8):
            return torch.contiguous_format
    return torch.channels_last if convolutions else torch.contiguous_format


def watched() -> bool:
    """Does a person look on? On a terminal; in a notebook, where the front end lets cells ask for
    input, which papermill and nbval do not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "get_parent"):  # no kernel
        return sys.stderr.isatty()
    return bool(shell.get_parent().get("content", {}).get("allow_stdin"))


def progress(items: Iterable, desc: str = "", **options: Any) -> Iterable:
    """``items`` behind a bar where a person may watch: see `watched`."""
    if not watched() or os.environ.get("TQDM_DISABLE") or rank() != 0:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=desc, leave=False, **options)


def launched() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says it in the environment; (0, 1) without it."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Number of this process; 0 is the one that evaluates, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else launched()[0]


def world() -> int:
    """Number of processes in the group; 1 without torchrun and before `processes`."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """The process group of torchrun while the block runs. Nothing for one process, or inside."""
    if launched()[1] == 1 or dist.is_initialized():
        yield
        return
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here < gpus:
        torch.cuda.set_device(here)
    patience = timedelta(hours=6)  # for those that wait while process 0 evaluates
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=patience)
    yield
    dist.destroy_process_group()  # not after an error: it could wait for a process that is gone


def report(error: BaseException) -> None:
    """Print the error that ends this process on stderr, once for all that end by the same."""
    if rank() == 0 or (dist.is_initialized() and not getattr(error, "shared", False)):
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # torchrun ends the others when one is gone: process 0 prints first


def everywhere(call: Callable[[], Any]) -> Any:
    """``call()`` on every process. If it fails on one, all raise its error, marked ``shared``."""
    if world() == 1:
        return call()
    value, cause, problem = None, None, None
    try:
        value = call()
    except Exception as error:
        kind = FloatingPointError if isinstance(error, FloatingPointError) else DerkitError
        text = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
        where = f"process {rank()} of {world()}: " if rank() else ""
        cause, problem = error, kind(where + text)
    problems: list[Any] = [None] * world()
    dist.all_gather_object(problems, problem)  # nobody waits for a process that has failed
    shared = next(filter(None, problems), None)
    if shared is None:
        return value
    shared.shared = True
    raise shared from cause


def first(call: Callable[[], Any]) -> Any:
    """``call()`` on process 0 while the others wait; all get its value (plain data) or error."""
    box = [everywhere(lambda: call() if rank() == 0 else None)]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def in_turn(call: Callable[[], Any]) -> Any:
    """``call()`` on one process a machine, then on the others: these read what it downloads."""
    early = os.environ.get("LOCAL_RANK", "0") == "0"
    value = everywhere(lambda: call() if early else None)
    return everywhere(lambda: value if early else call())
