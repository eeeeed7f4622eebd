"""Batched augmentation on the device: whole batches of uint8 images, one random draw per image."""

from __future__ import annotations

import torch
from torch import Tensor

from derkit.errors import unknown


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> floats in [0, 1]."""
    return images.to(dtype).div_(255)


AUGMENTATIONS = ("none", "flip", "crop", "crop_flip", "crop_reflect_flip")


def augment_batch(images: Tensor, kind: str, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Random crop after padding by 4 (zeros, or reflection in 'crop_reflect_flip') and horizontal flip, per image."""
    if kind not in AUGMENTATIONS:
        raise unknown("augment", kind, AUGMENTATIONS)
    b, _, h, w = images.shape
    device = images.device
    if "crop" in kind:
        if "reflect" in kind:
            padded = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="reflect").to(images.dtype)
        else:
            padded = torch.nn.functional.pad(images, (pad,) * 4)
        dy, dx = torch.randint(0, 2 * pad + 1, (2, b), generator=generator, device=device)
        rows = dy[:, None] + torch.arange(h, device=device)
        cols = dx[:, None] + torch.arange(w, device=device)
        batch = torch.arange(b, device=device)[:, None, None]
        images = padded[batch, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    if "flip" in kind:
        flip = torch.rand(b, generator=generator, device=device) < 0.5
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    return images


# ------------------------------------------------------------------------------------------------------- loading
