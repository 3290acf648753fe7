"""The processes in which a study's runs train: cards in turn, cores in shares."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch

from ..training.place import cores

VISIBLE = "CUDA_VISIBLE_DEVICES"
Given = TypeVar("Given")
Answer = TypeVar("Answer")


class Workers:
    """``jobs`` processes, which take turns at the GPUs that this one sees.

    Each compiles, if it does, on its share of the cores; by itself it would take all. Where one is killed, so are all,
    as ``concurrent.futures`` has it, and what is submitted next gets new processes.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs, self.pool = jobs, _pool(jobs)

    def submit(self, function: Callable[[Given], Answer], given: Given) -> Future[Answer]:
        try:
            return self.pool.submit(function, given)
        except BrokenProcessPool:
            self.pool = _pool(self.jobs)
            return self.pool.submit(function, given)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def _pool(jobs: int) -> ProcessPoolExecutor:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores() // jobs)))
    context = multiprocessing.get_context("spawn")
    if not (names := cards()):
        return ProcessPoolExecutor(jobs, context)
    places: SimpleQueue[str] = context.SimpleQueue()
    for job in range(jobs):
        places.put(names[job % len(names)])
    return ProcessPoolExecutor(jobs, context, initializer=take_card, initargs=(places,))


def cards() -> list[str]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES takes; none where there is no choice."""
    count = torch.cuda.device_count()
    visible = os.environ.get(VISIBLE)
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return names if count > 1 else []


def take_card(places: SimpleQueue[str]) -> None:
    """Takes the next card for this process alone, before anything of it touches one."""
    os.environ[VISIBLE] = places.get()
