"""What a run will take: seconds of a step in each phase of its schedule, of the whole, and memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from time import perf_counter

import torch
from accelerate import Accelerator

from ..data import with_targets
from ..distiller import Distiller
from ..engine import engine, let_go, settle
from ..ready import Ready
from ..recipe import build
from ..teacher import Teacher
from ..training import runfolder


@dataclass(frozen=True)
class Phase:
    """Epochs in which the same terms are on."""

    first: int
    """Counted from 1."""
    last: int
    terms: tuple[str, ...]
    step: float
    """Seconds of one, all its batches included, from the median of a batch."""


@dataclass(frozen=True)
class Cost:
    """Of one run, and of those that it needs first."""

    title: str
    phases: list[Phase]
    steps: int
    """An epoch; each of as many batches as are accumulated."""
    evaluation: float
    """Seconds of one."""
    evaluations: int
    memory: float
    """Peak bytes: of the GPU, or of this whole process on a CPU."""
    children: list[Cost]
    on_cpu: bool = True

    @property
    def own(self) -> float:
        """Seconds of this run alone."""
        steps = sum((phase.last - phase.first + 1) * self.steps * phase.step for phase in self.phases)
        return steps + self.evaluations * self.evaluation

    @property
    def seconds(self) -> float:
        """Of this run and of all that it needs first."""
        return self.own + sum(child.seconds for child in self.children)


def estimate(ready: Ready, distiller: Distiller, teacher: Teacher | None, accelerator: Accelerator, steps: int) -> Cost:
    """Trains a few steps in each phase of the schedule and counts up; as it is, uncompiled.

    Runs that are needed first (teachers, baseline) are measured in the same way and stand in ``children``; those that
    are finished take nothing.
    """
    recipe, data = ready.recipe, ready.data
    optimizer = build.build_optimizer(recipe.optimizer, distiller)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)

    def live(epoch: int) -> tuple[str, ...]:
        return tuple(t.name for t in distiller.terms if t.weight_at(epoch, recipe.epochs) > 0)

    phases = []
    for terms, group in groupby(range(recipe.epochs), live):
        epochs = list(group)
        distiller.set_epoch(epochs[0], recipe.epochs)
        if teacher is not None:
            teacher.set_epoch(epochs[0], recipe.epochs)
        seconds = _time_batches(ready, distiller, teacher, accelerator, optimizer, steps)
        phases.append(Phase(epochs[0] + 1, epochs[-1] + 1, terms, seconds * recipe.accumulate))
    evaluations = len({*range(recipe.eval_every, recipe.epochs + 1, recipe.eval_every), recipe.epochs})
    children = [*ready.teachers.values(), *([ready.baseline] if ready.baseline is not None else [])]
    return Cost(
        ready.title,
        phases,
        len(data.train) // recipe.accumulate,
        _time_evaluation(ready, accelerator),
        evaluations,
        _memory(accelerator.device),
        [_of_child(child, accelerator, steps) for child in children if runfolder.summary(child.recipe.output) is None],
        accelerator.device.type == "cpu",
    )


def _of_child(ready: Ready, accelerator: Accelerator, steps: int) -> Cost:
    distiller, teacher = engine(ready, accelerator.device, settle(ready, accelerator))
    try:
        return estimate(ready, distiller, teacher, accelerator, steps)
    finally:
        let_go(distiller, teacher)


def _time_batches(
    ready: Ready,
    distiller: Distiller,
    teacher: Teacher | None,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    count: int,
) -> float:
    """Median seconds of ``count`` batches, each a training step, after one to warm up."""
    reads = [key for term in distiller.terms for key in term.targets]
    taken: list[float] = []
    distiller.train()
    while len(taken) < count + 1:
        batches = with_targets(ready.data.train, reads)
        _wait(accelerator.device)
        began = perf_counter()
        for images, targets in batches:
            with accelerator.autocast():
                if teacher is not None:
                    targets = targets | teacher(images)
                out = distiller(images, targets)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _wait(accelerator.device)
            taken.append(perf_counter() - began)
            began = perf_counter()
            if len(taken) > count:
                break
    return median(taken[1:])


@torch.no_grad()
def _time_evaluation(ready: Ready, accelerator: Accelerator) -> float:
    """Seconds of an evaluation, from its first batch."""
    student, loader = ready.student.eval(), ready.data.test
    _wait(accelerator.device)
    began = perf_counter()
    for images, _ in loader.epoch(0):
        with accelerator.autocast():
            student(images)
        _wait(accelerator.device)
        return (perf_counter() - began) * len(loader)
    return 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
