"""What every loss shares: what it declares, float32 inside, and arithmetic with other losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

View = Literal["logits", "embedding", "tokens", "map", "raw"]
Need = Literal["teacher", "labels"]
ORDER: tuple[Need, ...] = ("teacher", "labels")
Compute = TypeVar("Compute", bound=Callable[..., Tensor])


class Loss(nn.Module):
    """A scalar between a student tensor and what it is ``against``. Declares how it wants to be fed; adds and scales.

    ``0.7 * SoftTarget(4.0) + 0.3 * HardLabel()`` is a loss again. Any module with a ``forward(student, teacher)``
    serves as a loss; deriving from this class only adds the operators and the defaults below.
    """

    view: ClassVar[View] = "logits"
    """Shape that it reads: logits ``(B, K)``, embedding ``(B, D)``, tokens ``(B, N, C)``, map ``(B, C, H, W)``, raw."""
    against: tuple[Need, ...] = ("teacher",)
    """What ``forward`` takes after the student, in order: the teacher's tensor, the labels, or both."""

    def __add__(self, other: nn.Module) -> Sum:
        return Sum([*_summands(self), *_summands(other)])

    def __radd__(self, other: nn.Module) -> Sum:
        return Sum([*_summands(other), *_summands(self)])

    def __mul__(self, factor: float) -> Sum:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise TypeError(
                f"a loss is scaled by a number, got {type(factor).__name__}; losses are added, not multiplied"
            )
        return Sum([(factor * weight, loss) for weight, loss in _summands(self)])

    __rmul__ = __mul__


class Sum(Loss):
    """``Σ weight · loss`` of losses that read the same view; what ``+`` and ``*`` give.

    Args:
        parts: ``(weight, loss)`` pairs. Called with what the parts need between them: ``(student, teacher)``,
            ``(student, labels)`` or ``(student, teacher, labels)``; each part gets what it is ``against``.

    Raises:
        ValueError: the parts read different views.
    """

    def __init__(self, parts: Sequence[tuple[float, nn.Module]]) -> None:
        super().__init__()
        views: dict[str, View] = {type(loss).__name__: getattr(loss, "view", "raw") for _, loss in parts}
        if len(set(views.values())) > 1:
            raise ValueError(f"a sum needs losses of one view, got {views}; give each its own Term instead")
        self.view = next(iter(views.values()), "raw")  # type: ignore[misc]
        needs = {need for _, loss in parts for need in getattr(loss, "against", ("teacher",))}
        self.against = tuple(need for need in ORDER if need in needs)
        self.weights = tuple(float(weight) for weight, _ in parts)
        self.parts = nn.ModuleList(loss for _, loss in parts)

    def forward(self, student: Tensor, *against: Tensor) -> Tensor:
        if len(against) != len(self.against):
            raise ValueError(
                f"this sum is called with (student, {', '.join(self.against)}), got {1 + len(against)} inputs"
            )
        given: dict[str, Tensor] = dict(zip(self.against, against, strict=True))
        values = [
            weight * loss(student, *(given[need] for need in getattr(loss, "against", ("teacher",))))
            for weight, loss in zip(self.weights, self.parts, strict=True)
        ]
        return torch.stack(values).sum()

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _summands(loss: object) -> list[tuple[float, nn.Module]]:
    if isinstance(loss, Sum):
        return list(zip(loss.weights, loss.parts, strict=True))
    if isinstance(loss, nn.Module):
        return [(1.0, loss)]
    raise TypeError(f"only losses add up, got {type(loss).__name__}; wrap a function in an nn.Module")


def full_precision(forward: Compute) -> Compute:
    """Decorates a loss's ``forward``: float32 at least, autocast off, and nothing but the student gets a gradient.

    Half-precision Grams and distances overflow or lose every digit, and under autocast even a float32 matrix product is
    rounded to bfloat16. float64 stays float64. Inputs may be tensors or lists of tensors.
    """

    @wraps(forward)
    def wrapped(self: nn.Module, student: Any, *against: Any) -> Tensor:
        device = (student[0] if isinstance(student, list | tuple) else student).device.type
        with torch.autocast(device, enabled=False):
            return forward(self, _lift(student), *(_lift(x, detach=True) for x in against))

    return wrapped  # type: ignore[return-value]


def _lift(x: Any, detach: bool = False) -> Any:
    if isinstance(x, list | tuple):
        return [_lift(item, detach) for item in x]
    x = x.detach() if detach else x
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def check_alike(loss: nn.Module, student: Tensor, teacher: Tensor, shape: str) -> None:
    """Raises ValueError unless both tensors have one shape with as many axes as ``shape`` names, e.g. ``"B K"``."""
    if student.shape != teacher.shape or (shape != "any" and student.ndim != len(shape.split())):
        wanted = "one shape" if shape == "any" else f"({', '.join(shape.split())})"
        raise ValueError(
            f"{type(loss).__name__} compares tensors of {wanted}: student is {tuple(student.shape)}, "
            f"teacher {tuple(teacher.shape)}; an adapter, another view or another tap brings them together"
        )


def check_positive(loss: nn.Module, **values: float) -> None:
    """Raises ValueError for an argument that is not a positive finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{type(loss).__name__}: {name} must be a positive number, got {value}")
