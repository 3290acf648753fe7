"""Batches from image files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from .augment import BatchAugment
from .loader import BatchLoader, Normalise
from .samplers import EpochBatches, seeded
from .sources import Files, unreadable
from .workers import Unreadable, arrived, by_workers


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
            return Unreadable(unreadable(self.source, index, error))
        with seeded(self.seed, "image", epoch, index):
            return self.transform(image), label


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, Unreadable)), None) or default_collate(samples)


class FileLoader(BatchLoader):
    """Batches of images that worker processes read, transform and send as uint8.

    The workers live on between epochs, so one epoch at a time: one that is still being read when another starts raises
    `RuntimeError`.
    """

    batches: EpochBatches

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
        super().__init__(batches, device)
        self._arrived = partial(arrived, device=device, normalise=normalise, finish=finish)
        self._running: object = None
        samples = _Samples(source, transform, batches.seed)
        kept = {"batch_sampler": batches, "collate_fn": _collate, "persistent_workers": workers > 0}
        self._start = partial(by_workers(device, workers, batches.seed, **kept), samples)
        self._loader = self._start()

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._running = run = object()
        self.batches.position = (epoch, start)
        broken = None
        for batch, sample in enumerate(self._loader, start):
            if isinstance(sample, Unreadable):
                broken = str(sample)
                break
            yield self._arrived(sample, epoch, batch)
            if self._running is not run:
                raise RuntimeError(
                    "another epoch of this loader was started while this one was read; read one at a time"
                )
        if broken is not None:
            # the workers go now: left to the garbage collector, beside the traceback, each takes 5 s to stop
            self._loader = self._start()
            raise ValueError(broken)
