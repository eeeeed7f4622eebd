"""Records: a folder for every run, read back as `Run`, and groups of runs as tables.

A folder holds config.json, env.json, metrics.jsonl, final.json; uncommitted ones checkpoints too.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from derkit.checkpoint import load_model
from derkit.config import VARIANT_NAMES, TrainConfig
from derkit.data import Dataset
from derkit.util import DerkitError, atomic_write, home, nearest, pick, read_json, to_json

METRICS = ("clean", "fgsm", "pgd", "pgd50", "strong", "aa", "dE", "aae")


def runs_folder() -> Path:
    """Where runs are kept: $DERKIT_HOME/runs."""
    return home() / "runs"


def records_folder() -> Path:
    """figures/records of the repository that this package stands in."""
    return Path(__file__).resolve().parents[1] / "figures" / "records"


def signature_of(model: nn.Module | None) -> str:
    """What tells users' modules apart, which configs only call 'custom': layers and shapes."""
    if model is None:
        return ""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return hashlib.sha256(f"{model!r} {shapes}".encode()).hexdigest()[:16]


def run_folder(config: TrainConfig, dataset: Dataset, signature: str = "") -> Path:
    """$DERKIT_HOME/runs/<readable name>-<hash of config, data and the user's own model>."""
    added = dict(none=[], der=["der", config.variant]).get(config.regularizer, [config.regularizer])
    parts = [dataset.name.replace("/", "_"), config.method, *added]
    parts += [f"eps{config.eps:.4g}", f"s{config.seed}", config.hash(dataset.sha256, signature)]
    return runs_folder() / "-".join(parts)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records in a file of JSON lines, [] where there is no file; DerkitError if broken."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError, RecursionError):
            raise DerkitError(f"{path}, line {number} is not a JSON record.") from None
    return rows


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of JSON lines, whole and atomically; NaN and infinity become null."""
    atomic_write(path, "".join(to_json(row) + "\n" for row in rows))


def environment(device: torch.device, precision: str, why: str) -> dict[str, Any]:
    """What numbers depend on beside the config: versions, hardware, threads, and precision."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
        torchvision=version("torchvision"), system=f"{platform.system()} {platform.machine()}",
        device=device.type, gpu=gpu, cpu=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(), precision=precision, precision_reason=why)


class Run:
    """A run, read from its folder, or DerkitError where it holds none, or a file is broken.

    name: of the folder. config, env, final: what the JSON files hold. finished: was it evaluated at
    its end? epochs: a DataFrame, a row per epoch, read when it is first asked for."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        if not (self.folder / "config.json").is_file():
            raise DerkitError(f"{self.folder} is not a run folder (no config.json).")
        files = (self.folder / f"{name}.json" for name in ("config", "env", "final"))
        self.config, self.env, self.final = map(read_json, files)
        self.finished = bool(self.final)

    @cached_property
    def epochs(self) -> pd.DataFrame:
        return pd.DataFrame(read_lines(self.folder / "metrics.jsonl"))

    def model(self, which: str | int = "last", device: str | torch.device = "cpu",
              model: nn.Module | None = None) -> nn.Module:
        """The network of the 'last', the 'best' or a numbered epoch (`TrainConfig.keep_every`), in
        eval mode. A user's own needs ``model``, the module to fill."""
        names = {"last": "final", "best": "best"}
        names |= {p.stem[6:]: p.stem for p in self.folder.glob("epoch-*.safetensors")}
        file = f"{pick('epoch', str(which), names)}.safetensors"
        return load_model(self.folder / file, device=device, model=model)

    def __repr__(self) -> str:
        return f"Run({self.name}, {len(self.epochs)} epochs{', finished' * self.finished})"


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """All runs under a folder, sorted by name."""
    return [Run(path.parent) for path in sorted(Path(folder).glob("*/config.json"))]


def load_records(name: str, root: Path | None = None) -> dict[str, list[Run]]:
    """Committed runs of one suite in its order, by the suite's label, else such as 'pgd + der'."""
    root = root or records_folder()
    if not (root / name).is_dir():
        names = sorted(path.name for path in root.glob("*/"))
        raise DerkitError(f"no records {name!r} in {root}.{nearest(name, names)} There are: "
                          f"{', '.join(names) or 'none'}.")
    runs = [run for run in load_runs(root / name) if run.finished]
    runs.sort(key=lambda run: (run.config.get("order", 0), run.config["train"]["seed"]))
    groups: dict[str, list[Run]] = {}
    for run in runs:
        parts = run.config["train"]["method"], run.config["train"]["regularizer"]
        label = run.config.get("label") or " + ".join(parts).removesuffix(" + none")
        groups.setdefault(label, []).append(run)
    return groups


def load_tested(name: str) -> dict[str, list[Run]]:
    """`load_records` without the settings that were only tried, whose labels hold a ': '."""
    return {label: runs for label, runs in load_records(name).items() if ": " not in label}


WORDS = dict(fgsm="FGSM", rs_fgsm="RS-FGSM", n_fgsm="N-FGSM", zerograd="ZeroGrad", pgd="PGD",
             trades="TRADES", weat="WEAT", der="DER", gradalign="GradAlign", elle="ELLE",
             aaer="AAER")


def title(label: str) -> str:
    """A label as people say it: 'n_fgsm + der norm' -> 'N-FGSM + DER (norm)'."""
    words = re.sub(r"[a-z_]+", lambda word: WORDS.get(word[0], word[0]), label)
    return re.sub(rf"DER ({'|'.join(VARIANT_NAMES)})", r"DER (\1)", words)


def load_costs(name: str, root: Path | None = None) -> pd.Series:
    """Cost of a training step by label, relative to the suite's first run."""
    costs = read_json((root or records_folder()) / name / "cost.json").get("ratio", {})
    return pd.Series(costs, name="cost", dtype=float)


def grid(folder: Path) -> dict[str, list[Run]]:
    """Finished runs named <point>-s<seed> by point, or DerkitError for none."""
    groups: dict[str, list[Run]] = {}
    for run in load_runs(folder):
        if run.finished:
            groups.setdefault(re.sub(r"-s\d+$", "", run.name), []).append(run)
    if not groups:
        raise DerkitError(f"no finished runs in {folder}.")
    return groups
