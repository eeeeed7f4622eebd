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


def images_format(model: torch.nn.Module) -> torch.memory_format:
    """The memory format of a model's images and weights: channels_last where it is safe and pays.

    On a CPU a pointwise convolution with stride and fewer than 8 input channels corrupts the heap in its float32
    backward pass (AVX2; torch 2.6 to 2.14), and convolutions of fewer than 8 filters gain nothing: such a network
    stays contiguous there.
    """
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    on_gpu = any(p.is_cuda for p in model.parameters())
    for conv in convolutions if not on_gpu else []:
        strided_pointwise = conv.kernel_size == (1, 1) and conv.stride != (1, 1)
        if conv.out_channels < 8 or (strided_pointwise and conv.in_channels < 8):
            return torch.contiguous_format
    return torch.channels_last if convolutions else torch.contiguous_format


def autocast(device: torch.device, precision: str):
    if precision in ("bf16", "fp16"):
        return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
    return nullcontext()
