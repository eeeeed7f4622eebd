"""The channels_last rule: risky convolutions run in a process of their own, so that a crash fails one test alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from derkit.device import images_format
from derkit.models import build_model

CHILD = """
import sys, torch
from torch import nn
from derkit.device import images_format
from derkit.models import build_model

kind, width = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
if kind == "pointwise":
    model = nn.Sequential(nn.Conv2d(width, 8, 1, stride=2), nn.Flatten(), nn.Linear(8 * 49, 10))
elif kind == "one_layer":
    model = nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10))
else:
    model = build_model(kind, 1, 10, 28, width=width)
channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
size = 28 if kind in ("preact_resnet18", "small_cnn") else 14
memory = images_format(model)
model.to(memory_format=memory)
keep = []
for i in range(30):
    x = torch.rand(8, channels, size, size).contiguous(memory_format=memory)
    nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
    keep = [*keep[-20:], torch.rand(7 * i + 1)]  # a corrupted heap shows itself when memory is asked for
assert all(p.grad.isfinite().all() for p in model.parameters())
print("fine")
"""
CASES = [("pointwise", w) for w in (2, 3, 4, 7, 8)] + [("one_layer", w) for w in (1, 3)]
CASES += [(name, w) for name in ("preact_resnet18", "small_cnn") for w in (1, 2, 4, 8)]


@pytest.mark.parametrize(("kind", "width"), CASES)
def test_rule_keeps_the_backward_pass_alive(kind, width):
    """30 backward passes in a process of its own: the unsafe format dies in fewer (docs/channels_last.md)."""
    found = subprocess.run([sys.executable, "-c", CHILD, kind, str(width)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and "fine" in found.stdout, f"{kind} of width {width}: status {found.returncode}\n{found.stderr[-500:]}"


def test_rule():
    """Narrow networks and strided pointwise convolutions of few channels stay contiguous on a CPU; wide ones do not."""
    cl, contiguous = torch.channels_last, torch.contiguous_format
    assert [images_format(build_model("preact_resnet18", 3, 10, 32, width=w)) for w in (4, 7, 8, 16)] == [contiguous] * 2 + [cl] * 2
    assert images_format(nn.Conv2d(3, 64, 1, stride=2)) == contiguous and images_format(nn.Conv2d(3, 64, 3, stride=2)) == cl
    assert images_format(nn.Linear(3, 3)) == contiguous
