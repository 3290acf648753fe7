"""Batches from images in memory and from image files, the same in every run with the same seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..signals import calm
from .augment import Augment, BatchAugment, crop_flip, crop_flip_draws, rand_augment
from .fashion import Arrays
from .samplers import Batches, EpochBatches, generator, seeded
from .sources import Files, unreadable

if TYPE_CHECKING:
    from .streams import ShardLoader


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


def _check_start(loader: Loader, start: int) -> None:
    if not 0 <= start <= len(loader):
        raise ValueError(
            f"start: got batch {start}, but an epoch has {len(loader)} batches; expected 0 to {len(loader)}"
        )


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


class ArrayLoader:
    """Batches of images in memory: they are moved to the device once, and cropped, flipped and resized there.

    RandAugment works on PIL images, so with it the images stay in the host's memory and each batch is sent.
    `augment` and `finish` are None in evaluation.
    """

    def __init__(
        self,
        arrays: Arrays,
        batches: EpochBatches,
        normalise: Normalise,
        *,
        device: torch.device,
        mean: tuple[float, ...],
        augment: Augment | None = None,
        finish: BatchAugment | None = None,
    ) -> None:
        self.batches, self.normalise, self.device, self.augment, self.finish = (
            batches,
            normalise,
            device,
            augment,
            finish,
        )
        self.size = arrays.images.shape[-1]
        self.policy: Any = None
        if augment is not None and augment.rand_augment:
            self.policy = rand_augment(augment.rand_augment, self.size, mean)
        self.home = torch.device("cpu") if self.policy else device
        padding = augment.crop_padding if augment else 0
        self.images = F.pad(arrays.images, (padding,) * 4).to(self.home)
        self.labels = arrays.labels.to(self.home)
        self.samples = sum(len(row) for row in batches.rows(0))

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.epoch`."""
        _check_start(self, start)
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.batches.rows(epoch)
        if not rows:
            return
        order = torch.cat(rows)
        # all that is random about cropping and flipping is sent in one piece, so that a batch sends nothing
        draws = (
            crop_flip_draws(len(self.labels), self.augment, seed=self.batches.seed, epoch=epoch)
            if self.augment
            else None
        )
        plan = order[None] if draws is None else torch.cat([order[None], draws[:, order]])
        for batch, part in enumerate(self._send(plan, self.home).split(self.batches.batch_size, dim=1)):
            if batch < start:
                continue
            index = part[0]
            labels = self.labels[index]
            images = self.images[index] if draws is None else crop_flip(self.images, part, self.size)
            if self.policy is not None:
                with seeded(self.batches.seed, "rand augment", epoch, batch, self.batches.rank):
                    images = torch.stack([self._policy(image) for image in images])
            images = self.normalise(self._send(images, self.device))
            labels = self._send(labels, self.device)
            if self.finish is not None:
                images, labels = self.finish(images, labels, epoch, batch)
            yield images, labels

    def _policy(self, image: Tensor) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        return pil_to_tensor(self.policy(to_pil_image(image)))

    @staticmethod
    def _send(values: Tensor, device: torch.device) -> Tensor:
        if device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)


class _Unreadable(str):
    """Stands for an image that cannot be read, because an exception would reach the user as a worker's traceback."""


def _by_workers(device: torch.device, workers: int, seed: int, **more: Any) -> Callable[..., DataLoader[Any]]:
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


def _arrived(loader: FileLoader | ShardLoader, batch: list[Tensor], epoch: int, number: int) -> tuple[Tensor, Tensor]:
    """The uint8 images and the labels that workers made, on the device and as `Loader.epoch` says."""
    images, labels = (part.to(loader.device, non_blocking=True) for part in batch)
    images = loader.normalise(images)
    return (images, labels) if loader.finish is None else loader.finish(images, labels, epoch, number)


class _Samples(Dataset[Any]):
    """Decodes and transforms the image `(epoch, index)`, with random numbers from the seed and that pair."""

    def __init__(self, source: Files, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        try:
            image, label = self.source.read(index)
        except Exception as error:
            # whatever a decoder raises: PIL alone has OSError, SyntaxError, ValueError and a bomb error
            return _Unreadable(unreadable(self.source, index, error))
        with seeded(self.seed, "image", epoch, index):
            return self.transform(image), label


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, _Unreadable)), None) or default_collate(samples)


class FileLoader:
    """Batches of images that worker processes read, transform and send as uint8.

    The workers live on between epochs, so one epoch at a time: starting another ends the one before.
    """

    def __init__(
        self,
        source: Files,
        batches: EpochBatches,
        normalise: Normalise,
        transform: Any,
        *,
        device: torch.device,
        workers: int,
        finish: BatchAugment | None = None,
    ) -> None:
        self.batches, self.normalise, self.device, self.finish = batches, normalise, device, finish
        self.samples = sum(len(row) for row in batches.rows(0))
        self._running: object = None
        samples = _Samples(source, transform, batches.seed)
        kept = {"batch_sampler": batches, "collate_fn": _collate, "persistent_workers": workers > 0}
        self._start = partial(_by_workers(device, workers, batches.seed, **kept), samples)
        self._loader = self._start()

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Loader.epoch`. An epoch that is still being read when another starts raises `RuntimeError`."""
        _check_start(self, start)
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._running = run = object()
        self.batches.position = (epoch, start)
        broken = None
        for batch, sample in enumerate(self._loader, start):
            if isinstance(sample, _Unreadable):
                broken = str(sample)
                break
            yield _arrived(self, sample, epoch, batch)
            if self._running is not run:
                raise RuntimeError(
                    "another epoch of this loader was started while this one was read; read one at a time"
                )
        if broken is not None:
            # the workers go now: left to the garbage collector, beside the traceback, each takes 5 s to stop
            self._loader = self._start()
            raise ValueError(broken)
