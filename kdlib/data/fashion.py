"""Fashion-MNIST: the part that travels inside the package, and the whole from idx files, each checked before use.

Whatever is wrong with a file is one line of `ValueError` or `FileNotFoundError` that names it and the next step.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import io
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import one_line

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# of the pixels / 255 of all 60,000 training images
FASHION_MEAN, FASHION_STD = (0.28604,), (0.35302,)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED = "fashion_mnist_5k.npz"
EMBEDDED_SHA256 = "28f29c5b2eb72846e8b33091c49284dddf42da5b948e73bdcbdaebfcaf924bb7"


@dataclass(frozen=True)
class Arrays:
    """Decoded images: uint8 (N, C, H, W) with H = W, int64 labels (N,), and the class names in label order."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def embedded() -> tuple[Arrays, Arrays]:
    """The first 5,000 training and first 4,000 test images of Fashion-MNIST, which travel inside the package."""
    place = importlib.resources.files("kdlib.data") / "assets" / EMBEDDED
    remedy = "install kdlib again"
    if not place.is_file():
        raise FileNotFoundError(f"{place}: missing, though it is part of the package; {remedy}")
    content = place.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != EMBEDDED_SHA256:
        raise ValueError(f"{place}: corrupt (SHA-256 {found[:12]}…, expected {EMBEDDED_SHA256[:12]}…); {remedy}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        train, test = (
            Arrays(
                torch.from_numpy(arrays[f"{split}_images"])[:, None],
                torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64)),
                FASHION,
            )
            for split in ("train", "test")
        )
    return train, test


def fashion_mnist(root: Path | None) -> tuple[Arrays, Arrays]:
    """All of Fashion-MNIST, 60,000 and 10,000 images.

    From the idx files in `root` if given, else from the Debian package `dataset-fashion-mnist`, else from the cache
    folder (`$XDG_CACHE_HOME/kdlib` or `~/.cache/kdlib`), where torchvision downloads it the first time.
    """
    if root is not None:
        return read_idx(root)
    if DEBIAN.is_dir():
        return read_idx(DEBIAN)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlib"
    raw = Path("FashionMNIST", "raw")
    if not (cache / raw).is_dir():
        _download(cache, raw)
    return read_idx(cache / raw)


def _download(cache: Path, raw: Path) -> None:
    import tempfile

    from torchvision.datasets import FashionMNIST

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            FashionMNIST(folder, download=True)
            (cache / raw).parent.mkdir(exist_ok=True)
            # several processes may download at once: each into a folder of its own, and the first to finish stays
            try:
                os.rename(Path(folder) / raw, cache / raw)
            except OSError:
                if not (cache / raw).is_dir():
                    raise
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"fashion-mnist: not on this machine, and the download into {cache} failed ({one_line(error, 200)}); "
            "on Debian `apt-get install dataset-fashion-mnist`, or give root= a folder with its four idx files, "
            "or use name='fashion-mnist-5k', which needs neither"
        ) from error


def read_idx(folder: str | Path) -> tuple[Arrays, Arrays]:
    """Training and test images of a folder with Fashion-MNIST's four idx files, as they are or gzipped."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; root= must be a folder with Fashion-MNIST's four idx files")
    splits = []
    for split in ("train", "t10k"):
        (image_file, images), (label_file, labels) = (
            _idx(folder, f"{split}-{part}-ubyte", rank) for part, rank in (("images-idx3", 3), ("labels-idx1", 1))
        )
        if images.shape[1:] != (28, 28):
            raise ValueError(
                f"{image_file}: images of {_times(images.shape[1:])} pixels, expected 28×28; fetch it again"
            )
        if len(images) != len(labels) or not len(images):
            raise ValueError(
                f"{image_file}: {len(images)} images, but {len(labels)} labels in {label_file}; fetch both again"
            )
        if labels.max() >= len(FASHION):
            raise ValueError(f"{label_file}: label {labels.max()}, expected 0 to {len(FASHION) - 1}; fetch it again")
        splits.append(
            Arrays(torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64)), FASHION)
        )
    return splits[0], splits[1]


def _idx(folder: Path, name: str, rank: int) -> tuple[Path, np.ndarray]:
    file = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{folder}: neither {name}.gz nor {name} is there; root= must hold Fashion-MNIST's four idx files"
        )
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: corrupt gzip file ({one_line(error, 200)}); fetch it again") from error
    magic = int.from_bytes(content[:4], "big")
    if len(content) < 4 * (rank + 1) or magic != 0x800 + rank:
        raise ValueError(
            f"{file}: not an idx file of bytes with {rank} dimensions "
            f"(starts with {content[:4].hex() or 'nothing'}, expected {0x800 + rank:08x}); fetch it again"
        )
    shape = [int.from_bytes(content[4 * (i + 1) : 4 * (i + 2)], "big") for i in range(rank)]
    values = np.frombuffer(content, np.uint8, offset=4 * (rank + 1))
    if values.size != np.prod(shape, dtype=object):
        raise ValueError(
            f"{file}: {values.size} bytes, but its header says {_times(shape)}; cut off or corrupt, fetch it again"
        )
    return file, values.reshape(shape)


def _times(shape: Sequence[int]) -> str:
    return "×".join(str(side) for side in shape)
