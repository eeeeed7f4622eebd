"""Make derkit/assets/fashion_mini.npz, the bundled subset of Fashion-MNIST, from the full set.

    python scripts/make_fashion_mini.py FOLDER  # for torchvision, which downloads into it

Class-balanced: 4,000 train and 1,000 valid images from the training set, 1,000 test images from the
test set, drawn with numpy's PCG64 at seed 0. Prints the sha256 of the file, which derkit/data.py
holds too.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

OUT = Path(__file__).resolve().parents[1] / "derkit" / "assets" / "fashion_mini.npz"


def balanced(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``per_class`` images of every class, shuffled."""
    picked = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)]
    return rng.permutation(np.concatenate(picked))


def main(folder: Path) -> None:
    parts = {}
    for name in ("train", "test"):
        data = FashionMNIST(folder, train=name == "train", download=True)
        parts[name] = data.data.numpy()[:, None], data.targets.numpy()
    rng = np.random.default_rng(0)
    labels = parts["train"][1]
    pool = balanced(labels, 500, rng)
    # the first 100 of each class become the validation split
    rank = np.array([np.sum(labels[pool[:i]] == labels[p]) for i, p in enumerate(pool)])
    index = {"train": pool[rank >= 100], "valid": pool[rank < 100],
             "test": balanced(parts["test"][1], 100, rng)}
    arrays = {}
    for name in ("train", "valid", "test"):
        images, labels = parts["test" if name == "test" else "train"]
        arrays[f"{name}_images"] = images[index[name], 0]
        arrays[f"{name}_labels"] = labels[index[name]].astype(np.uint8)
    arrays |= {f"{name}_index": numbers.astype(np.int32) for name, numbers in index.items()}
    np.savez_compressed(OUT, **arrays)
    sha256 = hashlib.sha256(OUT.read_bytes()).hexdigest()
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes, sha256 {sha256}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
