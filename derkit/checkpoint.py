"""Checkpoints that describe themselves: state dict, model spec, config, hash. Written atomically, loaded without pickle code."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from derkit.errors import CheckpointError
from derkit.models import build_model, describe, same_network
from derkit.records import atomic_write

FORMAT = "derkit-1"


def state_hash(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike, model: nn.Module, config: dict[str, Any] | None = None, **extra: Any) -> None:
    """Write a model's checkpoint atomically. ``extra`` must be tensors and plain values (epoch, optimiser state, ...).

    A model not built by `build_model` is stored as 'custom': loading it needs the module.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    spec = getattr(model, "spec", None) or {"name": "custom"}
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, spec=spec, variant=describe(spec), config=config or {}, state=state,
                    sha256=state_hash(state), **extra), buffer)
    atomic_write(Path(path), buffer.getvalue())


def load_checkpoint(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The checkpoint as a dict, after checking format and hash.

    Raises CheckpointError for a missing, truncated or foreign file, or one that holds anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist.")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many kinds for a truncated or hostile file
        text = str(error)
        if "Weights only load failed" in text or "Unsupported" in text or "weights_only" in text:
            raise CheckpointError(f"{path} holds Python objects, not only tensors and plain values: not loaded.") from error
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({type(error).__name__}).") from error
    needed = {"spec", "variant", "state", "sha256"}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not needed <= set(content):
        raise CheckpointError(f"{path} is not a derkit checkpoint (format {FORMAT!r}).")
    tables = isinstance(content["spec"], dict) and isinstance(content["state"], dict) and "name" in content["spec"]
    if not tables or not all(isinstance(v, torch.Tensor) for v in content["state"].values()):
        raise CheckpointError(f"{path} is not a derkit checkpoint: its spec or state is not what the format says.")
    if state_hash(content["state"]) != content["sha256"]:
        raise CheckpointError(f"{path}: the weights do not match the recorded sha256.")
    return content


def load_model(path: str | os.PathLike, *, classes: int | None = None, model: nn.Module | None = None,
               device: str | torch.device = "cpu", variant: str | None = None) -> nn.Module:
    """The model of a checkpoint, in eval mode.

    classes: if given, the number that the data has. variant: if given, the variant that the caller needs
    (`derkit.models.describe`). model: the module to fill, needed for checkpoints of a custom module.
    Raises CheckpointError where the checkpoint is of another variant or number of classes.
    """
    content = load_checkpoint(path)
    spec = content["spec"]
    if classes is not None and spec.get("classes", classes) != classes:
        raise CheckpointError(f"{path} has {spec['classes']} classes, the data has {classes}.")
    if variant is not None and content["variant"] != variant:
        raise CheckpointError(f"{path} holds {content['variant']}, but {variant} was asked for.")
    if model is None:
        if spec["name"] == "custom":
            raise CheckpointError(f"{path} holds a custom module: pass model=YourModule().")
        try:
            model = build_model(**spec)
        except (TypeError, ValueError, RuntimeError) as error:  # a forged spec; DerkitError is a ValueError
            raise CheckpointError(f"{path} names a network that cannot be built: {error}") from error
    found = getattr(model, "spec", None)
    if found and spec["name"] != "custom" and not same_network(found, spec):
        raise CheckpointError(f"{path} ({content['variant']}) does not fit the model, which is {describe(found)}.")
    dtype = next((t.dtype for t in content["state"].values() if t.is_floating_point()), torch.float32)
    try:
        model.to(dtype).load_state_dict(content["state"])
    except RuntimeError as error:
        raise CheckpointError(f"{path} ({content['variant']}) does not fit the model: {error}") from error
    return model.to(device).eval()
