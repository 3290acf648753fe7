"""How a term's weight moves over training: factors between 0 and 1 as functions of the epoch.

A moment is written as an int (an epoch, counted from 0) or as a float in [0, 1] (a fraction of the whole run):
``until=80`` is epoch 80, ``until=0.5`` is half-way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Moment = int | float
Schedule = Callable[[float, int], float]
"""``schedule(epoch, epochs)`` gives the factor at ``epoch`` (fractions allowed) of a run of ``epochs``."""


def moment(when: Moment, epochs: int) -> float:
    """The epoch that ``when`` means in a run of ``epochs``.

    Raises:
        ValueError: a negative epoch, or a fraction outside [0, 1].
    """
    if isinstance(when, int):
        if when < 0:
            raise ValueError(f"an epoch is counted from 0, got {when}")
        return float(when)
    if not 0 <= when <= 1:
        raise ValueError(f"a moment is an epoch (an int) or a fraction of the run in [0, 1] (a float), got {when}")
    return round(when * epochs, 9)  # 80 / 120 of 120 epochs is 80, not the float beside it


@dataclass(frozen=True)
class Window:
    """1 from ``start`` (included) to ``until`` (excluded), 0 elsewhere; by default always 1."""

    start: Moment = 0
    until: Moment = 1.0

    def __post_init__(self) -> None:
        moment(self.start, 1), moment(self.until, 1)

    def __call__(self, epoch: float, epochs: int) -> float:
        endless = isinstance(self.until, float) and self.until == 1
        return float(moment(self.start, epochs) <= epoch and (endless or epoch < moment(self.until, epochs)))


ALWAYS = Window()


@dataclass(frozen=True)
class Ramp:
    """From factor ``first`` at ``start`` to ``last`` at ``until``, along a line or half a cosine; constant outside."""

    first: float = 1.0
    last: float = 0.0
    start: Moment = 0
    until: Moment = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        moment(self.start, 1), moment(self.until, 1)
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"a ramp's shape is 'linear' or 'cosine', got {self.shape!r}")

    def __call__(self, epoch: float, epochs: int) -> float:
        start, until = moment(self.start, epochs), moment(self.until, epochs)
        if until <= start:
            raise ValueError(f"a ramp ends after it starts, got start={self.start}, until={self.until}")
        way = min(max((epoch - start) / (until - start), 0.0), 1.0)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.first + (self.last - self.first) * way


@dataclass(frozen=True)
class Product:
    """Several schedules at a time: a ramp within a window."""

    factors: tuple[Schedule, ...]

    def __call__(self, epoch: float, epochs: int) -> float:
        return math.prod(factor(epoch, epochs) for factor in self.factors)
