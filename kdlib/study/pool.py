"""The processes in which a study's runs train: cards in turn, cores in shares, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from threading import Thread
from typing import TypeVar

import torch

from ..progress import say
from ..signals import Stopped, handling
from ..training.place import cores

VISIBLE = "CUDA_VISIBLE_DEVICES"
Given = TypeVar("Given")
Answer = TypeVar("Answer")


class Workers:
    """``jobs`` processes, which take turns at the GPUs that this one sees.

    Each compiles, if it does, on its share of the cores; by itself it would take all. A run is asked to save and end
    where the study is stopped or gone. Where one process is killed, so are all, as ``concurrent.futures`` has it, and
    what is submitted next gets new ones.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs, self.pool = jobs, _pool(jobs)

    def submit(self, function: Callable[[Given], Answer], given: Given) -> Future[Answer]:
        with handling({signal.SIGINT: signal.SIG_IGN}):  # which processes that start here inherit
            try:
                return self.pool.submit(_work, function, given)
            except BrokenProcessPool:
                self.pool = _pool(self.jobs)
                return self.pool.submit(_work, function, given)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            say("stopping: each run finishes its step and saves")
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(cancel_futures=True)


def _pool(jobs: int) -> ProcessPoolExecutor:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores() // jobs)))
    context = multiprocessing.get_context("spawn")
    names = cards() or [""]
    places: SimpleQueue[str] = context.SimpleQueue()
    for job in range(jobs):
        places.put(names[job % len(names)])
    return ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(places,))


def cards() -> list[str]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES takes; none where there is no choice."""
    count = torch.cuda.device_count()
    visible = os.environ.get(VISIBLE)
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return names if count > 1 else []


# in a worker


def _begin(places: SimpleQueue[str]) -> None:
    """Takes the next card for this process alone, before anything of it touches one.

    Ctrl-C in a terminal goes to all that its session holds; here the study alone gets it, and asks once.
    """
    if card := places.get():
        os.environ[VISIBLE] = card
    if hasattr(os, "setsid"):
        os.setsid()
    Thread(target=_end_with_the_study, daemon=True).start()


def _end_with_the_study() -> None:
    study = multiprocessing.parent_process()
    assert study is not None
    study.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _work(function: Callable[[Given], Answer], given: Given) -> Answer:
    try:
        return function(given)
    except Stopped as stopped:  # it was asked to end, and has saved; nothing may begin here any more
        sys.stdout.flush()
        os._exit(128 + stopped.number)
