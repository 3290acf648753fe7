"""Losses that hold another loss between class scores ``(B, K)`` and change what it sees."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .algebra import centred, unit
from .base import Loss, _nothing, full_precision
from .checks import check_choice


class Wrapper(Loss):
    """Holds one loss on logits: needs what that one needs, and passes ``fit`` and ``set_epoch`` on.

    Raises:
        ValueError: the loss does not read logits, or takes lists.
        TypeError: it is no module.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(loss, nn.Module):
            raise TypeError(f"{name} holds a loss, got {type(loss).__name__}; e.g. {name}(SoftTarget(2.0))")
        if getattr(loss, "view", "logits") != "logits" or getattr(loss, "lists", False):
            raise ValueError(f"{name} holds a loss between logits, {type(loss).__name__} reads {loss.view}")
        self.loss = loss
        self.against: tuple[str, ...] = getattr(loss, "against", ("teacher",))
        self.soft_labels = getattr(loss, "soft_labels", False)  # type: ignore[misc]
        self.wants_head = getattr(loss, "wants_head", False)  # type: ignore[misc]
        self.floor = getattr(loss, "floor", None)  # type: ignore[misc]

    def fit(self, student: Any, teacher: Any, head: nn.Module | None = None) -> None:
        getattr(self.loss, "fit", _nothing)(student, teacher, head)

    def set_epoch(self, epoch: float, epochs: int) -> None:
        getattr(self.loss, "set_epoch", _nothing)(epoch, epochs)

    def split(self, against: tuple[Tensor, ...]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The teacher's logits, if the loss needs any, and the rest."""
        return (against[0], against[1:]) if "teacher" in self.against else (None, against)


class Standardized(Wrapper):
    r"""``loss(z_s, z_t)`` with ``z = (logits − mean) / (std + 1e-7)`` of each sample: standardised logits.

    The student then need not match the teacher's range, only its order and proportions. ``variant="code"``: ``std`` is
    the unbiased one (over ``K − 1``), and 1e-7 is added. ``variant="paper"``: over ``K``, and nothing is added; equal
    logits become 0.

    Shapes: logits ``(B, K)``, and what the held loss needs. Floor: the held loss's. Labels: as the held loss. The
    published weight is 9 with ``SoftTarget(2.0)`` inside. Logits must be finite: with a class masked by ``-inf`` there
    is no mean, and the value is NaN.

    Args:
        loss: any loss between logits.
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: the loss does not read logits, or another variant; fewer than two classes.

    Sun et al., Logit Standardization in Knowledge Distillation, 2024, algorithm 1. arXiv:2403.01427

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> from kdlib.losses import SoftTarget
    >>> Standardized(SoftTarget(2.0))(5 * logits + 1, logits).item() < 1e-6
    True
    """

    def __init__(self, loss: nn.Module, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__(loss)
        check_choice(self, variant=(variant, ("code", "paper")))
        self.variant = variant

    @full_precision
    def forward(self, student: Tensor, *against: Tensor) -> Tensor:
        teacher, rest = self.split(against)
        if student.shape[-1] < 2:
            raise ValueError(f"Standardized needs at least 2 classes, got {student.shape[-1]}")
        given = () if teacher is None else (self._standard(teacher),)
        return self.loss(self._standard(student), *given, *rest)

    def _standard(self, logits: Tensor) -> Tensor:
        if self.variant == "paper":
            return unit(centred(logits, -1)) * logits.shape[-1] ** 0.5
        return (logits - logits.mean(dim=-1, keepdim=True)) / (logits.std(dim=-1, keepdim=True) + 1e-7)

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"


class TopK(Wrapper):
    r"""``loss(student[top], teacher[top])``, where ``top`` are the teacher's ``k`` most likely classes of each sample.

    What the held loss makes of them is renormalised within these classes; the student's mass elsewhere is not seen, so
    the student is biased towards them. ``rest=True`` adds one more class, the logsumexp of all others, which keeps
    the probabilities of the ``k`` exact at temperature 1.

    Shapes: student and teacher logits ``(B, K)``; the held loss sees ``(B, k)``, or ``(B, k + 1)`` with the rest.
    Floor: the held loss's. Labels: no loss that needs them can be held, for the label may not be among the ``k``.

    Args:
        loss: a loss between logits that needs the teacher only.
        k: number of classes kept, at least 1.
        rest: keep the other classes as one.

    Raises:
        ValueError: k is below 1 or above the number of classes; the loss needs labels or does not read logits.

    Anshumann et al., Sparse Logit Sampling, 2025 (on the bias). arXiv:2503.16870

    >>> from kdlib.losses import SoftTarget
    >>> teacher = torch.tensor([[2.0, 1.0, -1.0]])
    >>> TopK(SoftTarget(), k=2)(torch.tensor([[2.0, 1.0, 9.0]]), teacher).item()
    0.0
    """

    def __init__(self, loss: nn.Module, k: int, rest: bool = False) -> None:
        super().__init__(loss)
        if self.against != ("teacher",):
            raise ValueError(
                f"TopK holds a loss that needs the teacher only, {type(loss).__name__} needs {self.against}"
            )
        if k < 1:
            raise ValueError(f"TopK: k must be at least 1, got {k}")
        self.k, self.rest = k, rest

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape or self.k + self.rest > student.shape[-1]:
            raise ValueError(
                f"TopK(k={self.k}, rest={self.rest}) takes logits (B, K) of one shape with K at least "
                f"{self.k + self.rest}, got student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
            )
        top, where = teacher.topk(self.k, dim=-1)
        picked = student.gather(-1, where)
        if self.rest:
            top = torch.cat([top, _others(teacher, where)], dim=-1)
            picked = torch.cat([picked, _others(student, where)], dim=-1)
        return self.loss(picked, top)

    def extra_repr(self) -> str:
        return f"k={self.k}, rest={self.rest}"


def _others(logits: Tensor, where: Tensor) -> Tensor:
    """``(B, 1)``: logsumexp of the classes that ``where`` does not name; ``-inf``, no gradient, if all are masked."""
    rest = logits.scatter(-1, where, -torch.inf)
    masked = rest.amax(dim=-1, keepdim=True) == -torch.inf
    return rest.masked_fill(masked, 0).logsumexp(dim=-1, keepdim=True).masked_fill(masked, -torch.inf)
