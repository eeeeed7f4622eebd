"""The channels_last rule. Risky convolutions run in a process of their own: they may crash."""

import subprocess
import sys

import torch
from torch import nn

from derkit.models import build_model
from derkit.util import images_format

CHILD = """
import sys, torch
from torch import nn
from derkit.models import build_model
from derkit.util import images_format

torch.set_num_threads(1)
for case in sys.argv[1:]:
    kind, width = case.split("-")[0], int(case.split("-")[1])
    if kind == "pointwise":
        layers = nn.Conv2d(width, 8, 1, stride=2), nn.Flatten(), nn.Linear(392, 10)
    elif kind == "four_filters":
        layers = nn.Conv2d(width, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)
    else:
        layers = build_model(kind, 1, 10, 28, width=width)
    model = nn.Sequential(*layers)
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    size = 14 if kind in ("pointwise", "four_filters") else 28
    memory, keep = images_format(model), []
    model.to(memory_format=memory)
    for i in range(20):
        x = torch.rand(8, channels, size, size).contiguous(memory_format=memory)
        nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
        keep = [*keep[-20:], torch.rand(7 * i + 1)]  # asking for memory shows a corrupted heap
    assert all(p.grad.isfinite().all() for p in model.parameters())
    print("fine", case, flush=True)
"""
CASES = [("pointwise", (2, 3, 4, 7, 8)), ("four_filters", (1, 3)), ("small_cnn", (1, 2, 4, 8)),
         ("preact_resnet18", (1, 2, 4, 8))]


def test_the_backward_pass_stays_alive():
    """20 passes of each; the unsafe format dies in fewer (docs/channels_last.md)."""
    cases = [f"{kind}-{width}" for kind, widths in CASES for width in widths]
    command = [sys.executable, "-c", CHILD, *cases]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200)
    after = found.stdout.splitlines()
    assert after == [f"fine {case}" for case in cases], (found.returncode, after, found.stderr)


def test_rule():
    """On a CPU: few filters, a strided 1x1 convolution of few channels, or a single convolution
    stay contiguous."""
    last, contiguous = torch.channels_last, torch.contiguous_format
    expected = {4: contiguous, 7: contiguous, 8: last, 16: last}
    for width, memory in expected.items():
        model = build_model("preact_resnet18", 3, 10, 32, width=width)
        assert images_format(model) == memory, width
    for layer, memory in ((nn.Conv2d(3, 64, 1, stride=2), contiguous),
                          (nn.Conv2d(3, 64, 3, stride=2), last), (nn.Conv2d(3, 64, 1), last),
                          (nn.Conv2d(8, 8, 1, stride=2), last), (nn.Conv2d(64, 7, 3), contiguous)):
        assert images_format(nn.Sequential(layer, nn.Conv2d(16, 16, 3))) == memory, layer
        assert images_format(layer) == contiguous, layer
    assert images_format(nn.Linear(3, 3)) == contiguous
