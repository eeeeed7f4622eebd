"""Train the small feature extractor of the offline metrics (CFD, CKD, CIS).

    python scripts/train_extractor.py --data-dir FOLDER     # how the bundled file was made
    python scripts/train_extractor.py                       # without the four files: fashion_mini
    python scripts/train_extractor.py --dataset cifar10 --epochs 20 \\
        --out ~/.cache/derkit/extractors/cifar10.safetensors

Plain training, apart from every classifier that generates; test images are never trained on. The
file holds weights in half precision, with seed, data's sha256, accuracies and this command.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from derkit.checkpoint import load_checkpoint, save_checkpoint
from derkit.data import Split, load_dataset
from derkit.generation.extractor import FASHION, ExtractorNet
from derkit.util import DerkitError, choose_device, make_generator


def train(net: ExtractorNet, split: Split, epochs: int, seed: int, augment: str,
          rate: float = 3e-3, batch: int = 128) -> None:
    """AdamW with a one-cycle rate, label smoothing 0.05."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    steps = epochs * (-(-len(split) // batch))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        began, losses = time.perf_counter(), []
        generator = make_generator(split.images.device, "extractor", seed, epoch)
        for x, y in split.batches(batch, generator, augment):
            loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cycle.step()
            losses.append(loss.detach())
        mean, seconds = torch.stack(losses).mean(), time.perf_counter() - began
        print(f"epoch {epoch + 1}/{epochs}: loss {mean:.3f}, {seconds:.0f} s", flush=True)


@torch.no_grad()
def calibrate(net: ExtractorNet, x: Tensor) -> None:
    """Set ``scale``: each group of features gets a mean variance of 1 over the images x."""
    net.scale.fill_(1)
    width = net.spec["width"]
    groups = net(x)[0].split([width, 2 * width], 1)
    net.scale.copy_(torch.stack([group.var(0).mean().rsqrt() for group in groups]))


@torch.no_grad()
def accuracy(net: ExtractorNet, split: Split) -> float:
    """Share of correct predictions."""
    right = torch.cat([net(x)[1].argmax(1) == y for x, y in split.batches(500)])
    return round(right.double().mean().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="default: fashion_mnist with --data-dir, else mini")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=FASHION)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    default = "fashion_mnist" if options.data_dir else "fashion_mini"
    data = load_dataset(options.dataset or default, options.data_dir, choose_device(options.device))
    print(data.describe())
    torch.manual_seed(options.seed)
    net = ExtractorNet(data.channels, len(data.classes)).to(data.train.images.device)
    augment = "crop" if data.channels == 1 else "crop_flip"
    augment = "none" if data.name == "svhn" else augment
    train(net, data.train, options.epochs, options.seed, augment)
    net.eval().half().float()  # what the file will hold
    calibrate(net, data.train.floats(0, 5000))
    net.half().float()
    parts = dict(train=data.train.take(slice(5000)), valid=data.valid, test=data.test)
    scores = {name: accuracy(net, split) for name, split in parts.items()}
    words = ["FOLDER" if word == options.data_dir else word for word in sys.argv[1:]]
    config = dict(trained_on=data.name, source=data.source, data_sha256=data.sha256,
                  train_images=len(data.train), seed=options.seed, epochs=options.epochs,
                  augment=augment, accuracy=scores, adversarial=False, torch=torch.__version__,
                  command=" ".join(["python scripts/train_extractor.py", *words]))
    save_checkpoint(options.out, net.half(), config)
    sha256, size = load_checkpoint(options.out)["sha256"], options.out.stat().st_size
    print(f"{options.out}: {size:,} bytes, weights {sha256}, accuracy {scores}")


if __name__ == "__main__":
    try:
        main()
    except DerkitError as error:
        sys.exit(f"error: {error}")
