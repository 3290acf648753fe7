"""Image folders and timm's readers, checked before use and read strictly.

Whatever is wrong with a source is one line of `ValueError` or `FileNotFoundError` that names the place, what was found,
and the next step. A broken image is never replaced by another one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import one_line
from .fashion import Arrays

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Files(Protocol):
    """Images that are decoded one at a time."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """How an error message names the image."""

    def read(self, index: int) -> tuple[Any, int]:
        """The image (PIL, RGB) and its label; any exception means that it cannot be read."""


class Spread:
    """`count` images of another source, evenly spread over it."""

    def __init__(self, source: Files, count: int) -> None:
        self.source, self.count, self.classes = source, count, source.classes

    def __len__(self) -> int:
        return self.count

    def _place(self, index: int) -> int:
        return index * len(self.source) // self.count

    def where(self, index: int) -> str:
        return self.source.where(self._place(index))

    def read(self, index: int) -> tuple[Any, int]:
        return self.source.read(self._place(index))


class ImageFolder:
    """The images of one split: `folder/<class>/…/<image>`, classes and images in lexicographic order.

    Names that begin with a dot are passed over, and files that do not end in one of `IMAGES`. Grey, palette, CMYK and
    RGBA images are converted to RGB; EXIF orientation is not applied, as in torchvision and timm.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...]) -> None:
        self.folder, self.classes = folder, classes
        paths: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images(folder / name)
            if not found:
                raise ValueError(
                    f"{folder / name}: a class without images ({', '.join(IMAGES)}); add some, or remove the folder"
                )
            paths += [os.fsencode(os.path.relpath(path, folder)) for path in found]
            labels += [label] * len(found)
        # arrays, not lists: reading a list in forked workers copies its pages, one reference count after another
        self.paths, self.labels = np.array(paths), np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, index: int) -> str:
        return str(self.folder / os.fsdecode(self.paths[index]))

    def read(self, index: int) -> tuple[Any, int]:
        return rgb(self.where(index)), int(self.labels[index])


def image_folder(root: Path | None) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation images of `root/train/<class>/…` and `root/val/<class>/…`."""
    if root is None:
        raise ValueError("data set 'folder' needs root=, a folder with train/<class>/… and val/<class>/…")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; root= must hold train/<class>/… and val/<class>/…")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            there = ", ".join(_folders(root)[:5]) or "no folder"
            raise FileNotFoundError(
                f"{root / split}: missing (in {root}: {there}); expected train/<class>/… and val/<class>/…: "
                "move, rename or link the images so"
            )
    if (root / "train").resolve() == (root / "val").resolve():
        raise ValueError(f"{root / 'val'}: is the same folder as train; validation needs images of its own")
    names = {split: tuple(_folders(root / split)) for split in ("train", "val")}
    _same_classes(str(root / "train"), names["train"], str(root / "val"), names["val"])
    return ImageFolder(root / "train", names["train"]), ImageFolder(root / "val", names["val"])


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[str]:
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise ValueError(f"{place}: a link back to {real}, which was already read; remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(place, name) for name in files if name.lower().endswith(IMAGES) and not name.startswith(".")
        ]
    return sorted(found)


def _same_classes(train: str, train_classes: Sequence[str], test: str, test_classes: Sequence[str]) -> None:
    if len(train_classes) < 2:
        given = f"one class ({train_classes[0]})" if train_classes else "no class"
        raise ValueError(f"{train}: {given}, expected at least two; check that it holds one folder for each class")
    if tuple(train_classes) != tuple(test_classes):
        missing = [name for name in train_classes if name not in set(test_classes)]
        extra = [name for name in test_classes if name not in set(train_classes)]
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"has {_some(extra)} besides"] if extra else []
        raise ValueError(
            f"{test}: {len(test_classes)} classes, which differ from the {len(train_classes)} of {train}: "
            f"it {' and '.join(parts) or 'has another order'}; both must have the same classes"
        )


TIMM = ("torch/", "hfds/")
STREAMS = ("wds/", "hfids/", "tfds/")
_TRAIN, _TEST = ("train", "training"), ("validation", "val", "valid", "eval", "evaluation", "test")


class TimmFiles:
    """One split of a data set opened by timm, read strictly: timm itself replaces a broken image by another."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.reader = getattr(dataset, "reader", None)
        self.classes = _class_names(dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        if self.reader is not None:
            return f"{self.name}, image {index} ({self.reader.filename(index, absolute=True)})"
        return f"{self.name}, image {index}"

    def read(self, index: int) -> tuple[Any, int]:
        if self.reader is not None:
            file, label = self.reader[index][:2]
            return rgb(file), int(label)
        image, label = self.dataset[index]
        return image.convert("RGB"), int(label)


def timm_dataset(name: str, root: Path | None, splits: tuple[str, str]) -> tuple[Arrays, Arrays] | tuple[Files, Files]:
    """Training and test images of a data set that `timm.data.create_dataset` reads at random access.

    Those that torchvision keeps decoded in memory (CIFAR, MNIST and their kin) become `Arrays`, all others `Files`.
    """
    if name.startswith(STREAMS):
        raise ValueError(
            f"data set {name!r} is not taken; save it as tar files (kdlib shards) for wds/, or use hfids/… or hfds/…"
        )
    if name in ("torch/image_folder", "torch/folder"):
        raise ValueError(f"data set {name!r}: use name='folder', which checks that train/ and val/ are there")
    if name.startswith("torch/"):
        if root is None:
            raise ValueError(f"data set {name!r} needs root=, the folder into which torchvision has downloaded it")
        # torchvision's own sets answer an unknown split with the test images
        if splits[0] not in _TRAIN or splits[1] not in _TEST:
            raise ValueError(f"splits: got {splits[0]!r}, {splits[1]!r}; {name!r} has 'train' and 'validation'")
    train, test = (_open_timm(name, root, split) for split in splits)
    if all(isinstance(getattr(part, "data", None), np.ndarray | Tensor) and _flat(part) for part in (train, test)):
        sources: Any = tuple(_arrays(part, name) for part in (train, test))
    else:
        sources = TimmFiles(train, f"{name}/{splits[0]}"), TimmFiles(test, f"{name}/{splits[1]}")
    _same_classes(f"{name} {splits[0]}", sources[0].classes, f"{name} {splits[1]}", sources[1].classes)
    return sources


def _open_timm(name: str, root: Path | None, split: str) -> Any:
    from timm.data.dataset_factory import create_dataset

    try:
        return create_dataset(name, root=None if root is None else str(root), split=split)
    except (RuntimeError, OSError, ValueError, AssertionError, ImportError, KeyError) as error:
        raise ValueError(
            f"data set {name!r}, split {split!r}, root {str(root) if root else 'not given'}: timm cannot open it "
            f"({type(error).__name__}: {one_line(error, 200)}); check its name and root="
        ) from error


def _class_names(dataset: Any, name: str) -> tuple[str, ...]:
    index = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if not index or sorted(index.values()) != list(range(len(index))):
        raise ValueError(
            f"data set {name!r} does not name its classes 0, 1, 2, …; save it as an image folder and use that"
        )
    return tuple(str(key) for key in sorted(index, key=lambda key: index[key]))


def _flat(dataset: Any) -> bool:
    return torch.as_tensor(dataset.targets).ndim == 1


def _arrays(dataset: Any, name: str) -> Arrays:
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return Arrays(images, torch.as_tensor(dataset.targets, dtype=torch.int64), _class_names(dataset, name))


def rgb(file: Any) -> Any:
    """The image in a file as RGB, 8 bits.

    Raises:
        ValueError: it has 16 bits or more.
        Exception: what PIL raises for a file that it cannot read.
    """
    from PIL import Image

    with Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{image.mode} pixels (16 bits or more), which RGB would clip; convert it to 8 bits")
        return image.convert("RGB")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unreadable(source: Files, index: int, error: Exception) -> str:
    """One line about an image that cannot be read."""
    return (
        f"{source.where(index)}: cannot be read ({type(error).__name__}: {one_line(error, 200)}); repair or remove it"
    )
