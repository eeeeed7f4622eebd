"""BatchNorm over the batches of all processes (config.sync_bn): on the CPU and on GPUs, and under a double backward.

torch's SyncBatchNorm is for GPUs only and cannot be differentiated twice, which GradAlign needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from derkit import distributed


class _Sum(torch.autograd.Function):
    """The sum over processes, with a graph that can be differentiated twice (GradAlign), on the CPU and on GPUs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return distributed.total(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad.contiguous())


class _WholeBatch:
    """BatchNorm whose batch is that of all processes. Two sums: the variance is that of centred values, as it should be."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
        wide = x if x.dtype == torch.float64 else x.float()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        sums = _Sum.apply(torch.cat([wide.sum(dims), count]))
        n, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = wide - mean.view(shape)
        var = _Sum.apply(centred.square().sum(dims)) / n
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var.dtype), rate)
        out = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


_SYNCED = {kind: type(f"Synced{kind.__name__}", (_WholeBatch, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)}


@contextmanager
def synced_batch_norm(model: nn.Module, wanted: bool) -> Iterator[None]:
    """BatchNorm over the whole batch inside the block. The modules change class and back: same weights, names, checkpoints."""
    norms = [m for m in model.modules() if type(m) in _SYNCED] if wanted and distributed.world() > 1 else []
    kinds = [type(m) for m in norms]
    for m in norms:
        m.__class__ = _SYNCED[type(m)]
    try:
        yield
    finally:
        for m, kind in zip(norms, kinds, strict=True):
            m.__class__ = kind
