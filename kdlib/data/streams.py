"""Batches from shards: who reads what, in which order, and the loader that reads it.

All is known beforehand. The shards of an epoch, in an order of its own, are one long row of images; each rank, and in
it each worker, reads one stretch of it, of exactly as many images as its batches hold. So every rank has as many
batches, no image comes twice, and how the shards are cut does not matter. Within its stretch a worker draws the next
image from those that it holds. Since the order is known, a run that begins at any batch reads the shards that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from .augment import BatchAugment
from .loader import BatchLoader, Normalise
from .samplers import generator, seeded
from .shards import Shards
from .sources import unreadable
from .workers import Unreadable, arrived, by_workers


@dataclass(frozen=True)
class Lane:
    """What one worker reads in one epoch."""

    reads: tuple[tuple[int, int, int], ...]
    """Shard, first image in it, last (excluded); in the order of reading."""
    rows: tuple[Tensor, ...]
    """The image numbers of its batches, int64."""


class ShardBatches:
    """`Batches` of images that can only be read in a row.

    Args:
        lengths: images of each shard.
        buffer: images that a worker holds, of which the next is drawn; 1 keeps the order of the shards.
        workers: that each rank reads with. Batch `b` is read by worker `b % workers`.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        batch_size: int,
        *,
        train: bool,
        buffer: int = 1,
        workers: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths, self.batch_size, self.train, self.buffer = np.array(lengths, np.int64), batch_size, train, buffer
        self.images, self.workers = int(self.lengths.sum()), workers
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self._count(self.rank)

    def _count(self, rank: int) -> int:
        if self.train:
            return self.images // (self.batch_size * self.world_size)
        first, last = self._stretch(0, rank)
        return -(-(last - first) // self.batch_size)

    def _stretch(self, epoch: int, rank: int) -> tuple[int, int]:
        """Where in the row of all images a rank begins and ends."""
        if not self.train:
            return self.images * rank // self.world_size, self.images * (rank + 1) // self.world_size
        share = self.images // (self.batch_size * self.world_size) * self.batch_size
        spare = self.images - share * self.world_size  # left out, and not the same ones each time
        begin = int(torch.randint(spare + 1, (), generator=generator(self.seed, "spare", epoch))) + rank * share
        return begin, begin + share

    def lane(self, epoch: int, worker: int, rank: int | None = None) -> Lane:
        """What a worker reads."""
        rank = self.rank if rank is None else rank
        begin, end = self._stretch(epoch, rank)
        # the last batch alone may be shorter; a stretch of whole batches for each worker
        sizes = np.full(self._count(rank), self.batch_size)
        if len(sizes):
            sizes[-1] = (end - begin) - self.batch_size * (len(sizes) - 1)
        mine = sizes[worker :: self.workers]
        begin += int(sum(sizes[before :: self.workers].sum() for before in range(worker)))
        end = begin + int(mine.sum())

        order = np.arange(len(self.lengths))
        if self.train:
            order = torch.randperm(len(order), generator=generator(self.seed, "shards", epoch)).numpy()
        ends = np.cumsum(self.lengths[order])
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        reads, numbers = [], []
        low, high = np.searchsorted(ends, [begin, end - 1], side="right")
        for place in range(low, high + 1) if len(mine) else ():
            shard, at = int(order[place]), int(ends[place] - self.lengths[order[place]])
            first, last = max(begin - at, 0), min(end - at, int(self.lengths[shard]))
            if first < last:
                reads.append((shard, first, last))
                numbers.append(torch.arange(first, last) + int(offsets[shard]))
        found = torch.cat(numbers) if numbers else torch.empty(0, dtype=torch.int64)
        if self.train and self.buffer > 1:
            found = found[drawn(len(found), self.buffer, self.seed, "draw", epoch, rank, worker)]
        return Lane(tuple(reads), found.split(mine.tolist()) if len(mine) else ())

    def rows(self, epoch: int, rank: int | None = None) -> tuple[Tensor, ...]:
        """See `Batches.rows`."""
        lanes = [self.lane(epoch, worker, rank).rows for worker in range(self.workers)]
        count = self._count(self.rank if rank is None else rank)
        return tuple(lanes[batch % self.workers][batch // self.workers] for batch in range(count))


def drawn(count: int, buffer: int, *key: int | str) -> Tensor:
    """An order of `count` things that come one by one, where the next is drawn of `buffer` that are held: int64.

    Thing `i` comes at place `i - buffer` or later.
    """
    held, order = list(range(min(buffer, count))), []
    for place, draw in enumerate(torch.rand(count, generator=generator(*key), dtype=torch.float64).tolist()):
        chosen = int(draw * len(held))
        order.append(held[chosen])
        if place + buffer < count:
            held[chosen] = place + buffer
        else:
            held[chosen] = held[-1]
            held.pop()
    return torch.tensor(order, dtype=torch.int64)


class _Reading(IterableDataset[Any]):
    """The batches of one epoch from `start` on, as this worker reads them."""

    def __init__(self, source: Shards, batches: ShardBatches, transform: Any, epoch: int, start: int) -> None:
        self.source, self.batches, self.transform, self.epoch, self.start = source, batches, transform, epoch, start

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number = (self.start + (0 if worker is None else worker.id)) % self.batches.workers  # it is asked first
        lane = self.batches.lane(self.epoch, number)
        rows = lane.rows[-(-(self.start - number) // self.batches.workers) if self.start > number else 0 :]
        wanted = set(torch.cat(rows).tolist()) if rows else set()
        coming, held = self._coming(lane, wanted), dict[int, Any]()
        for row in rows:
            samples = []
            for index in row.tolist():
                while index not in held:
                    at, sample = next(coming)
                    if isinstance(sample, Unreadable):
                        yield sample
                        return
                    held[at] = sample
                try:
                    image, label = self.source.read(held.pop(index))
                except Exception as error:  # whatever a decoder raises, as in from_files._Samples
                    yield Unreadable(unreadable(self.source, index, error))
                    return
                with seeded(self.batches.seed, "image", self.epoch, index):
                    samples.append((self.transform(image), label))
            if row is rows[-1]:
                for _, sample in coming:  # a last shard that is longer than told says so when asked for one more
                    yield sample
                    return
            yield default_collate(samples)

    def _coming(self, lane: Lane, wanted: set[int]) -> Iterator[tuple[int, Any]]:
        """Number and sample of the wanted images, in the order in which they are stored; at last what went wrong."""
        begins = [0, *np.cumsum(self.batches.lengths).tolist()]
        for shard, first, last in lane.reads:
            places = [place for place in range(first, last) if begins[shard] + place in wanted]
            if not places:
                continue
            number = begins[shard] + places[0]
            try:
                for sample in self.source.samples(shard, places[0], last):
                    if number in wanted:
                        yield number, sample
                    number += 1
                    if number == begins[shard] + last < begins[shard + 1]:
                        break  # what lies behind is another's
            except Exception as error:  # whatever a disk, a network or a broken file raises
                number = min(number, begins[shard] + last - 1)  # one image too many is still this shard's fault
                yield number, Unreadable(unreadable(self.source, number, error))


class ShardLoader(BatchLoader):
    """Batches of images that worker processes read from shards, transform and send as uint8.

    Each epoch has workers of its own. No two workers read the same image, and no rank reads for another.
    """

    batches: ShardBatches

    def __init__(
        self,
        source: Shards,
        batches: ShardBatches,
        normalise: Normalise,
        transform: Any,
        *,
        device: torch.device,
        workers: int,
        finish: BatchAugment | None = None,
    ) -> None:
        super().__init__(batches, device)
        self._arrived = partial(arrived, device=device, normalise=normalise, finish=finish)
        self._reading = partial(_Reading, source, batches, transform)
        self._start = by_workers(device, workers, batches.seed, batch_size=None, collate_fn=_as_it_is)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        broken = None
        for batch, sample in enumerate(self._start(self._reading(epoch, start)), start):
            if isinstance(sample, Unreadable):
                broken = str(sample)
                break
            yield self._arrived(sample, epoch, batch)
        if broken is not None:
            raise ValueError(broken)


def _as_it_is(batch: Any) -> Any:
    return batch
