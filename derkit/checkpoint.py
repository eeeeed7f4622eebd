"""Checkpoints that describe themselves (safetensors with JSON beside the weights), resume states.
Nothing is unpickled, every write is atomic."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from derkit.models import build_model, describe, same_network
from derkit.util import DerkitError, atomic_write, pick

FORMAT, ASSETS = "derkit-2", Path(__file__).parent / "assets"


def state_hash(state: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, model: nn.Module,
                    config: dict[str, Any] | None = None, **info: Any) -> None:
    """Write a model's weights, its spec, the config of its training and ``info`` (plain values).
    A model not built by `build_model` is stored as 'custom': loading it needs the module."""
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    spec = getattr(model, "spec", None) or {"name": "custom"}
    tables = {"spec": spec, "config": config or {}, "info": info}
    metadata = {name: json.dumps(table) for name, table in tables.items()}
    metadata |= dict(format=FORMAT, variant=describe(spec), sha256=state_hash(state))
    atomic_write(Path(path), save(state, metadata))


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """The checkpoint as a dict: spec, variant, config, state, sha256 and what `info` held.
    Raises DerkitError for a missing, truncated, foreign or forged file."""
    if not Path(path).is_file():
        raise DerkitError(f"checkpoint {path} does not exist.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise DerkitError(f"{path} is truncated or not a checkpoint ({error}).") from error
    if metadata.get("format") != FORMAT:
        raise DerkitError(f"{path} is not a derkit checkpoint (format {FORMAT!r}).")
    try:
        tables = {name: dict(json.loads(metadata[name])) for name in ("spec", "config", "info")}
        variant = describe(tables["spec"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DerkitError(f"{path} is a forged or broken checkpoint ({error!r}).") from error
    if state_hash(state) != metadata.get("sha256"):
        raise DerkitError(f"{path}: the weights do not match the recorded sha256.")
    info = tables.pop("info")
    return info | tables | dict(variant=variant, state=state, sha256=metadata["sha256"])


def load_model(path: str | os.PathLike, *, classes: int | None = None,
               model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a checkpoint, in eval mode and in the precision of its weights.

    classes: if given, the number that the data has, or DerkitError. model: the module to fill,
    for custom ones."""
    content = load_checkpoint(path)
    spec, found, given = content["spec"], content["variant"], getattr(model, "spec", None)
    if classes is not None and spec.get("classes", classes) != classes:
        raise DerkitError(f"{path} has {spec['classes']} classes, the data has {classes}.")
    if spec["name"] == "custom" and model is None:
        raise DerkitError(f"{path} holds a custom module: pass model=YourModule().")
    floats = [t.dtype for t in content["state"].values() if t.is_floating_point()]
    try:
        if model is None:
            model = build_model(**spec)
        elif given and spec["name"] != "custom" and not same_network(given, spec):
            raise DerkitError(f"it is {describe(given)}.")
        model.to(floats[0] if floats else torch.float32).load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # a forged spec, too
        reason = " ".join(str(error).split())
        raise DerkitError(f"{path} ({found}) does not fit the model: {reason}") from error
    return model.to(device).eval()


def pretrained() -> pd.DataFrame:
    """The models that come with the kit, a row each: test accuracies as measured on these very
    weights, data, the command that trained them, sha256 of the weights."""
    rows = {}
    for path in sorted(ASSETS.glob("model-*.safetensors")):
        content = load_checkpoint(path)
        rows[path.stem.removeprefix("model-")] = {name: content[name] for name in (
            "clean", "pgd", "strong", "eps", "data", "variant", "command", "sha256")}
    return pd.DataFrame.from_dict(rows, orient="index")


def load_pretrained(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A model that comes with the kit (`pretrained`), in eval mode and float32 (stored in half
    precision). Raises DerkitError for a name that there is not."""
    pick("model", name, dict.fromkeys(pretrained().index))
    return load_model(ASSETS / f"model-{name}.safetensors", device=device).float()


def save_state(path: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write what a run needs to go on: tensors and plain values, in dicts and lists."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(Path(path), buffer.getvalue())


def load_state(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What `save_state` wrote. Raises DerkitError for a missing, truncated or hostile file."""
    if not Path(path).is_file():
        raise DerkitError(f"state {path} does not exist.")
    try:
        return {**torch.load(path, map_location=device, weights_only=True)}
    except Exception as error:  # torch raises many kinds for a truncated or hostile file
        raise DerkitError(f"{path} is truncated or holds more than data.") from error
