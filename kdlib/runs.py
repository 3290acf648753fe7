"""From a checked recipe to a finished run folder: what it needs is made first, once, and reused, as make would."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3

from .data import Data
from .engine import engine, let_go, settle
from .progress import say
from .ready import Ready, get_ready
from .recipe import Recipe, build, probe, weights
from .recipe import schema as recipes
from .training import faults, runfolder, sharding, tracking
from .training.evaluation import evaluate
from .training.place import start
from .training.ranks import on_main
from .training.train import Training

AS_THEY_ARE = ("epochs", "accumulate", "log_every", "log_gradients", "eval_every", "save_every")
"""Keys of a recipe that ``Training`` takes as they are."""


@dataclass
class Outcome:
    """A finished run."""

    name: str
    """The student's model name."""
    folder: Path
    student: torch.nn.Module
    """With its trained weights, on the run's device."""
    data: Data
    result: dict[str, float]
    """``top1`` and ``top5`` in percent, ``test_loss``."""
    accelerator: Accelerator
    teachers: dict[str, Outcome] = field(default_factory=dict)
    baseline: Outcome | None = None
    seconds: float = 0.0
    """What making it took, with the teachers and the baseline that were not there yet; as then, if it is read back."""
    prepare: torch.nn.Module | None = None
    """What turns the data's images into those that it expects, if anything has to."""

    @property
    def net(self) -> torch.nn.Module:
        """The student, to be asked with the data's images."""
        return self.student if self.prepare is None else torch.nn.Sequential(self.prepare, self.student)


def run(
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    convert: weights.Convert | None = None,
    title: str = "student",
) -> Outcome:
    """Trains what the recipe says, or reads it back where its folder holds the finished run.

    Teachers without weights and the baseline are runs of their own, beside this one, named by their config; a run that
    was stopped goes on from its last checkpoint. Everything is checked (models, weights, taps, shapes, a batch through
    all of it, in each run) before the first folder is made.

    Args:
        convert: for weight files of foreign names, see ``recipe.weights.load_weights``.

    Raises:
        ConfigError: anything in the recipe that does not fit, or a folder that holds another run.
    """
    accelerator = accelerator or start(recipe)
    runfolder.check_agreed(recipe, accelerator)
    return _make(get_ready(recipe, accelerator, convert, title), accelerator)


def _make(ready: Ready, accelerator: Accelerator) -> Outcome:
    """Makes the children, then the run itself, each unless it is there already."""
    began = perf_counter()
    recipe, student, panel, title = ready.recipe, ready.student, ready.panel, ready.title
    shown = accelerator.is_main_process
    teachers = {name: _make(child, accelerator) for name, child in ready.teachers.items()}
    outcome = Outcome(recipe.student.name, recipe.output, student, ready.data, {}, accelerator, teachers)
    if ready.baseline is not None:
        outcome.baseline = _make(ready.baseline, accelerator)
    for name, child in teachers.items():
        panel[name].load_state_dict(child.student.state_dict())
    found = runfolder.finished(recipe, student)
    if found is None:
        if recipe.student.init is not None:
            copied = weights.inherit(student, panel[recipe.student.init])
            own = len(student.state_dict()) - len(copied)
            say(f"{title}: {len(copied)} tensors from teacher {recipe.student.init!r}, {own} of its own", shown)
        say(f"{title}: {recipe.student.name} → {recipe.output}\n{ready.plan}", shown)
        for name in ready.prepare:
            say(f"{title}: teacher {name} sees images {ready.images_of(name)}", shown)
        with ExitStack() as ours:
            on_main(accelerator, lambda: ours.enter_context(runfolder.claimed(recipe)))
            faults.reach("start")
            result, student, average = _train(ready, accelerator)
            outcome.student = student
            seconds = perf_counter() - began
            on_main(accelerator, lambda: runfolder.finish(recipe, student, average, result, seconds))
    else:
        result, outcome.seconds = found
        student.to(accelerator.device)
        say(f"{title}: finished before, read from {recipe.output}", shown)
    accelerator.wait_for_everyone()
    outcome.result = result
    for name, spec in recipe.teachers.items():
        if name not in teachers:
            member, prepare = panel[name].to(accelerator.device), ready.prepare.get(name)
            prepare = prepare and prepare.to(accelerator.device)
            teachers[name] = Outcome(spec.name, recipe.output, member, ready.data, {}, accelerator, prepare=prepare)
            teachers[name].result = _measure(teachers[name], spec)
            if (top1 := teachers[name].result["top1"]) <= 100 / len(ready.data.classes):
                what = f"teacher {name} is right on {top1:.1f} % of the test images, which is no more than chance"
                say(f"! {title}: {what}; kdlib doctor tells more", shown)
    outcome.seconds = outcome.seconds or perf_counter() - began
    return outcome


def _measure(given: Outcome, spec: recipes.Teacher) -> dict[str, float]:
    """How good a teacher is that no run of ours trained; NaN where it tells other classes apart than the data."""
    logits = probe.answer(given.net, next(given.data.test.epoch(0))[0][:1], given.name)
    if not probe.judged(spec, given.student, logits, len(given.data.classes)):
        return dict.fromkeys(("top1", "top5", "test_loss"), nan)  # labels may lie beyond its last class
    return evaluate(given.net, given.data.test, given.accelerator)


def _train(ready: Ready, accelerator: Accelerator) -> tuple[dict[str, float], torch.nn.Module, torch.nn.Module | None]:
    """The last evaluation, the trained student, and its moving average where there is one."""
    recipe, data = ready.recipe, ready.data
    set_seed(recipe.seed, device_specific=True)  # what was drawn above depends on what was there already
    last, student = settle(ready, accelerator), ready.student
    ema = ModelEmaV3(student, recipe.ema.decay, use_warmup=recipe.ema.warmup) if recipe.ema is not None else None
    untouched = deepcopy(student).cpu() if accelerator.is_fsdp2 else None  # what is trained there are pieces
    distiller, teacher = engine(ready, accelerator.device, last)
    optimizer = build.build_optimizer(recipe.optimizer, distiller)
    training = Training(
        distiller,
        teacher,
        data,
        optimizer,
        build.build_scheduler(recipe, optimizer, len(data.train) // recipe.accumulate),
        accelerator,
        recipe.output,
        title=ready.title,
        channels_last=last,
        clip_grad=recipe.optimizer.clip_grad,
        compile=recipe.compile.mode,
        compile_teacher=recipe.compile.teacher,
        ema=ema,
        metric=recipe.metric,
        patience=recipe.patience,
        on_nonfinite=recipe.on_nonfinite,
        trackers=tracking.choose(recipe.trackers),
        config=runfolder.resolved(recipe),
        **{name: getattr(recipe, name) for name in AS_THEY_ARE},
    )
    try:
        result = training.run()
    finally:
        let_go(distiller, teacher)
    average = None if ema is None else ema.module
    if untouched is not None:
        average = average and sharding.fill(deepcopy(untouched), average).to(accelerator.device)
        student = sharding.fill(untouched, student).to(accelerator.device)
    return result, student, average
