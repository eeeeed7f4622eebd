"""Random numbers keyed by the sample: a function of (seed, global index of the sample, purpose, step), not of a stream.

So a sample is the same whatever the batch that it is computed in and whenever it finishes. The generator is
Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer tensor operations:
whole batches at once, on every device, the same bits everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from derkit.errors import pick

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
PURPOSES = {"target": 1, "init": 2, "pixels": 3, "langevin": 4}  # independent streams of one sample
STEP_BITS = 24


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Ten rounds on counters (..., 4), int64 holding 32-bit words; returns (..., 4) words in [0, 2^32)."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # the low 64 bits are exact although int64 wraps
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return torch.stack([c0, c1, c2, c3], -1)


def words(index: Tensor, count: int, seed: int, purpose: str, step: int = 0) -> Tensor:
    """(B, count) random 32-bit words for the samples with global ``index`` (B,)."""
    stream = (pick("purpose", purpose, PURPOSES) << STEP_BITS) + step
    blocks = -(-count // 4)
    index = index.to(torch.int64)
    counter = torch.empty(len(index), blocks, 4, dtype=torch.int64, device=index.device)
    counter[..., 0] = torch.arange(blocks, device=index.device)
    counter[..., 1] = stream
    counter[..., 2] = (index & MASK)[:, None]
    counter[..., 3] = (index >> 32 & MASK)[:, None]
    return philox(counter, (seed & MASK, seed >> 32 & MASK)).flatten(1)[:, :count]


def uniform(index: Tensor, count: int, seed: int, purpose: str, step: int = 0,
            dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, count) numbers in [0, 1), uniform on a grid of 2^-32 (2^-24 in float32)."""
    bits = words(index, count, seed, purpose, step)
    if dtype == torch.float64:
        return bits.to(dtype) / 2**32
    return (bits >> 8).to(dtype) / 2**24


def normal(index: Tensor, count: int, seed: int, purpose: str, step: int = 0,
           dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, count) standard normal numbers (Box-Muller, up to 6.7). A longer row begins as a short one."""
    half = -(-count // 2)
    bits = words(index, 2 * half, seed, purpose, step).view(len(index), half, 2)
    radius = (-2 * ((bits[..., 0] + 0.5).to(dtype) / 2**32).log()).clamp_min(0).sqrt()
    angle = 2 * math.pi / 2**32 * bits[..., 1].to(dtype)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count]
