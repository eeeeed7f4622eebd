"""How many images of two data sets are the same, byte for byte: is a test set fresh?

    python scripts/shared_images.py fashion_mini fashion_mnist --size 2000 --out figures/records/fashion_mnist_short/shared_images.json

Compares every split of the first data set with the first test images of the second (--size; 0: all of them).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from derkit import load_dataset
from derkit.data import Split
from derkit.records import write_json


def contents(split: Split) -> list[bytes]:
    """The bytes of every image."""
    return [image.tobytes() for image in split.images.cpu().numpy()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("known", help="the data set that choices were made on")
    parser.add_argument("fresh", help="the data set whose test images are asked about")
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known, fresh = load_dataset(options.known), load_dataset(options.fresh)
    test = contents(fresh.test)[: options.size or None]
    shared = {}
    for name in ("train", "valid", "test"):
        there = set(contents(getattr(known, name)))
        shared[name] = sum(image in there for image in test)
    record = dict(known=known.name, known_sha256=known.sha256, fresh=fresh.name, fresh_sha256=fresh.sha256, test_images=len(test),
                  shared_with=shared, share=round(sum(shared.values()) / len(test), 4))
    print(record)
    if options.out:
        write_json(options.out, record)
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
