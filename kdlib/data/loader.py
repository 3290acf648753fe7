"""What a loader is: batches that are the same in every run with the same seed; and what is done to all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .samplers import Batches


class Loader(Protocol):
    """Batches of one split on one rank. `len` is the number of batches in a whole epoch."""

    samples: int
    """Images per epoch on this rank."""
    device: torch.device
    """Where batches arrive."""

    @property
    def batches(self) -> Batches:
        """Which image comes when."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from batch `start` on.

        Images are float32 (B, C, H, W), normalised, on the device. Labels are int64 (B,), or float32 (B, classes) from
        a training loader with mixup or cutmix. A batch depends on the seed, the epoch, its number, the rank and the
        world size only, and making it leaves the global random number generators as they were.

        Raises:
            ValueError: `start` outside 0…len, or (from the iterator) an image that cannot be read.
        """


def with_targets(
    loader: Loader, reads: Collection[str] = (), epoch: int = 0, start: int = 0
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """`loader.epoch` as images and targets: `@labels`, and `@indices` where `reads` has it.

    `@indices` is int64 (B,) on the device: which of the loader's images each one is, the same number in every epoch, on
    every rank and after a new start. The numbers of an epoch are sent at once, so that a batch sends nothing.
    """
    batches: Iterator[Any] = loader.epoch(epoch, start)
    if "@indices" not in reads:
        yield from ((images, {"@labels": labels}) for images, labels in batches)
        return
    rows = loader.batches.rows(epoch)[start:]
    numbers = torch.cat(rows).to(loader.device).split([len(row) for row in rows]) if rows else ()
    for (images, labels), indices in zip(batches, numbers, strict=True):
        yield images, {"@labels": labels, "@indices": indices}


class BatchLoader:
    """What the loaders here share: they follow `batches`. A derived class gives `_epoch(epoch, start)`."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.samples = sum(len(row) for row in batches.rows(0))

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.epoch`."""
        if not 0 <= start <= len(self):
            raise ValueError(
                f"start: got batch {start}, but an epoch has {len(self)} batches; expected 0 to {len(self)}"
            )
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError


class Normalise:
    """uint8 (B, C, H, W) to float32 of mean 0 and standard deviation 1, resized to `size` if that is not the size."""

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, size: int | None = None
    ) -> None:
        self.shift = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.scale = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        images = images.float().sub_(self.shift).div_(self.scale)
        if self.size is None or images.shape[-1] == self.size:
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
