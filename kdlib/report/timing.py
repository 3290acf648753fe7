"""Where the time of a training step goes: a few real ones, taken apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import with_targets
from ..distiller import Distiller
from ..recipe import build
from ..sizing import fit
from ..teacher import Teacher
from .opened import Opened, panel

STEPS, PATIENCE = 8, 20.0
"""Steps that are timed, after one that is not; seconds after which no further one is started."""
PARTS = ("data", "teacher", "student forward", "backward", "optimizer")


@dataclass(frozen=True)
class Step:
    """Where the time of a training step goes."""

    milliseconds: dict[str, float]
    """By part, medians over the steps."""
    steps: int
    batch: int
    terms: tuple[str, ...]
    """Those that are on in the first epoch, which is what was timed."""


def time_step(opened: Opened) -> Step:
    """Times the parts of a few training steps of the first epoch, on copies of the models, without mixed precision.

    Raises:
        ConfigError: the student or a teacher is missing.
    """
    recipe, data, teachers = opened.recipe, opened.data, panel(opened)
    if opened.student.net is None or teachers is None:
        raise ConfigError(["a model is missing"])
    student = copy.deepcopy(opened.student.net).train()
    device = next(student.parameters()).device
    prepare = {name: copy.deepcopy(m.prepare) for name, m in opened.teachers.items() if m.prepare is not None}
    images = next(data.train.epoch(0))[0]
    terms = build.build_terms(recipe, student, teachers, data.train.batches.images)
    plan = fit(terms, student, teachers, images[:2], prepare=prepare)
    distiller = Distiller(student, plan.terms).to(device)
    teacher = Teacher(teachers, plan.terms, prepare=prepare).to(device) if teachers else None
    optimizer = build.build_optimizer(recipe.optimizer, distiller)
    distiller.train().set_epoch(0, recipe.epochs)
    if teacher is not None:
        teacher.set_epoch(0, recipe.epochs)
    taken: list[list[float]] = []
    began = perf_counter()
    batches = with_targets(data.train, [key for term in plan.terms for key in term.targets])
    for _ in range(min(STEPS + 1, len(data.train))):
        taken.append(_step(batches, teacher, distiller, optimizer, device))
        if perf_counter() - began > PATIENCE:
            break
    timed = torch.tensor(taken[1:] or taken, dtype=torch.float64).median(0).values * 1000
    live = tuple(name for name, weight in distiller.weights_in_force().items() if weight > 0)
    return Step(dict(zip(PARTS, timed.tolist(), strict=True)), len(taken[1:] or taken), len(images), live)


def _step(
    batches: Iterator[tuple[Tensor, dict[str, Tensor]]],
    teacher: Teacher | None,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> list[float]:
    """Seconds of each part of one step."""
    marks = [_now(device)]
    images, targets = next(batches)
    marks.append(_now(device))
    targets = targets | (teacher(images) if teacher is not None else {})
    marks.append(_now(device))
    out = distiller(images, targets)
    marks.append(_now(device))
    out.loss.backward()
    marks.append(_now(device))
    optimizer.step()
    optimizer.zero_grad()
    marks.append(_now(device))
    return [after - before for before, after in pairwise(marks)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
