"""From a checked recipe to a finished run folder: what it needs is made first, once, and reused, as make would."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file

from . import checkpoint
from .config import ConfigError, Document
from .data import Data
from .distiller import Distiller, Panel, Teacher
from .plan import fit
from .progress import say
from .recipe import Recipe, build, load
from .train import Training, evaluate

NO_MATTER = ("output", "threads", "log_every")
"""Keys that change nothing in what a run computes."""


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
    """What this call took, teachers and baseline included where they were not there yet."""


def start(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, its threads set.

    Raises:
        ConfigError: the launcher started several processes that do not know of each other.
    """
    accelerator = Accelerator(mixed_precision="no" if recipe.precision == "none" else recipe.precision)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise ConfigError(
            [
                f"launch: {world} processes were started, but each runs alone (no GPU, and ACCELERATE_USE_CPU is not "
                "set); on CPUs start with ACCELERATE_USE_CPU=true torchrun --nproc-per-node …"
            ]
        )
    if recipe.threads or (accelerator.device.type == "cpu" and world == 1):
        torch.set_num_threads(recipe.threads or os.cpu_count() or 1)  # accelerate launch leaves one thread on a CPU
    return accelerator


def run(
    recipe: Recipe, accelerator: Accelerator | None = None, convert: build.Convert | None = None, title: str = "student"
) -> Outcome:
    """Trains what the recipe says, or reads it back where its folder holds the finished run.

    Teachers without weights and the baseline are runs of their own, beside this one, named by their config; a run that
    was stopped goes on from its last checkpoint. Everything is checked (models, taps, shapes, a batch through all of
    it) before the first folder is made.

    Args:
        convert: for weight files of foreign names, see ``recipe.build.load_weights``.

    Raises:
        ConfigError: anything in the recipe that does not fit, or a folder that holds another run.
    """
    began = perf_counter()
    accelerator = accelerator or start(recipe)
    shown = accelerator.is_main_process
    _claimable(recipe)
    set_seed(recipe.seed)
    data = build.open_data(recipe, accelerator.device, accelerator.process_index, accelerator.num_processes)
    student = build.build_model(recipe.student, data, "student")
    if recipe.student.weights is not None:
        build.load_weights(student, recipe.student.weights, "student.weights", convert)
    panel = Panel({name: build.build_model(spec, data, f"teachers.{name}") for name, spec in recipe.teachers.items()})
    prepare = build.build_prepare(recipe, data, panel)
    terms = build.build_terms(recipe, student, panel)
    images = next(data.train.epoch(0))[0][:2].cpu()
    try:
        plan = fit(terms, student, panel, images, prepare=prepare)
    except ValueError as error:
        raise ConfigError([f"terms: {error}"]) from None
    children = {
        name: _teacher_recipe(recipe, name) for name, spec in recipe.teachers.items() if not build.is_foreign(spec)
    }
    baseline = _baseline_recipe(recipe)

    teachers = {name: run(child, accelerator, convert, f"teacher {name}") for name, child in children.items()}
    outcome = Outcome(recipe.student.name, recipe.output, student, data, {}, accelerator, teachers)
    if baseline is not None:
        outcome.baseline = run(baseline, accelerator, convert, "baseline")
    for name, spec in recipe.teachers.items():
        if name in teachers:
            panel[name].load_state_dict(teachers[name].student.state_dict())
        elif spec.weights is not None:
            build.load_weights(panel[name], spec.weights, f"teachers.{name}.weights", convert)
    if recipe.student.init is not None:
        copied, rest = build.inherit(student, panel[recipe.student.init])
        if not copied:
            raise ConfigError(
                [f"student.init: no tensor of {recipe.student.init!r} has a name and shape of the student's"]
            )
        say(f"{title}: {len(copied)} tensors from teacher {recipe.student.init!r}, {len(rest)} of its own", shown)

    done = recipe.output / "summary.json"
    if done.exists():
        outcome.result = json.loads(done.read_text())["result"]
        student.load_state_dict(load_file(recipe.output / "student.safetensors"))
        student.to(accelerator.device)
        say(f"{title}: finished before, read from {recipe.output}", shown)
    else:
        say(f"{title}: {recipe.student.name} → {recipe.output}\n{plan}", shown)
        _claim(recipe, accelerator)
        outcome.result = _train(recipe, accelerator, student, panel, plan.terms, prepare, data, title)
        if shown:
            checkpoint.save_weights(student, recipe.output / "student.safetensors")
            checkpoint.write_json(done, {"result": outcome.result, "seconds": perf_counter() - began})
        accelerator.wait_for_everyone()
    for name, spec in recipe.teachers.items():
        if name not in teachers:
            member = panel[name].to(accelerator.device)
            result = {} if name in prepare else evaluate(member, data.test, accelerator)
            teachers[name] = Outcome(spec.name, recipe.output, member, data, result, accelerator)
    outcome.seconds = perf_counter() - began
    return outcome


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    student: torch.nn.Module,
    panel: Panel,
    terms: Any,
    prepare: Any,
    data: Data,
    title: str,
) -> dict[str, float]:
    set_seed(recipe.seed)  # what was drawn above depends on what was there already
    memory = torch.channels_last if recipe.channels_last else torch.preserve_format
    distiller = Distiller(student.to(accelerator.device, memory_format=memory), terms).to(accelerator.device)  # type: ignore[call-overload]
    teacher = (
        Teacher(panel, terms, prepare=prepare, channels_last=recipe.channels_last).to(accelerator.device)
        if panel
        else None
    )
    optimizer = build.build_optimizer(recipe, distiller)
    training = Training(
        distiller,
        teacher,
        data,
        optimizer,
        build.build_scheduler(recipe, optimizer, max(1, len(data.train) // recipe.accumulate)),
        accelerator,
        recipe.output,
        recipe.epochs,
        title,
        recipe.accumulate,
        recipe.optimizer.clip_grad,
        recipe.channels_last,
        recipe.compile,
        recipe.log_every,
        recipe.eval_every,
    )
    try:
        return training.run()
    finally:
        distiller.taps.remove()


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, defaults included."""
    return recipe.model_dump(mode="json")


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in resolved(recipe).items() if key not in NO_MATTER}


def _teacher_recipe(recipe: Recipe, name: str) -> Recipe:
    spec = recipe.teachers[name]
    return _child(recipe, {"name": spec.name, **spec.arguments}, spec.recipe or {}, {}, f"teachers.{name}.recipe")


def _baseline_recipe(recipe: Recipe) -> Recipe | None:
    if recipe.baseline is None:
        return None
    kept = {key: resolved(recipe)[key] for key in ("epochs", "optimizer", "schedule", "accumulate")}
    return _child(recipe, {"name": recipe.student.name, **recipe.student.arguments}, recipe.baseline, kept, "baseline")


def _child(recipe: Recipe, model: dict[str, Any], own: Mapping[str, Any], kept: dict[str, Any], where: str) -> Recipe:
    """A recipe for ``model`` under the data, seed and machine settings of ``recipe``, its ``own`` keys over them."""
    shared = ("data", "seed", "precision", "channels_last", "compile", "threads", "log_every", "eval_every")
    document = Document()
    document.overlay({key: resolved(recipe)[key] for key in shared} | kept | {"student": model}, where)
    document.overlay(own, where)
    child = load(document)
    digest = hashlib.sha256(json.dumps(_identity(child), sort_keys=True).encode()).hexdigest()[:8]
    return child.model_copy(update={"output": recipe.output.parent / f"{child.student.name}-{digest}"})


def _claimable(recipe: Recipe) -> None:
    """Raises ConfigError if the output folder holds anything but this very run."""
    folder, file = recipe.output, recipe.output / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"output: {folder} is a file; name a folder"])
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError([f"output: {folder} is not empty and holds no run; choose another output=…"])
        return
    there = yaml.safe_load(file.read_text())
    there = there if isinstance(there, dict) else {}
    for key, value in _identity(recipe).items():
        if there.get(key) != value:
            old, new = _difference(there.get(key), value)
            raise ConfigError(
                [
                    f"output: {folder} already holds a run with another {key} ({old} there, {new} here); "
                    "choose another output=… or delete it"
                ]
            )


def _difference(old: Any, new: Any) -> tuple[str, str]:
    """The first part in which two values differ, shown short."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                inner = _difference(old.get(key), new.get(key))
                return f"{key}: {inner[0]}", f"{key}: {inner[1]}"
    return str(old)[:60], str(new)[:60]


def _claim(recipe: Recipe, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        recipe.output.mkdir(parents=True, exist_ok=True)
        draft = recipe.output / ".tmp-config.yaml"
        draft.write_text(yaml.safe_dump(resolved(recipe), sort_keys=False))
        draft.replace(recipe.output / "config.yaml")
    accelerator.wait_for_everyone()
