"""Does each teacher reach its accuracy under our preprocessing, and what is done to its images?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from accelerate import Accelerator
from torch import nn

from ..ready import Ready
from ..recipe.probe import judged
from ..recipe.schema import Teacher
from ..recipe.wording import nearest
from ..training import runfolder


@dataclass(frozen=True)
class Examined:
    """One teacher."""

    name: str
    model: str
    source: str
    """Where its weights come from."""
    trained: bool
    """Whether it has weights of any training."""
    top1: float | None
    """Percent of the test images; None where it tells other classes apart than the data."""
    expected: float | None
    """Percent that it should reach: what the caller says, or what its own run ended with; None where nobody knows."""
    chance: float
    """Percent that a guess would be right on."""
    images: int
    bridge: str
    """What is done to the student's images before it sees them."""

    @property
    def margin(self) -> float:
        """Three standard errors of ``expected`` over so many images, in percent: as far off is chance."""
        return _margin(self.expected or 0.0, self.images)

    @property
    def short(self) -> bool:
        """Whether it stays below what it should reach by more than the margin."""
        return self.top1 is not None and self.expected is not None and self.top1 < self.expected - self.margin

    @property
    def by_chance(self) -> bool:
        """Whether a guess might do as well."""
        return self.top1 is not None and self.top1 < self.chance + _margin(self.chance, self.images)


def _margin(percent: float, images: int) -> float:
    """Three standard errors over so many images, in percent."""
    share = percent / 100
    return 300 * sqrt(share * (1 - share) / max(images, 1))


def examine(
    ready: Ready, accelerator: Accelerator, count: int, expect: Mapping[str, float] | None = None
) -> list[Examined]:
    """Measures every teacher of a run; those whose own run is finished get the weights of it.

    Raises:
        ValueError: ``expect`` names a teacher that there is not, or no percentage.
    """
    found, expected = [], dict(expect or {})
    for name, value in expected.items():
        if name not in ready.recipe.teachers:
            raise ValueError(f"expect: no teacher {name!r}{nearest(name, ready.recipe.teachers)}")
        if not 0 <= value <= 100:
            raise ValueError(f"expect: top-1 of {name} in percent, 0 to 100, got {value:g}")
    for name, spec in ready.recipe.teachers.items():
        member, source, trained = ready.panel[name], "timm's pretrained weights", True
        if spec.weights is not None:
            source = str(spec.weights)
        elif (child := ready.teachers.get(name)) is not None:
            told = runfolder.finished(child.recipe, child.student)
            trained = told is not None
            source = f"{child.recipe.output} (finished)"
            if told is not None:
                expected.setdefault(name, told[0]["top1"])
                member.load_state_dict(child.student.state_dict())
            else:
                source = f"to be trained first, {child.recipe.epochs} epochs"
        bridge = ready.prepare.get(name)
        top1, images = _accuracy(spec, member, bridge, ready, accelerator, count)
        chance = 100 / len(ready.data.classes)
        goal = expected.get(name)
        found.append(Examined(name, spec.name, source, trained, top1, goal, chance, images, ready.images_of(name)))
    return found


@torch.no_grad()
def _accuracy(
    spec: Teacher, model: nn.Module, bridge: nn.Module | None, ready: Ready, accelerator: Accelerator, count: int
) -> tuple[float | None, int]:
    """(percent right, or None where its answer is not judged; test images seen)."""
    model.to(accelerator.device).eval()
    bridge = bridge.to(accelerator.device) if bridge is not None else nn.Identity()
    right = seen = 0
    for images, labels in ready.data.test.epoch(0):
        with accelerator.autocast():
            logits = model(bridge(images))
        if not judged(spec, model, logits, len(ready.data.classes)):
            return None, 0
        right += int((logits.argmax(1) == labels).sum())
        seen += len(labels)
        if seen >= count:
            break
    return 100 * right / seen, seen
