"""Make derkit/assets/fashion_mini.npz, the bundled subset of Fashion-MNIST, from the full data set.

    python scripts/make_fashion_mini.py FOLDER_WITH_THE_FOUR_GZ_FILES

Class-balanced: 4,000 train and 1,000 valid images from the training set, 1,000 test images from the test set,
drawn with numpy's PCG64 at seed 0. Prints the sha256 of the file, which derkit/data.py holds too.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from derkit.data_sources import read_idx_folder

OUT = Path(__file__).resolve().parents[1] / "derkit" / "assets" / "fashion_mini.npz"


def balanced(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``per_class`` images of every class, shuffled."""
    picked = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)]
    return rng.permutation(np.concatenate(picked))


def main(folder: str) -> None:
    images, labels = read_idx_folder(Path(folder), train=True)
    test_images, test_labels = read_idx_folder(Path(folder), train=False)
    rng = np.random.default_rng(0)
    pool = balanced(labels, 500, rng)
    # the first 100 of each class become the validation split
    rank = np.array([np.sum(labels[pool[:i]] == labels[p]) for i, p in enumerate(pool)])
    valid, train, test = pool[rank < 100], pool[rank >= 100], balanced(test_labels, 100, rng)
    np.savez_compressed(
        OUT,
        train_images=images[train], train_labels=labels[train].astype(np.uint8),
        valid_images=images[valid], valid_labels=labels[valid].astype(np.uint8),
        test_images=test_images[test], test_labels=test_labels[test].astype(np.uint8),
        train_index=train.astype(np.int32), valid_index=valid.astype(np.int32), test_index=test.astype(np.int32),
    )
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes, sha256 {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
