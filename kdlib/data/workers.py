"""What loaders share whose images are read by worker processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..signals import calm
from .augment import BatchAugment
from .loader import Normalise
from .samplers import generator


class Unreadable(str):
    """Stands for an image that cannot be read, because an exception would reach the user as a worker's traceback."""


def by_workers(device: torch.device, workers: int, seed: int, **more: Any) -> Callable[..., DataLoader[Any]]:
    """What makes a `DataLoader` of a data set, whose workers stop in peace and draw no global random number."""
    return partial(
        DataLoader[Any],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=calm,
        # without it every iterator draws a number from the global generator
        generator=generator(seed, "loader"),
        **more,
    )


def arrived(
    batch: list[Tensor],
    epoch: int,
    number: int,
    *,
    device: torch.device,
    normalise: Normalise,
    finish: BatchAugment | None,
) -> tuple[Tensor, Tensor]:
    """The uint8 images and the labels that workers made, on the device and as `Loader.epoch` says."""
    images, labels = (part.to(device, non_blocking=True) for part in batch)
    images = normalise(images)
    return (images, labels) if finish is None else finish(images, labels, epoch, number)
