"""Writes demos/data/fashion_mnist.npz, the images of demos/clothes.py, from the original files.

apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb unpacked
python demos/data/make_fashion_subset.py unpacked/usr/share/datasets/fashion-mnist
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np

TARGET = Path(__file__).resolve().parent / "fashion_mnist.npz"
PER_CLASS = {"train": 400, "t10k": 120}
HEADER = {"images": 16, "labels": 8}


def read_idx(path: Path, kind: str) -> np.ndarray:
    """The bytes of an IDX file behind its header: labels (N,) or images (N, 28, 28)."""
    values = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=HEADER[kind])
    return values.reshape(-1, 28, 28) if kind == "images" else values


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="holds the four *-ubyte.gz files")
    folder = parser.parse_args().folder
    arrays = {}
    for split, count in PER_CLASS.items():
        images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", "images")
        labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", "labels")
        chosen = np.concatenate([np.flatnonzero(labels == n)[:count] for n in range(10)])
        name = "train" if split == "train" else "test"
        arrays |= {f"{name}_images": images[chosen], f"{name}_labels": labels[chosen]}
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
