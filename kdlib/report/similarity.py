"""How alike the blocks of student and teacher are, before and after training."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..cka import LEAST
from ..pairs import alike, blocks
from .opened import Opened

IMAGES = 512
"""Of the test set, the first so many."""


def similarity(opened: Opened, teacher: str) -> tuple[list[str], list[str], list[Tensor | None]]:
    """Student's blocks, teacher's blocks, and CKA ``(student, teacher)`` of the initial and of the trained student.

    None where the student in question is not there.

    Raises:
        ValueError, RuntimeError: blocks that give no tensors, or fewer than four images.
    """
    member = opened.teachers[teacher]
    assert member.net is not None
    students = [opened.initial, opened.student.net]
    ours, theirs = next((blocks(net) for net in students if net is not None), []), blocks(member.net)
    found = [
        None if net is None else alike(net, member.net, _batches(opened, member.prepare), ours, theirs)
        for net in students
    ]
    return ours, theirs, found


def _batches(opened: Opened, prepare: nn.Module | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The first test images as student and teacher take them."""
    left = IMAGES
    for images, _ in opened.data.test.epoch(0):
        images = images[:left]
        left -= len(images)
        if len(images) >= LEAST:
            yield images, prepare(images) if prepare is not None else images
        if left <= 0:
            return
