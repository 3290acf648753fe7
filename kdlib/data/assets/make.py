"""Makes `fashion_mnist_5k.npz`: the first 5,000 training and first 4,000 test images of Fashion-MNIST.

Run it as `python kdlib/data/assets/make.py [FOLDER]`, where FOLDER holds the four idx files; its default is where the
Debian package `dataset-fashion-mnist` puts them. It prints the SHA-256 that `kdlib/data/fashion.py` must name.
Fashion-MNIST is Copyright 2017 Zalando SE under the MIT licence, kept beside this file in `FASHION_MNIST_LICENSE`.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from kdlib.data.fashion import DEBIAN, EMBEDDED, read_idx

TRAIN, TEST = 5_000, 4_000


def main(folder: Path) -> None:
    """Writes the archive beside this file. The same input and zlib give the same bytes."""
    train, test = read_idx(folder)
    target = Path(__file__).with_name(EMBEDDED)
    with target.open("wb") as file:
        np.savez_compressed(
            file,
            train_images=train.images[:TRAIN, 0].numpy(),
            train_labels=train.labels[:TRAIN].numpy().astype(np.uint8),
            test_images=test.images[:TEST, 0].numpy(),
            test_labels=test.labels[:TEST].numpy().astype(np.uint8),
        )
    content = target.read_bytes()
    print(f"{target}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEBIAN)
