"""What a recipe would do, told without doing it: all is built on the meta device, without data, weights or memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .distiller import Distiller
from .ready import Ready, get_ready
from .recipe import Recipe, build, weights
from .results import count_parameters
from .terms import Term
from .training import runfolder


class Nowhere(NamedTuple):
    """Stands for the accelerator of a run that is not made."""

    device: torch.device = torch.device("meta")
    process_index: int = 0
    num_processes: int = 1


def dry_run(recipe: Recipe, convert: weights.Convert | None = None) -> str:
    """The plan of a run and of the runs that it needs, those first, as text.

    Models, adapters, optimizer and learning rate are the real ones, built on the meta device: a misfit is found as it
    would be in the run. Files of weights are read where they are there, and named where they are not.

    Raises:
        ConfigError: as ``runs.run``.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights loaded into nothing, of workers that never start
        ready = get_ready(recipe, Nowhere(num_processes=world), convert)
        told: dict[Path, str] = {}
        for one in _in_order(ready):
            if one.recipe.output not in told:
                told[one.recipe.output] = "\n".join(_tell(one, world))
    end = "a dry run: nothing was trained, downloaded or written"
    return "\n\n".join([*told.values(), end])


def _in_order(ready: Ready) -> Iterator[Ready]:
    """The runs in the order in which they are made."""
    for child in ready.teachers.values():
        yield from _in_order(child)
    if ready.baseline is not None:
        yield from _in_order(ready.baseline)
    yield ready


def _tell(ready: Ready, world: int) -> Iterator[str]:
    recipe, data = ready.recipe, ready.data
    yield f"{ready.title} → {recipe.output} ({_state(recipe.output)})"
    yield _line("model", f"{_named(recipe.student.whole)}, {count_parameters(ready.student):,} parameters")
    if recipe.student.weights is not None:
        yield _line("start", _file(recipe.student.weights))
    if (init := recipe.student.init) is not None:
        copied = len(weights.shared(ready.student, ready.panel[init]))
        own = len(ready.student.state_dict()) - copied
        yield _line("start", f"{copied} tensors from teacher {init!r}, {own} of its own")
    for name, spec in recipe.teachers.items():
        origin = f"trained first, {ready.teachers[name].recipe.output}" if name in ready.teachers else "timm's weights"
        origin = _file(spec.weights) if spec.weights is not None else origin
        size = f"{count_parameters(ready.panel[name]):,} parameters"
        images = f", images {ready.images_of(name)}" if name in ready.prepare else ""
        yield _line("teacher", f"{name}: {_named(spec.whole)}, {size}, {origin}{images}")
    root = recipe.data.get("root")
    there = "" if root is None or Path(root).exists() else f" ({root} is not there: ImageNet's numbers stand for it)"
    if data.name == "folder" and root is None:
        there = " (give data.root=…; ImageNet's numbers stand for it)"
    shape = f"{data.channels}×{data.image_size}×{data.image_size}"
    yield _line("data", f"{data.name}, images {shape}, {len(data.classes):,} classes{there}")
    yield from _schedule(ready, world)
    yield from (_line("term", _window(term, recipe.epochs)) for term in ready.plan.terms)
    yield from (f"  {line}" for line in str(ready.plan).splitlines())


def _schedule(ready: Ready, world: int) -> Iterator[str]:
    """Length, optimizer, and the learning rate at the epochs where it turns."""
    recipe, spec = ready.recipe, ready.recipe.schedule
    steps, batch = len(ready.data.train) // recipe.accumulate, ready.data.train.batches.batch_size
    images = batch * world * recipe.accumulate
    yield _line("length", f"{recipe.epochs} epochs × {steps:,} steps of {images:,} images")
    with torch.device("meta"):
        distiller = Distiller(ready.student, ready.plan.terms)
        optimizer = build.build_optimizer(recipe.optimizer, distiller)
    distiller.remove()
    scheduler = build.build_scheduler(recipe, optimizer, steps)
    rates = []
    for epoch in sorted({0.0, spec.warmup_epochs, recipe.epochs / 2, recipe.epochs - spec.cooldown_epochs}):
        scheduler.step_update(int(epoch * steps))
        rates.append(f"{optimizer.param_groups[0]['lr']:.3g} at {epoch:g}")
    groups = [(len(group["params"]), bool(group["weight_decay"])) for group in optimizer.param_groups]
    decayed, count = sum(n for n, decays in groups if decays), sum(n for n, _ in groups)
    decay = f"{recipe.optimizer.weight_decay:g} on {decayed} of {count} tensors"
    yield _line("optimizer", f"{recipe.optimizer.name}, weight decay {decay}")
    yield _line("rate", f"{', '.join(rates)} epochs")


def _window(term: Term, epochs: int) -> str:
    """The epochs in which a term is on, counted from 1 as the logs count them, and its weight at both ends."""
    values = {epoch + 1: term.weight_at(epoch, epochs) for epoch in range(epochs)}
    live = {epoch: weight for epoch, weight in values.items() if weight > 0}
    if not live:
        return f"{term.name}: never on"
    first, last = min(live), max(live)
    slope = "" if live[first] == live[last] else f" to {live[last]:.3g}"
    of = f"epochs {first} to {last}" if len(live) < epochs else f"all {epochs} epochs"
    pairs = f", {term.reduce} over {len(term.pairs)} pairs" if len(term.pairs) > 1 else ""
    return f"{term.name}: {live[first]:.3g}{slope} × {_loss(term.loss)}, {of}{pairs}"


def _loss(loss: object) -> str:
    """A loss in one line, without the modules that it trains."""
    if not isinstance(loss, nn.Module):
        return getattr(loss, "__name__", "loss")
    if trained := sum(p.numel() for p in loss.parameters()):
        return f"{type(loss).__name__}({loss.extra_repr()}) with {trained:,} trained parameters"
    return " ".join(repr(loss).split())


def _state(folder: Path) -> str:
    return "finished, would be read" if runfolder.summary(folder) is not None else "to be trained"


def _file(path: Path) -> str:
    return f"weights from {path}{'' if path.exists() else ', which is MISSING'}"


def _named(whole: dict[str, object]) -> str:
    given = ", ".join(f"{key} {value}" for key, value in whole.items() if key != "name")
    return f"{whole['name']} ({given})" if given else str(whole["name"])


def _line(what: str, text: str) -> str:
    return f"  {what:<11}{text}"
