"""What a schema cannot say: names that must exist, and that must agree between the sections of a recipe."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import pairwise
from math import ceil
from typing import Any

import timm
from timm.optim import list_optimizers
from torch import nn

from .. import schedules
from ..config import Key, one_line
from ..losses import LOSSES
from ..teacher import TAKEN
from ..terms import NAME
from .build import build_optimizer, build_schedule
from .schema import Loss, Named, Recipe, Term
from .wording import nearest, short

HUB = "hf-hub:"
OWN_DOORS = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of timm.create_model that read files, in some versions with pickle; weights come in by ``weights``."""


def disagreements(recipe: Recipe, unsound: Collection[str]) -> list[tuple[Key, str]]:
    """Each thing that is wrong, by key.

    Args:
        unsound: terms whose loss is unknown or misbuilt, so that nobody can say what it reads.
    """
    terms = list(_terms(recipe, unsound))
    return [
        *_models(recipe),
        *_teachers(recipe),
        *(terms or _silence(recipe)),
        *_training(recipe),
    ]


def _models(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    specs: dict[Key, Named] = {("student",): recipe.student}
    specs |= {("teachers", name): spec for name, spec in recipe.teachers.items()}
    for key, spec in specs.items():
        if not spec.name.startswith(HUB) and not timm.is_model(spec.name):
            hint = nearest(spec.name, timm.list_models()) or "; timm.list_models() lists them"
            yield (*key, "name"), f"no model {short(spec.name)}{hint}"
        if spec.sha256 is not None and spec.weights is None:  # type: ignore[attr-defined]
            yield (*key, "sha256"), "names no file; give weights: the file that it is of"
        for argument in OWN_DOORS:
            if argument in spec.arguments:
                yield (*key, argument), "is not taken from a config; name a file of tensors by weights"


def _teachers(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    init = recipe.student.init
    if init is not None and init not in recipe.teachers:
        known = ", ".join(recipe.teachers) or "none"
        yield ("student", "init"), f"no teacher {init!r}{nearest(init, recipe.teachers)} (known: {known})"
    for name, teacher in recipe.teachers.items():
        if not name.isidentifier():
            yield ("teachers", name), f"a teacher's name is a plain word (got {short(name)})"
        elif name in TAKEN:
            yield ("teachers", name), f"a teacher cannot be called {short(name)}, as a method of modules is; rename it"
        if teacher.recipe is None and not teacher.foreign:
            yield (
                ("teachers", name),
                "has no weights: give weights: a file, pretrained: true, or recipe: what trains it",
            )
        if (teacher.mean is None) != (teacher.std is None):
            yield ("teachers", name), "mean and std belong together; give both or neither"


def _terms(recipe: Recipe, unsound: Collection[str]) -> Iterator[tuple[Key, str]]:
    if not recipe.terms:
        yield ("terms",), "there are no terms; give at least one, e.g. {label: {loss: cross_entropy}}"
    for name, term in recipe.terms.items():
        key: Key = ("terms", name)
        if not NAME.fullmatch(name):
            yield key, f"a term's name is a plain word of letters, digits, _ and - (got {short(name)})"
        last = getattr(term.slope, "until", None)
        if schedules.moment(term.until, recipe.epochs) <= schedules.moment(term.start, recipe.epochs):
            yield (*key, "until"), f"ends before it starts (start {term.start}, until {term.until})"
        elif last is not None and schedules.moment(last, recipe.epochs) <= schedules.moment(term.start, recipe.epochs):
            what = f"ends before the term starts (start {term.start}, got {last}); give a later moment"
            yield (*key, "slope", "until"), what
        elif term.weight > 0 and not any(build_schedule(term)(t, recipe.epochs) for t in _turns(term, recipe.epochs)):
            when = f"is on in no epoch of {recipe.epochs} (start {term.start}, until {term.until})"
            yield key, f"{when}; change start, until or slope, or set the term to null"
        try:
            sides = term.sides
        except ValueError as error:
            yield (*key, "teacher"), str(error)
            continue
        for mine, _ in sides:
            if (mine or "").startswith("@") and mine != "@output":
                yield (*key, "student"), f"the student's answer is '@output', and it has no other @ (got {mine!r})"
        yield from (((*key, "loss"), wrong) for wrong in _mixed(term.loss.whole, recipe))
        for wrong in dict.fromkeys(_whom(term.loss, whom, recipe, name not in unsound) for _, whom in sides):
            if wrong:
                yield (*key, "teacher"), wrong


def _silence(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """The epochs of which nothing can be learned: no term's weight is above 0."""
    epochs = recipe.epochs
    turns = {0, epochs}.union(*(_turns(term, epochs) for term in recipe.terms.values()))
    weights = [(term.weight, build_schedule(term)) for term in recipe.terms.values()]
    dark: list[tuple[int, int]] = []
    for first, after in pairwise(sorted(turns)):
        if not any(weight * schedule(first, epochs) > 0 for weight, schedule in weights):
            first = dark.pop()[0] if dark and dark[-1][1] == first else first
            dark.append((first, after))
    if dark:
        when = (f"epoch {a}" if b - a == 1 else f"epochs {a} to {b - 1}" for a, b in dark)
        yield (
            ("terms",),
            f"none is on in {', '.join(when)} of {epochs} (counted from 0), so nothing could be learned there; "
            "change start, until, slope or weight of one",
        )


def _turns(term: Term, epochs: int) -> set[int]:
    """The epochs of a run at which a term's weight becomes 0, or another than 0, if it ever does."""
    slope = () if term.slope is None or term.slope.until is None else (term.slope.until,)
    start, *ends = (ceil(schedules.moment(when, epochs)) for when in (term.start, term.until, *slope))
    return {turn for turn in (start, start + 1, *ends) if turn < epochs}


def _mixed(loss: dict[str, Any], recipe: Recipe) -> Iterator[str]:
    """Losses, held ones too, that cannot do with the mixed images that the recipe trains on."""
    augment = recipe.data.get("augment")
    given = augment if isinstance(augment, dict) else {}
    on = [name for name in ("mixup", "cutmix") if isinstance(alpha := given.get(name), int | float) and alpha > 0]
    if not on:
        return
    for name, part in _named(loss):
        needs = getattr(part, "against", ())
        if "indices" in needs:
            yield f"{name} remembers each image by itself, and {on[0]} mixes two; set data.augment.{on[0]}=0"
        elif "labels" in needs and not getattr(part, "soft_labels", False):
            yield f"{name} needs one class an image, and {on[0]} mixes two; set data.augment.{on[0]}=0"


def _named(loss: dict[str, Any]) -> Iterator[tuple[str, type[nn.Module]]]:
    """(name, class) of a loss and of those that it holds."""
    if isinstance(name := loss.get("name"), str) and name in LOSSES:
        yield name, LOSSES[name]
    for value in loss.values():
        if isinstance(value, dict):
            yield from _named(value)


def _whom(loss: Loss, teacher: str | None, recipe: Recipe, sound: bool) -> str | None:
    """What is wrong with what a term of ``loss`` reads of a teacher, if anything."""
    teachers, name = ", ".join(recipe.teachers) or "none", loss.name
    owner, _, tap = ("@labels" if teacher is None else teacher).partition(".")
    if owner not in (*recipe.teachers, "@labels"):
        return f"no teacher {owner!r}{nearest(owner, recipe.teachers)} (known: {teachers})"
    if teacher is not None and teacher.endswith(".") and owner != "@labels":
        return f"ends in a dot; write {owner!r} for its answer (got {teacher!r})"
    if not sound:
        return None
    needed = "teacher" in loss.against
    if teacher is None:
        if not needed or len(recipe.teachers) == 1:
            return None
        return f"say which teacher: {teachers}" if recipe.teachers else f"{name} needs a teacher, and teachers is empty"
    if owner == "@labels":
        return f"{name} needs a teacher, not '@labels' (known: {teachers})" if needed or tap else None
    return None if needed else f"{name} reads the labels alone; leave teacher out"


def _training(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    schedule, epochs = recipe.schedule, recipe.epochs
    if recipe.metric.startswith("ema_") and recipe.ema is None:
        yield ("metric",), f"there is no moving average to measure; give ema: {{decay: …}} (got {recipe.metric!r})"
    if not recipe.teacher_autocast and recipe.precision != "bf16":
        yield ("teacher_autocast",), f"false goes with precision: bf16 (got {recipe.precision!r}); set that, or true"
    if schedule.warmup_epochs + schedule.cooldown_epochs >= epochs:
        yield (
            ("schedule",),
            f"warmup_epochs {schedule.warmup_epochs:g} and cooldown_epochs {schedule.cooldown_epochs:g} leave nothing "
            f"of {epochs} epochs; shorten them or train longer",
        )
    known = [str(name) for name in list_optimizers()]
    if recipe.optimizer.name.lower() not in known:
        yield (
            ("optimizer", "name"),
            f"no optimizer {short(recipe.optimizer.name)}"
            f"{nearest(recipe.optimizer.name, known) or '; timm.optim.list_optimizers() lists them'}",
        )
        return
    try:
        taken = build_optimizer(recipe.optimizer, nn.Linear(1, 1)).defaults
    except Exception as error:  # each optimizer refuses arguments in its own way
        yield ("optimizer",), f"{recipe.optimizer.name} cannot be built: {one_line(error)}"
        return
    for key in ("betas", "eps", "momentum"):  # timm passes over in silence what an optimizer has not
        if getattr(recipe.optimizer, key) is not None and key not in taken:
            yield ("optimizer", key), f"{recipe.optimizer.name} has no {key}; leave it out"
