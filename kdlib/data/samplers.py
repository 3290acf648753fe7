"""Which image comes when, and with which random numbers: all follows from (seed, epoch, place).

A run that stops in the middle of an epoch and starts again must see the same batches with the same augmentation. So no
generator advances from batch to batch: each draw starts from a hash of a key that says what it is for.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def stable_hash(*key: int | str) -> int:
    """A number in [0, 2^63) that depends on `key` only: the same in every process, on every machine."""
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own, seeded from `key`."""
    return torch.Generator().manual_seed(stable_hash(*key))


@contextmanager
def seeded(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, Python's, numpy's and torch's CPU generators start from `key`; afterwards they are as they were before.

    If `device` is a CUDA device, its generator is treated alike; its state lives on the host, so nothing waits for the
    device. For code that draws from the global generators, as timm's augmentation does.
    """
    seed = stable_hash(*key)
    device = torch.device(device)
    cuda = None
    if device.type == "cuda":
        torch.cuda.init()
        cuda = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    before = None if cuda is None else cuda.get_state()
    try:
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        # torch.manual_seed would seed every device, and only one is put back
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)
        if cuda is not None and before is not None:
            cuda.set_state(before)


def epoch_order(images: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """The image numbers one rank trains on in one epoch.

    One permutation of all images is cut into global batches of `batch_size * world_size`; what is left over is dropped,
    and each rank takes its own part of every global batch.

    Returns:
        int64 (batches, batch_size). The ranks' rows `b`, side by side, are the global batch `b`, which is the same for
        every `world_size` that gives the same global batch size.
    """
    batches = images // (batch_size * world_size)
    order = torch.randperm(images, generator=generator(seed, "order", epoch))
    return order[: batches * batch_size * world_size].view(batches, world_size, batch_size)[:, rank]


def shard(images: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """The image numbers one rank evaluates: every `world_size`-th, int64. Over all ranks each image comes once."""
    return torch.arange(rank, images, world_size)


class Batches(Protocol):
    """Which images come when."""

    images: int
    """Over all ranks."""
    batch_size: int
    seed: int
    rank: int

    def __len__(self) -> int: ...

    def rows(self, epoch: int, rank: int | None = None) -> tuple[Tensor, ...]:
        """The image numbers of each batch of an epoch, of this rank or another, int64.

        Only in evaluation may the last be shorter.
        """


class EpochBatches:
    """A batch sampler whose items are `(epoch, image number)`: the data set then knows the epoch without being told.

    `position` is `(epoch, first batch)`; set it before each iteration. In evaluation the order never changes.
    """

    def __init__(
        self, images: int, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.images, self.batch_size, self.train = images, batch_size, train
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.position = (0, 0)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        if self.train:
            return self.images // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, self.images, self.world_size)) // self.batch_size)

    def rows(self, epoch: int, rank: int | None = None) -> tuple[Tensor, ...]:
        """See `Batches.rows`."""
        rank = self.rank if rank is None else rank
        if not self.train:
            mine = shard(self.images, rank, self.world_size)
            return mine.split(self.batch_size) if len(mine) else ()
        order = epoch_order(
            self.images, self.batch_size, seed=self.seed, epoch=epoch, rank=rank, world_size=self.world_size
        )
        return order.unbind()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.position
        for row in self.rows(epoch)[start:]:
            yield [(epoch, index) for index in row.tolist()]
