"""OFA: a distribution in which the labelled class is enhanced."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import over, weighted
from .base import Loss, full_precision
from .checks import check_alike, check_choice, check_labels, check_positive
from .decoupled import target_mask


class OFA(Loss):
    r"""``−Σ_k ((p_k + y_k)^eps − y_k) · log q_k``, mean over samples, with ``p, q`` teacher and student at ``T``.

    ``y`` is the one-hot label. With ``eps = 1`` it is the cross-entropy with the teacher's probabilities; a larger one
    enhances the label. In the published code, ``variant="code"``, the power holds for every class, so the others weigh
    ``p_k^eps``, and the labels' own cross-entropy is left to another term. ``variant="paper"`` has the power on the
    label alone, ``−(1 + p_y)^eps log q_y − Σ_{k≠y} p_k log q_k``, the cross-entropy within. There is no ``T²``.

    Shapes: student and teacher logits ``(B, K)``, labels int64 ``(B,)``. Floor: the entropy of the weights (times
    their sum), where the student's distribution is proportional to them. Needs labels; soft labels (mixup) are not
    allowed. One exit of the student; the paper's stage projectors are adapters of the term.

    Args:
        eps: power, at least 1.
        temperature: ``T > 0``.
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: an argument is out of range; the shapes differ; labels are soft or, on a CPU, no
            class; fewer than two classes.

    Hao et al., One-for-All, 2023, section 3. arXiv:2310.19444

    >>> logits = torch.tensor([[50.0, 0.0]])
    >>> abs(OFA(eps=1.5)(logits, logits, torch.tensor([0])).item()) < 1e-6
    True
    """

    against = ("teacher", "labels")
    floor = None

    def __init__(self, eps: float = 1.5, temperature: float = 1.0, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        check_positive(self, eps=eps, temperature=temperature)
        check_choice(self, variant=(variant, ("code", "paper")))
        self.eps, self.temperature, self.variant = eps, temperature, variant

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        check_labels(self, student, labels)
        target = target_mask(student, labels)
        p = over(teacher, self.temperature).softmax(dim=-1)
        enhanced = (p + target) ** self.eps
        weight = enhanced - target.to(p.dtype) if self.variant == "code" else torch.where(target, enhanced, p)
        return weighted(weight, F.log_softmax(over(student, self.temperature), dim=-1)).sum() / -len(student)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, temperature={self.temperature}, variant={self.variant!r}"
