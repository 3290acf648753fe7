"""What a loss refuses, in words that say what to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

DENSE = "logits at each position are flattened into samples first (docs/howto/sequences.md)"


def check_alike(loss: nn.Module, student: Tensor, teacher: Tensor, shape: str) -> None:
    """Raises ValueError unless both tensors have one shape with as many axes as ``shape`` names, e.g. ``"B K"``."""
    if student.shape != teacher.shape or (shape != "any" and student.ndim != len(shape.split())):
        wanted = "one shape" if shape == "any" else f"({', '.join(shape.split())})"
        help_ = "an adapter, another view or another tap brings them together"
        if shape == "B K" and student.ndim > 2:
            help_ = DENSE
        raise ValueError(
            f"{type(loss).__name__} compares tensors of {wanted}: student is {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)}; {help_}"
        )


def check_positive(loss: nn.Module, **values: float) -> None:
    """Raises ValueError for an argument that is not a positive finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{type(loss).__name__}: {name} must be a positive number, got {value}")


def check_labels(loss: nn.Module, student: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless labels are integers ``(B,)`` for logits ``(B, K)`` of at least two classes."""
    name = type(loss).__name__
    if labels.is_floating_point():
        raise ValueError(
            f"{name} needs integer labels (B,), got float {tuple(labels.shape)}: its definition singles out one target "
            "class; switch mixup and cutmix off, or use SoftTarget, DIST or TTM, which need no labels"
        )
    if labels.shape != student.shape[:1]:
        raise ValueError(f"{name} needs labels (B,) = ({len(student)},), got {tuple(labels.shape)}")
    if student.shape[-1] < 2:
        raise ValueError(f"{name} needs at least 2 classes, got {student.shape[-1]}")


def check_choice(loss: nn.Module, **choices: tuple[object, tuple[object, ...]]) -> None:
    """Raises ValueError for an argument outside its choices: ``mask=(mask, ("channel", "spatial"))``."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(
                f"{type(loss).__name__}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}"
            )


def check_maps(loss: nn.Module, student: Tensor, teacher: Tensor, channels: bool = False) -> None:
    """Raises ValueError unless both are maps ``(B, C, H, W)`` of one batch, and of one C where ``channels`` says so."""
    axes = 2 if channels else 1
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:axes] != teacher.shape[:axes]:
        raise ValueError(
            f"{type(loss).__name__} takes maps (B, C, H, W) of one B{' and C' * channels}, got student "
            f"{tuple(student.shape)}, teacher {tuple(teacher.shape)}; an adapter, another view or another tap helps"
        )


def check_lists(loss: nn.Module, student: Any, teacher: Any, least: int = 1) -> None:
    """Raises ValueError unless both are lists of one length of at least ``least``."""
    if not isinstance(student, (list, tuple)) or not isinstance(teacher, (list, tuple)):
        raise ValueError(
            f"{type(loss).__name__} takes lists of features, shallow to deep, one for each pair of its term"
        )
    if len(student) != len(teacher) or len(student) < least:
        raise ValueError(
            f"{type(loss).__name__} takes lists of one length of at least {least}, got {len(student)} student and "
            f"{len(teacher)} teacher features"
        )


def check_embeddings(loss: nn.Module, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both are embeddings ``(B, D)`` of one batch."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"{type(loss).__name__} takes embeddings (B, D) of one batch, got student {tuple(student.shape)}, teacher "
            f"{tuple(teacher.shape)}; the term's view='embedding' pools maps and tokens"
        )
