"""Lay out published datasets as image folders: python benchmarks/datasets.py fashion-mnist DEST

Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) comes from the Debian package dataset-fashion-mnist
(apt-get install dataset-fashion-mnist), or from any folder with its four idx files (--source).
The result is DEST/train/<class>/00000.png (60,000) and DEST/test/<class>/00000.png (10,000).
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
from PIL import Image

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
"""By label, 0 to 9."""


def read_idx(path: Path) -> np.ndarray:
    """A .gz file of the idx format: 0, 0, type (8 = uint8), dimensions, big-endian sizes, data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def fashion_mnist(split: str, source: Path = FASHION) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,28,28] and labels uint8 [N] of "train" or "test"."""
    stem = {"train": "train", "test": "t10k"}[split]
    if not source.is_dir():
        raise SystemExit(f"{source} does not exist: apt-get install dataset-fashion-mnist")
    images = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
    return images, read_idx(source / f"{stem}-labels-idx1-ubyte.gz")


def lay_out(destination: Path, source: Path) -> int:
    """Write both splits as folders of PNGs named by their place in the file; the number written."""
    written = 0
    for split in ("train", "test"):
        images, labels = fashion_mnist(split, source)
        for name in FASHION_CLASSES:
            (destination / split / name).mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = destination / split / FASHION_CLASSES[label] / f"{number:05d}.png"
            Image.fromarray(image).save(path)
        written += len(images)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", choices=["fashion-mnist"])
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--source", type=Path, default=FASHION, help="folder of the idx files")
    arguments = parser.parse_args()
    if arguments.destination.exists():
        parser.error(f"{arguments.destination} exists already")
    start = time.perf_counter()
    written = lay_out(arguments.destination, arguments.source)
    print(f"{written} images in {arguments.destination}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
