"""Train the small feature extractor of the offline metrics (CFD, CKD, CIS): separate from every classifier that
generates.

    python scripts/train_extractor.py --data-dir FOLDER_WITH_THE_FOUR_GZ_FILES     # how the bundled file was made
    python scripts/train_extractor.py                                              # without it: on fashion_mini
    python scripts/train_extractor.py --dataset cifar10 --epochs 20 --out ~/.cache/derkit/extractors/cifar10.pt

Plain (not adversarial) training, AdamW, one-cycle learning rate, random crops; test images are never trained on. The
file holds the weights in half precision with their sha256, the seed, the data's sha256, the accuracy and this
command. """

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from derkit.augment import to_float
from derkit.checkpoint import load_checkpoint, save_checkpoint
from derkit.data import Split, load_dataset
from derkit.device import choose_device
from derkit.errors import DerkitError
from derkit.evaluation import make_generator
from derkit.extractor import ExtractorNet

OUT = Path(__file__).resolve().parents[1] / "derkit" / "assets" / "extractor_fashion.pt"


def train(net: ExtractorNet, split: Split, epochs: int, seed: int, augment: str, lr: float = 3e-3,
          batch: int = 128) -> None:
    """AdamW with a one-cycle rate, label smoothing 0.05."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    steps = epochs * (-(-len(split) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        began, losses = time.perf_counter(), []
        generator = make_generator(split.images.device, "extractor", seed, epoch)
        for x, y in split.batches(batch, generator, augment):
            loss = F.cross_entropy(net(x)[1], y, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1}/{epochs}: loss {torch.stack(losses).mean():.3f}, {seconds:.0f} s", flush=True)


@torch.no_grad()
def accuracy(net: ExtractorNet, split: Split) -> float:
    """Share of correct predictions."""
    hits = [(net(to_float(im))[1].argmax(1) == y).float() for im, y in
            zip(split.images.split(500), split.labels.split(500), strict=True)]
    return torch.cat(hits).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="", help="default: fashion_mnist with --data-dir, else fashion_mini")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    name = options.dataset or ("fashion_mnist" if options.data_dir else "fashion_mini")
    device = choose_device(options.device)
    data = load_dataset(name, options.data_dir or None, device)
    print(data.describe())
    torch.manual_seed(options.seed)
    net = ExtractorNet(data.channels, len(data.classes)).to(device)
    augment = "none" if name == "svhn" else "crop" if data.channels == 1 else "crop_flip"
    train(net, data.train, options.epochs, options.seed, augment)
    net.eval().half().float()  # what the file will hold
    net.calibrate(data.train.floats(0, 5000))
    net.half().float()
    parts = dict(train=data.train.take(slice(5000)), valid=data.valid, test=data.test)
    scores = {name: round(accuracy(net, split), 4) for name, split in parts.items()}
    words = ["FOLDER" if a == options.data_dir else a for a in sys.argv[1:]]
    config = dict(trained_on=data.name, source=data.source, data_sha256=data.sha256, train_images=len(data.train),
                  seed=options.seed, epochs=options.epochs, augment=augment, accuracy=scores, adversarial=False,
                  command=" ".join(["python scripts/train_extractor.py", *words]), torch=str(torch.__version__))
    save_checkpoint(options.out, net.half(), config)
    sha256 = load_checkpoint(options.out)["sha256"]
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, weights {sha256}, accuracy {scores}")


if __name__ == "__main__":
    try:
        main()
    except DerkitError as error:
        sys.exit(f"error: {error}")
