"""Distiller and teacher of a run, on their device, in the precision and memory layout that its recipe asks for."""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import Accelerator

from .distiller import Distiller
from .ready import Ready
from .teacher import Teacher
from .training.place import channels_last


def settle(ready: Ready, accelerator: Accelerator) -> bool:
    """Brings the student to its device; says whether it, and so the images, are in channels_last there."""
    last = channels_last(ready.recipe.channels_last, ready.student, accelerator)
    layout = torch.channels_last if last else torch.preserve_format
    ready.student.to(accelerator.device, memory_format=layout)  # type: ignore[call-overload]
    return last


def engine(ready: Ready, device: torch.device, last: bool) -> tuple[Distiller, Teacher | None]:
    """Around a student that was settled; no teacher where no term reads one. Taps are set from now on."""
    recipe, terms, panel = ready.recipe, ready.plan.terms, ready.panel
    half = torch.bfloat16 if recipe.precision == "bf16" else None  # float16 does not hold every feature
    distiller = Distiller(ready.student, terms, dtype=half).to(device)
    if not panel:
        return distiller, None
    if not recipe.teacher_autocast:
        panel = deepcopy(panel)  # what is converted is not what is measured afterwards
    teacher = Teacher(
        panel, terms, prepare=ready.prepare, dtype=half, autocast=recipe.teacher_autocast, channels_last=last
    )
    return distiller, teacher.to(device)


def let_go(distiller: Distiller, teacher: Teacher | None) -> None:
    """Takes the taps off student and teachers: whoever gets them afterwards gets them without."""
    distiller.remove()
    if teacher is not None:
        teacher.remove()
