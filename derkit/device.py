"""Where and how precisely a run computes."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from derkit.config import AUTO, TrainConfig
from derkit.distributed import device_name
from derkit.errors import DerkitError


def choose_device(name: str = AUTO) -> torch.device:
    """'auto': the first GPU (with several processes this one's own), else the CPU. Raises DerkitError where it is not there."""
    name = device_name(name)
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DerkitError(f"device {name!r} is not usable here ({str(error).splitlines()[0]}). Use device=auto or cpu.") from error
    return device


def choose_precision(config: TrainConfig, device: torch.device) -> tuple[str, str]:
    """(precision, reason). bf16 wherever the GPU has it; fp16 gradients of inputs underflow, so attacks stay in fp32 there."""
    if config.precision != AUTO:
        return config.precision, "set in the config"
    if device.type != "cuda":
        return "fp32", f"auto on {device.type}"
    if config.regularizer == "gradalign":
        return "fp32", "gradalign's input gradients are too small for half precision"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU has bf16"
    if torch.cuda.get_device_capability(device)[0] >= 7:
        return "fp16", "the GPU has fp16 but no bf16; attacks run in fp32"
    return "fp32", "the GPU has no fast half precision"


def autocast(device: torch.device, precision: str):
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()
