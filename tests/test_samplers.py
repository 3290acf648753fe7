"""The order of images and the private randomness of each draw."""

import contextlib
import random

import numpy as np
import pytest
import torch

from kdlib.data.samplers import EpochBatches, epoch_order, generator, seeded, shard, stable_hash


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_hash_is_the_same_on_every_machine() -> None:
    # written down, because a run must resume under another Python or numpy
    assert stable_hash(0, "order", 3) == 386106667988085106
    assert stable_hash(np.int64(0), "order", np.int32(3)) == stable_hash(0, "order", 3)
    assert stable_hash("0", "order", 3) != stable_hash(0, "order", 3)
    assert len({stable_hash(a, b) for a in range(50) for b in range(50)}) == 2500


def test_seeded_repeats_and_puts_everything_back() -> None:
    before = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draw() for _ in range(3)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    got = [draw()]
    with seeded(7, "a", 0):
        inside = draw()
        with seeded(7, "b", 0):
            other = draw()
        second = draw()
    got.append(draw())
    with contextlib.suppress(KeyError), seeded(7, "a", 0):
        assert draw() == inside
        raise KeyError
    got.append(draw())
    assert got == expected
    assert all(len(set(column)) == 4 for column in zip(before, inside, other, second, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeded_puts_cuda_back() -> None:
    torch.cuda.manual_seed(1)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(1)
    with seeded(7, device="cuda"):
        inside = torch.rand(4, device="cuda")
    assert torch.equal(torch.rand(4, device="cuda"), expected)
    with seeded(7, device="cuda:0"):
        assert torch.equal(torch.rand(4, device="cuda"), inside)
    assert not torch.equal(inside, expected)


def test_order_differs_by_epoch_and_seed_only() -> None:
    first = epoch_order(100, 10, seed=0, epoch=0)
    assert torch.equal(first, epoch_order(100, 10, seed=0, epoch=0))
    assert sorted(first.flatten().tolist()) == list(range(100))
    assert not torch.equal(first, epoch_order(100, 10, seed=0, epoch=1))
    assert not torch.equal(first, epoch_order(100, 10, seed=1, epoch=0))
    assert not torch.equal(epoch_order(100, 10, seed=0, epoch=1), epoch_order(100, 10, seed=1, epoch=0))


@pytest.mark.parametrize(
    ("images", "batch_size", "world"), [(103, 8, 1), (103, 8, 2), (103, 8, 3), (48, 16, 3), (7, 1, 7)]
)
def test_ranks_share_each_global_batch(images: int, batch_size: int, world: int) -> None:
    parts = [epoch_order(images, batch_size, seed=5, epoch=2, rank=rank, world_size=world) for rank in range(world)]
    assert {tuple(part.shape) for part in parts} == {(images // (batch_size * world), batch_size)}
    together = torch.cat(parts, dim=1)
    assert len(set(together.flatten().tolist())) == together.numel()
    assert torch.equal(together, epoch_order(images, batch_size * world, seed=5, epoch=2))


@pytest.mark.parametrize(("images", "world"), [(10, 1), (10, 3), (2, 3), (12, 4)])
def test_shards_hold_each_image_once(images: int, world: int) -> None:
    parts = [shard(images, rank, world) for rank in range(world)]
    assert sorted(torch.cat(parts).tolist()) == list(range(images))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("images", [2, 24, 25, 29])
def test_batches_are_as_many_as_promised(train: bool, world: int, images: int) -> None:
    for rank in range(world):
        batches = EpochBatches(images, 4, train=train, seed=1, rank=rank, world_size=world)
        rows = batches.rows(3)
        assert len(rows) == len(batches)
        batches.position = (3, 0)
        whole = list(batches)
        assert whole == [[(3, index) for index in row.tolist()] for row in rows]
        for start in range(len(whole) + 1):
            batches.position = (3, start)
            assert list(batches) == whole[start:]


def test_generators_are_their_own() -> None:
    state = torch.get_rng_state()
    a, b = generator(0, "x"), generator(0, "y")
    assert not torch.equal(torch.rand(4, generator=a), torch.rand(4, generator=b))
    assert torch.equal(torch.get_rng_state(), state)
