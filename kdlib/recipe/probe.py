"""The models of a recipe, each asked by itself: whether it takes its images, and what its answer is over."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..config import ConfigError, one_line
from ..taps import in_eval
from ..teacher import Panel
from .schema import Recipe, Teacher


@torch.no_grad()
def answer(model: nn.Module, images: Tensor, where: str) -> Tensor:
    """The logits of a model in eval mode; its mode is restored.

    Raises:
        ConfigError: the model cannot take these images, or answers with something that is no ``(B, classes)``.
    """
    try:
        with in_eval(model):
            logits = model(images)
    except Exception as error:  # models fail in their own ways
        shape = "×".join(map(str, images.shape[1:]))
        raise ConfigError([f"{where}: the model cannot take images of {shape}: {one_line(error, 200)}"]) from None
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError([f"{where}: the model answers with {kind}, not with one score a class; choose another"])
    return logits


def check_answers(
    recipe: Recipe, student: nn.Module, panel: Panel, prepare: Mapping[str, nn.Module], images: Tensor, classes: int
) -> None:
    """Runs each model once by itself, so that a misfit is told by its name.

    Raises:
        ConfigError: a model that cannot take the images, or whose answer is not over as many classes as needed; a
            teacher that is to compute in bfloat16 and does not.
    """
    found = answer(student, images, "student").shape[1]
    if found != classes:
        raise ConfigError([f"student.num_classes: the data have {classes} classes (got {found})"])
    members = list(recipe.teachers)
    asked = {theirs for term in recipe.terms.values() for _, theirs in term.compared(members)}
    for name, spec in recipe.teachers.items():
        given = prepare[name](images) if name in prepare else images
        found = answer(panel[name], given, f"teachers.{name}").shape[1]
        if found != classes and (name in asked or not spec.foreign):
            raise ConfigError(
                [f"teachers.{name}.num_classes: the student and the data have {classes} classes (got {found})"]
            )
        if not recipe.teacher_autocast:
            _in_bfloat16(panel[name], given, f"teachers.{name}")
        own = _trained_on(spec, panel[name], classes)
        if name in asked and own != classes:
            raise ConfigError(
                [
                    f"teachers.{name}: its pretrained weights tell {own} classes apart, the data have {classes}, so "
                    "its answer would be noise; tap its features, or give weights: that were trained on these data"
                ]
            )


def judged(spec: Teacher, model: nn.Module, logits: Tensor, classes: int) -> bool:
    """Whether a teacher's answer, ``(B, K)``, can be right or wrong: it and its training are over ``classes``.

    A head of so many on timm's weights for other classes is new, and its answer noise.
    """
    return logits.shape[1] == classes == _trained_on(spec, model, classes)


def _trained_on(spec: Teacher, model: nn.Module, classes: int) -> int:
    """How many classes timm's weights tell apart; weights from a file or of a run of ours tell those of the data."""
    timms = spec.foreign and spec.weights is None
    return (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", classes) if timms else classes


@torch.no_grad()
def _in_bfloat16(model: nn.Module, images: Tensor, where: str) -> None:
    """Asks a converted copy, for a layer that insists on another precision."""
    try:
        deepcopy(model).to(torch.bfloat16).eval()(images.bfloat16())
    except Exception as error:  # as above
        what = f"{where} does not compute in bfloat16 throughout: {one_line(error, 200)}"
        raise ConfigError([f"teacher_autocast: {what}; say teacher_autocast: true"]) from None
