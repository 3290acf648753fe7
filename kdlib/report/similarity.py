"""How alike the blocks of student and teacher are, before and after training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..cka import LEAST, cka_matrix
from ..taps import Taps
from .opened import Opened

IMAGES = 512
"""Of the test set, the first so many."""


def blocks(model: nn.Module) -> list[str]:
    """The taps of a model's blocks, in order: the members of the innermost lists of modules that have parts.

    ``stages.0.blocks.0`` … of a MetaFormer, ``layer1.0`` … of a ResNet, ``blocks.0`` … of a ViT; of a model without
    such lists, its children.
    """
    found = list(_blocks("", model))
    return found or [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def _blocks(name: str, module: nn.Module) -> Iterator[str]:
    deeper = [tap for child, part in module.named_children() for tap in _blocks(f"{name}.{child}".lstrip("."), part)]
    if deeper:
        yield from deeper
    elif isinstance(module, nn.Sequential | nn.ModuleList):
        parts = dict(module.named_children())
        if parts and all(any(True for _ in part.children()) for part in parts.values()):
            yield from (f"{name}.{part}" for part in parts)


@torch.no_grad()
def similarity(opened: Opened, teacher: str) -> tuple[list[str], list[str], list[Tensor | None]]:
    """Student's blocks, teacher's blocks, and CKA ``(student, teacher)`` of the initial and of the trained student.

    Over the first 512 test images, in batches as they come. None where the student in question is not there.

    Raises:
        ValueError, RuntimeError: blocks that give no tensors, or too few images.
    """
    member = opened.teachers[teacher]
    assert member.net is not None
    theirs = blocks(member.net)
    students = [opened.initial, opened.student.net]
    ours = next((blocks(net) for net in students if net is not None), [])
    found = [
        None if net is None else cka_matrix(_features(opened, net, ours, member.net, theirs, member.prepare))
        for net in students
    ]
    return ours, theirs, found


def _features(
    opened: Opened,
    student: nn.Module,
    ours: list[str],
    teacher: nn.Module,
    theirs: list[str],
    prepare: nn.Module | None,
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    taps = Taps(student, ours), Taps(teacher, theirs)
    seen = 0
    try:
        for images, _ in opened.data.test.epoch(0):
            images = images[: IMAGES - seen]
            if len(images) < LEAST:
                return
            seen += len(images)
            mine = taps[0].watch(student, images)[1]
            yours = taps[1].watch(teacher, prepare(images) if prepare is not None else images)[1]
            yield [mine[tap] for tap in ours], [yours[tap] for tap in theirs]
    finally:
        for tap in taps:
            tap.remove()
