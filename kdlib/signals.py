"""SIGTERM and Ctrl-C: what is at hand is finished and saved, then the run ends; several processes agree on when."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

AGREE_EVERY = 4
"""Optimizer steps between two questions to the other processes whether one of them was asked to stop."""
MOMENT = 0.2
"""Seconds after which a worker process that got SIGTERM looks whether its parent still needs it."""
_finishing = mmap.mmap(-1, 1)
"""Whether this process was asked to stop and is not done; shared with the workers that it forks."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run; ``number`` is the signal's, ``saved`` whether a checkpoint was written for it."""

    def __init__(self, number: int, saved: bool = False) -> None:
        super().__init__(f"signal {number}")
        self.number, self.saved = number, saved


class Asked:
    """Whether somebody asked the run to stop: ``number`` is the signal's, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self._group: Any = None
        self._world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self._world > 1:  # on CPUs also where the gradients travel between GPUs, so that no GPU is waited for
            self._group = dist.new_group(backend="gloo")

    def agreed(self, step: int = 0) -> int:
        """The signal on which all processes stop after ``step``, or 0; each of them calls this after each step."""
        if self._world == 1:
            return self.number
        if step % AGREE_EVERY:
            return 0
        largest = torch.tensor(self.number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


@contextmanager
def listen() -> Iterator[Asked]:
    """Inside, SIGTERM and the first Ctrl-C only take a note; the second Ctrl-C ends the process at once."""
    asked = Asked()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if asked.number:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
        asked.number, _finishing[0] = number, 1

    try:
        with handling({signal.SIGTERM: note, signal.SIGINT: note}):
            yield asked
        asked.close()
    finally:
        _finishing[0] = 0


@contextmanager
def ending() -> Iterator[None]:
    """Inside, SIGTERM raises ``Stopped``, as Ctrl-C raises ``KeyboardInterrupt``."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with handling({signal.SIGTERM: end}):
        yield


def calm(worker: int) -> None:
    """Makes a worker process live on while its parent finishes, though the signal went to all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):

        def look_again(number: int, frame: FrameType | None) -> None:
            signal.setitimer(signal.ITIMER_REAL, MOMENT, MOMENT)

        def leave(number: int, frame: FrameType | None) -> None:
            if not _finishing[0]:
                os._exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGALRM, leave)
        signal.signal(signal.SIGTERM, look_again)


@contextmanager
def handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Inside, these signals have these handlers; in any thread but the main one, their own."""
    if threading.current_thread() is not threading.main_thread():  # there Python allows no handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
