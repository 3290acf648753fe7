"""What is measured on two processes is what one measures, whatever the number of images, to the last digit."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib.data import load
from tests.tars import make_shards

processes = multiprocessing.get_context("spawn")


class Steps(nn.Module):
    """Answers in whole numbers, so that sums are exact in any order: whichever class a pixel says."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot((images.mean((1, 2, 3)) * 40).long() % 10, 10).float() * 4


def measure(rank: int, world: int, port: int, roots: list[str], out: str) -> None:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    from accelerate import Accelerator

    from kdlib.training.evaluation import evaluate

    accelerator, found = Accelerator(cpu=True), []
    assert accelerator.num_processes == world
    for root in roots:
        given: dict[str, Any] = {"root": root, "image_size": 28, "batch_size": 1, "eval_batch_size": 4, "workers": 0}
        data = load("wds/", rank=rank, world_size=world, **given)
        found.append(evaluate(Steps(), data.test, accelerator))
    torch.save(found, f"{out}.{rank}")


SIZES = (1, 2, 7, 103)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, float]]]]:
    """World size to what each rank measured of each size."""
    folder = tmp_path_factory.mktemp("metrics")
    roots = [str(make_shards(folder / str(n), {"train": (2, 2), "validation": (n,)})) for n in SIZES]
    found = {}
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = str(folder / f"out{world}")
        job = [processes.Process(target=measure, args=(rank, world, port, roots, out)) for rank in range(world)]
        for process in job:
            process.start()
        for process in job:
            process.join(300)
            assert process.exitcode == 0
        found[world] = [torch.load(Path(f"{out}.{rank}"), weights_only=True) for rank in range(world)]
    return found


@pytest.mark.fault("metrics")
@pytest.mark.parametrize("size", SIZES)
def test_two_processes_measure_what_one_does(size: int, measured: dict[int, list[list[dict[str, float]]]]) -> None:
    (one,), (first, second) = measured[1], measured[2]
    at = SIZES.index(size)
    assert first[at] == second[at] and set(one[at]) == {"top1", "top5", "test_loss"}
    assert (first[at]["top1"], first[at]["top5"]) == (one[at]["top1"], one[at]["top5"])
    assert first[at]["test_loss"] == pytest.approx(one[at]["test_loss"], rel=1e-6)  # sums of sums, in float32
