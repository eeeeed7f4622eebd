"""Which float32 convolutions are safe in channels_last on this CPU? Needs torch only.

    python scripts/channels_last.py --out figures/records/channels_last.json     # adds this torch

Every case runs in a forked process on one thread, because some of them crash or hang. The rule that
follows is `derkit.util.images_format`; docs/channels_last.md tells the story.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

KINDS = {"1x1": (1, False), "3x3": (3, False), "3x3 depthwise": (3, True)}
PHASES = ("forward", "backward, images", "backward, weights")
CHANNELS = (1, 2, 3, 4, 6, 8, 12, 16)
SHAPES = ((14, 1), (14, 2), (28, 2))  # size of the images, stride


def convolve(kind: str, phase: str, inside: int, filters: int, size: int, stride: int) -> None:
    """100 calls on new tensors, the first compared with float64 in the contiguous format."""
    kernel, depthwise = KINDS[kind]
    groups, last = inside if depthwise else 1, torch.channels_last
    keep = []
    for i in range(100):
        x = torch.rand(8, inside, size, size).to(memory_format=last)
        w = torch.rand(filters, inside // groups, kernel, kernel).to(memory_format=last)
        leaf = {"backward, images": x, "backward, weights": w}.get(phase)
        values = []
        ways = [(torch.float32, last), (torch.float64, torch.contiguous_format)]
        for dtype, memory in ways if i == 0 else ways[:1]:
            a, b = (t.to(dtype).contiguous(memory_format=memory) for t in (x, w))
            target = {id(x): a, id(w): b}.get(id(leaf))
            if target is not None:
                target.requires_grad_(True)
            out = F.conv2d(a, b, None, stride, kernel // 2, 1, groups)
            if target is not None:
                out = torch.autograd.grad(out.square().sum(), target)[0]
            values.append(out.double())
        if len(values) > 1 and (values[0] - values[1]).abs().max() > 1e-3 * values[1].abs().max():
            os._exit(3)
        keep = [*keep[-20:], torch.rand(filters * inside)]  # a corrupted heap shows in new memory
    os._exit(0)


def outcome(*case, limit: float = 20.0) -> str:
    """'fine', 'wrong', 'hangs' or the name of the signal that ended the process."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        convolve(*case)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        if done:
            return {0: "fine", 3: "wrong"}.get(os.WEXITSTATUS(status), "error")
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def gain(width: int) -> float:
    """CPU time of a small network's forward and backward pass, contiguous over channels_last."""
    seconds = {}
    for memory in (torch.contiguous_format, torch.channels_last):
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        model = nn.Sequential(*layers).to(memory_format=memory)
        x, times = torch.rand(128, 3, 32, 32).contiguous(memory_format=memory), []
        for _ in range(6):
            began = time.process_time()
            model(x).square().mean().backward()
            times.append(time.process_time() - began)
        seconds[memory] = min(times)
    return round(seconds[torch.contiguous_format] / seconds[torch.channels_last], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    file = parser.parse_args().out
    torch.set_num_threads(1)
    unsafe, cases = [], 0
    for kind, phase in ((kind, phase) for kind in KINDS for phase in PHASES):
        for inside, (size, stride) in ((c, shape) for c in CHANNELS for shape in SHAPES):
            for filters in (inside,) if KINDS[kind][1] else (2, 4, 8, 16):
                cases += 1
                found = outcome(kind, phase, inside, filters, size, stride)
                if found != "fine":
                    names = ("convolution", "phase", "channels", "filters", "size", "stride")
                    case = (kind, phase, inside, filters, size, stride)
                    unsafe.append(dict(zip(names, case, strict=True), outcome=found))
    record = json.loads(file.read_text()) if file.is_file() else {}
    gains = {width: gain(width) for width in (2, 4, 8, 16, 32)}
    record[torch.__version__] = dict(cpu=torch.backends.cpu.get_cpu_capability(), cases=cases,
                                     unsafe=unsafe, gain=gains)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
