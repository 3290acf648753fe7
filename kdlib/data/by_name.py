"""A data set by its name: opened, checked, and put into two loaders."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import BUFFER, CROP_PCT, INTERPOLATION, SPLITS, check, check_unused
from .augment import Augment, BatchAugment, eval_transform, train_transform
from .fashion import FASHION_MEAN, FASHION_STD, Arrays, embedded, fashion_mnist
from .from_files import FileLoader
from .from_memory import ArrayLoader
from .hub import hub_shards
from .loader import Loader, Normalise
from .outlines import outline
from .samplers import EpochBatches
from .shards import Shards, tar_shards
from .sources import STREAMS, TIMM, Files, Spread, image_folder, timm_dataset
from .streams import ShardBatches, ShardLoader

Source = Arrays | Files | Shards
NAMES = ("fashion-mnist-5k", "fashion-mnist", "folder")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Augment()


@dataclass(frozen=True)
class Data:
    """A data set ready for training: what a model must know about it, and its two loaders."""

    name: str
    classes: tuple[str, ...]
    """Names in label order; for image folders, the folders' lexicographic order."""
    mean: tuple[float, ...]
    """What was subtracted from each channel, on a scale where white is 1."""
    std: tuple[float, ...]
    """By what each channel was then divided."""
    channels: int
    image_size: int
    train: Loader
    test: Loader

    def pixels(self, images: Tensor) -> Tensor:
        """Images ``(…, C, H, W)`` of a loader with their normalisation undone: white is 1."""
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return images * std + mean


def load(
    name: str = "fashion-mnist-5k",
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 128,
    eval_batch_size: int = 500,
    workers: int = 2,
    augment: Augment = PLAIN,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float = CROP_PCT,
    interpolation: str = INTERPOLATION,
    splits: tuple[str, str] = SPLITS,
    classes: int | None = None,
    shuffle: int = BUFFER,
) -> Data:
    """Opens a data set and checks it.

    Args:
        name: `fashion-mnist-5k`, the first 5,000 training and 4,000 test images, inside the package; `fashion-mnist`,
            all 70,000, from `root`, a Debian package or a download; `folder`, images in `root/train/<class>/…` and
            `root/val/<class>/…`, ImageNet for one; what timm reads: `torch/cifar100`, `hfds/<owner>/<set>`; or what
            outgrows a disk: `wds/`, tar files and `_info.json` in `root`, `hfids/<owner>/<set>`, streamed from the Hub.
        root: the folder of the data; of `wds/` an http(s) address too.
        image_size: side of the square images in pixels; the data set's own if it has one, else 224.
        batch_size: images per training batch and process. The last, incomplete global batch of an epoch is dropped.
        eval_batch_size: images per test batch and process. Each test image comes once over all ranks, so the number of
            batches may differ by one between ranks: gather sums at the end, not in each batch.
        workers: processes that read image files; sets in memory need none.
        augment: what is done to training images.
        seed: of the order and the augmentation.
        device: where batches arrive; sets in memory live there. On `meta` nothing has pixels, and neither Fashion-MNIST
            nor an image folder needs files: for a folder that is not there stand ImageNet's numbers.
        rank, world_size: which part of each global batch is this process's.
        limit: train on so many images: the first, or of files, which are sorted by class, evenly spread ones.
        mean, std: of each channel (white is 1); else Fashion-MNIST's, measured (other sets in memory) or ImageNet's.
        crop_pct: test images from files are resized so that a centre crop keeps this share of the shorter side.
        interpolation: with which image files are resized: nearest, bilinear, bicubic, or lanczos.
        splits: names of the training and test split, of all but Fashion-MNIST and image folders.
        classes: of `wds/` alone: how many there are, where `_info.json` has no list of them.
        shuffle: of `wds/` and `hfids/`: images that each worker holds, of which the next one is drawn; the order of
            shards is drawn besides. 1 keeps the images of a shard in order.

    Raises:
        ValueError: an argument, file or folder that is not as expected, with what to do about it.
        FileNotFoundError: a missing file or folder.
    """
    device = torch.device(device)
    check(
        batch_size, eval_batch_size, workers, rank, world_size, image_size, limit, augment, crop_pct, interpolation,
        splits, shuffle,
    )  # fmt: skip
    web = name.startswith("wds/") and "://" in str(root)
    place = None if root is None or web else Path(root).expanduser()
    train, test = (outline(name, place) if device.type == "meta" else None) or _open(
        name, root if web else place, splits, classes
    )
    check_unused(
        name, isinstance(train, Arrays), augment=augment, crop_pct=crop_pct, interpolation=interpolation,
        splits=splits, limit=limit, classes=classes, shuffle=shuffle,
    )  # fmt: skip
    mean, std = _statistics(name, train, mean, std)
    if limit is not None:
        if limit > len(train):
            raise ValueError(
                f"limit: got {limit}, but {name!r} has {len(train)} training images; lower it or leave it out"
            )
        train = _first(train, limit)
    if len(train) < batch_size * world_size:
        raise ValueError(
            f"batch_size: {batch_size} on {world_size} processes makes {batch_size * world_size} images a step, "
            f"but {name!r} trains on {len(train)}; use a smaller batch"
        )
    if image_size is None:
        image_size = train.images.shape[-1] if isinstance(train, Arrays) else 224

    normalise = Normalise(mean, std, device, image_size)
    part: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size}
    finish = BatchAugment(augment, len(train.classes), seed=seed, rank=rank, device=device)

    def loader(source: Source, on: bool) -> Loader:
        """Of a source, to train on it or not."""
        size, last = (batch_size, finish) if on else (eval_batch_size, None)
        if isinstance(source, Arrays):
            batches = EpochBatches(len(source), size, train=on, **part)
            own = augment if on else None
            return ArrayLoader(source, batches, normalise, device=device, mean=mean, augment=own, finish=last)
        if on:  # transforms need torchvision, and arrays do not
            transform = train_transform(augment, image_size, mean, interpolation)
        else:
            transform = eval_transform(image_size, crop_pct, interpolation)
        how: dict[str, Any] = {"finish": last, "device": device, "workers": workers}
        if isinstance(source, Shards):
            held = shuffle if on else 1
            stretches = ShardBatches(source.lengths, size, train=on, buffer=held, workers=max(workers, 1), **part)
            return ShardLoader(source, stretches, normalise, transform, **how)
        return FileLoader(source, EpochBatches(len(source), size, train=on, **part), normalise, transform, **how)

    return Data(name, train.classes, mean, std, len(mean), image_size, loader(train, on=True), loader(test, on=False))


def _open(name: str, root: str | Path | None, splits: tuple[str, str], classes: int | None) -> tuple[Source, Source]:
    if name.startswith("wds/"):
        return tar_shards(name, root, splits, classes)
    assert root is None or isinstance(root, Path)
    if name == "fashion-mnist-5k":
        if root is not None:
            raise ValueError(
                f"root: got {root}, but 'fashion-mnist-5k' is in the package; use name='fashion-mnist' or no root"
            )
        return embedded()
    if name == "fashion-mnist":
        return fashion_mnist(root)
    if name == "folder":
        return image_folder(root)
    if name.startswith("hfids/"):
        return hub_shards(name, root, splits)
    if name.startswith((*TIMM, *STREAMS)):
        return timm_dataset(name, root, splits)
    near = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(word) for word in near)}? " if near else ""
    if os.path.isdir(name):
        hint = f"for the images in that folder write name='folder', root={name!r}; "
    known = ", ".join((*NAMES, "torch/<set>", "hfds/<owner>/<set>", "wds/", "hfids/<owner>/<set>"))
    raise ValueError(f"unknown data set {name!r}; {hint}known: {known}")


def _statistics(
    name: str, train: Source, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if (mean is None) != (std is None):
        raise ValueError(f"{'mean' if std is None else 'std'}: given alone; give both mean and std, or neither")
    channels = train.images.shape[1] if isinstance(train, Arrays) else 3
    if mean is not None and std is not None:
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(f"mean, std: got {mean}, {std}; {name!r} needs {channels} of each, and std above 0")
        return tuple(mean), tuple(std)
    if name.startswith("fashion-mnist"):
        return FASHION_MEAN, FASHION_STD
    if not isinstance(train, Arrays):
        return IMAGENET_MEAN, IMAGENET_STD
    # a histogram: exact, and no float copy of the set
    value = torch.arange(256, dtype=torch.float64) / 255
    counts = [torch.bincount(train.images[:, c].flatten().int(), minlength=256).double() for c in range(channels)]
    shares = [count / count.sum() for count in counts]
    means = [float((share * value).sum()) for share in shares]
    deviations = [float((share * (value - m) ** 2).sum().sqrt()) for share, m in zip(shares, means, strict=True)]
    return tuple(means), tuple(max(deviation, 1e-6) for deviation in deviations)


def _first(train: Source, limit: int) -> Source:
    if isinstance(train, Arrays):
        return replace(train, images=train.images[:limit], labels=train.labels[:limit])
    assert not isinstance(train, Shards)
    return Spread(train, limit)
