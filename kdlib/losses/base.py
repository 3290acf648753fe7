"""What every loss shares: what it declares, float32 inside, and arithmetic with other losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from .algebra import may_be_kept
from .checks import check_alike as check_alike
from .checks import check_positive as check_positive

View = Literal["logits", "embedding", "tokens", "map", "raw"]
ORDER = ("teacher", "labels", "indices")
"""Of what a sum is called with; what its parts want besides comes behind, by name."""
Compute = TypeVar("Compute", bound=Callable[..., Tensor])
HALF = (torch.bfloat16, torch.float16)


class Loss(nn.Module):
    """A scalar between a student tensor and what it is ``against``. Declares how it wants to be fed; adds and scales.

    ``0.7 * SoftTarget(4.0) + 0.3 * HardLabel()`` is a loss again, and so are ``sum([a, b])``, ``a - b`` and ``a / 2``.
    Any module with a ``forward(student, teacher)`` serves as a loss; deriving from this class only adds operators and
    the defaults below.
    """

    view: ClassVar[View] = "logits"
    """Shape that it reads: logits ``(B, K)``, embedding ``(B, D)``, tokens ``(B, N, C)``, map ``(B, C, H, W)``, raw."""
    against: tuple[str, ...] = ("teacher",)
    """What ``forward`` takes after the student, in order: the teacher's tensor, the labels, the dataset's indices; any
    other word, such as ``"mask"``, stands for what the targets hold under ``"@mask"``."""
    lists: ClassVar[bool] = False
    """True: ``forward`` takes lists of tensors, shallow to deep, one for each pair of the term."""
    soft_labels: ClassVar[bool] = False
    """True: labels may be probabilities ``(B, K)``, as mixup gives them."""
    wants_head: ClassVar[bool] = False
    """True: ``fit`` must be given the teacher's classifier."""
    floor: ClassVar[float | None] = 0.0
    """The smallest value, reached where student and teacher agree; None: the docstring says what it is."""
    follows_teacher = False
    """True inside a wrapper that has detached the teacher already and learns something between it and this loss."""

    def __init__(self) -> None:
        super().__init__()

    def fit(self, student: Any, teacher: Any, head: nn.Module | None = None) -> None:
        """Sizes what the loss learns from one example of its inputs. Call it before the optimizer is made."""

    def set_epoch(self, epoch: float, epochs: int) -> None:
        """Moves the schedule that the loss has of its own; ``epoch`` counts from 0 and may be fractional."""

    def __add__(self, other: nn.Module) -> Sum:
        return Sum([*_summands(self), *_summands(other)])

    def __radd__(self, other: nn.Module) -> Sum:
        return Sum([*_summands(other), *_summands(self)])

    def __mul__(self, factor: float) -> Sum:
        if isinstance(factor, bool) or not isinstance(factor, Real):  # numpy's scalars among them
            raise TypeError(
                f"a loss is scaled by a number, got {type(factor).__name__}; losses are added, not multiplied"
            )
        return Sum([(float(factor) * weight, loss) for weight, loss in _summands(self)])

    __rmul__ = __mul__

    def __sub__(self, other: nn.Module) -> Sum:
        return self + -1 * Sum(_summands(other))

    def __truediv__(self, divisor: float) -> Sum:
        return self * (1 / divisor)


class Sum(Loss):
    """``Σ weight · loss`` of losses that read the same view; what ``+`` and ``*`` give.

    Args:
        parts: ``(weight, loss)`` pairs. Called with what the parts need between them: ``(student, teacher)``,
            ``(student, labels)`` or ``(student, teacher, labels)``; each part gets what it is ``against``.

    Raises:
        ValueError: the parts read different views, or only some of them take lists.
    """

    def __init__(self, parts: Sequence[tuple[float, nn.Module]]) -> None:
        super().__init__()
        views: dict[str, View] = {type(loss).__name__: getattr(loss, "view", "raw") for _, loss in parts}
        if len(set(views.values())) > 1:
            raise ValueError(f"a sum needs losses of one view, got {views}; give each its own Term instead")
        self.view = next(iter(views.values()), "raw")  # type: ignore[misc]
        takes_lists = {bool(getattr(loss, "lists", False)) for _, loss in parts}
        if len(takes_lists) > 1:
            raise ValueError(
                f"a sum needs losses that all take lists or none, got {list(views)}; give each its own Term"
            )
        self.lists = takes_lists == {True}  # type: ignore[misc]
        labelled = [loss for _, loss in parts if "labels" in getattr(loss, "against", ())]
        self.soft_labels = all(getattr(loss, "soft_labels", False) for loss in labelled)  # type: ignore[misc]
        self.wants_head = any(getattr(loss, "wants_head", False) for _, loss in parts)  # type: ignore[misc]
        floors: list[float | None] = [getattr(loss, "floor", None) for _, loss in parts]
        known = [weight * floor for (weight, _), floor in zip(parts, floors, strict=True) if floor is not None]
        whole = len(known) == len(parts) and all(weight >= 0 for weight, _ in parts)
        self.floor = sum(known) if whole else None  # type: ignore[misc]
        needs = {need for _, loss in parts for need in getattr(loss, "against", ("teacher",))}
        self.against = (*(need for need in ORDER if need in needs), *sorted(needs.difference(ORDER)))
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

    def fit(self, student: Any, teacher: Any, head: nn.Module | None = None) -> None:
        for loss in self.parts:
            getattr(loss, "fit", _nothing)(student, teacher, head)

    def set_epoch(self, epoch: float, epochs: int) -> None:
        for loss in self.parts:
            getattr(loss, "set_epoch", _nothing)(epoch, epochs)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


def _summands(loss: object) -> list[tuple[float, nn.Module]]:
    if isinstance(loss, Sum):
        return list(zip(loss.weights, loss.parts, strict=True))
    if isinstance(loss, nn.Module):
        return [(1.0, loss)]
    if isinstance(loss, int) and loss == 0:  # where sum() begins
        return []
    raise TypeError(f"only losses add up, got {type(loss).__name__}; wrap a function in an nn.Module")


def _nothing(*_: Any) -> None:
    """Stands in for a method that a bare module lacks."""


def full_precision(forward: Compute) -> Compute:
    """Decorates a loss's ``forward``: float32 at least, autocast off, and nothing but the student gets a gradient.

    Half-precision Grams and distances overflow or lose every digit, and under autocast even a float32 matrix product is
    rounded to bfloat16. A float64 student stays float64, and what it is against takes its precision. Inputs may be
    tensors or lists of tensors; a teacher that ran in ``torch.inference_mode`` is copied, for backward to read it.

    ``torch.compile`` compiles the backward pass under the autocast of the forward pass, unless
    ``torch._functorch.config.backward_pass_autocast`` is ``"off"``, as kdlib's own loop sets it.
    """

    @wraps(forward)
    def wrapped(self: nn.Module, student: Any, *against: Any) -> Tensor:
        first = student[0] if isinstance(student, (list, tuple)) and student else student
        if not first.numel():
            raise ValueError(f"{type(self).__name__} is given an empty batch, of shape {tuple(first.shape)}")
        dtype = torch.promote_types(first.dtype, torch.float32)
        detach = not getattr(self, "follows_teacher", False)
        student, given = _lift(student, dtype), [_lift(x, dtype, detach) for x in against]
        with autocast_off(first.device):
            return forward(self, student, *given)

    return wrapped  # type: ignore[return-value]


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products have the precision of their factors."""
    kind = "cpu" if device.type == "meta" else device.type  # meta has no autocast to turn off
    if not torch.is_autocast_enabled(kind):  # to enter the context takes longer than many a loss
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _lift(x: Any, dtype: torch.dtype, detach: bool = False) -> Any:
    if isinstance(x, (list, tuple)):  # torch 2.6 cannot compile list | tuple here
        return [_lift(item, dtype, detach) for item in x]
    if detach:
        x = x.detach()
        if torch.is_grad_enabled() and not may_be_kept(x):
            x = x.clone()
    return x.to(dtype) if x.is_floating_point() else x
