"""Losses between class scores ``(B, K)``: transformed teachers, and outputs that are no distribution over classes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .algebra import kl, over
from .base import Loss, full_precision
from .checks import check_alike, check_positive


class TTM(Loss):
    r"""``KL(r ‖ softmax(student))`` with ``r ∝ softmax(teacher)^exponent``: a temperature on the teacher alone.

    Sum over classes, mean over samples, no ``T²``; ``exponent = 1 / T``.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0, where ``softmax(student) = r``. No labels.

    Args:
        exponent: power of the teacher's probabilities, positive; below 1 it flattens them.

    Raises:
        ValueError: the exponent is not positive; the shapes differ.

    Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, 2024. arXiv:2402.11148

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> TTM(exponent=0.25)(0.25 * logits, logits).item()
    0.0
    """

    def __init__(self, exponent: float = 0.25) -> None:
        super().__init__()
        check_positive(self, exponent=exponent)
        self.exponent = exponent

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        log_r = F.log_softmax(self.exponent * teacher, dim=-1)
        return kl(F.log_softmax(student, dim=-1), log_r).mean()

    def extra_repr(self) -> str:
        return f"exponent={self.exponent}"


class WTTM(Loss):
    r"""``U · KL(r ‖ softmax(student))`` with ``U = Σ softmax(teacher)^exponent``: TTM, weighted by unsureness.

    ``r = softmax(teacher)^exponent / U``. Sum over classes, mean over samples, no ``T²``; ``exponent = 1 / T``. For an
    exponent below 1, ``U`` lies between 1 (a certain teacher) and ``K^(1 − exponent)`` (a uniform one).

    Shapes: student and teacher logits ``(B, K)``. Floor: 0, where ``softmax(student) = r``. No labels.

    Args:
        exponent: power of the teacher's probabilities, positive.

    Raises:
        ValueError: the exponent is not positive; the shapes differ.

    Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, 2024. arXiv:2402.11148

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> WTTM(exponent=0.25)(0.25 * logits, logits).item()
    0.0
    """

    def __init__(self, exponent: float = 0.25) -> None:
        super().__init__()
        check_positive(self, exponent=exponent)
        self.exponent = exponent

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        powers = self.exponent * F.log_softmax(teacher, dim=-1)
        unsureness = powers.exp().sum(-1)
        return (unsureness * kl(F.log_softmax(student, dim=-1), F.log_softmax(powers, dim=-1))).mean()

    def extra_repr(self) -> str:
        return f"exponent={self.exponent}"


class Binary(Loss):
    r"""``T² · Σ_k KL(σ(teacher_k / T) ‖ σ(student_k / T))``: one yes-or-no distribution for each class.

    For multi-label outputs, whose classes do not exclude each other. Sum over classes, mean over samples.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0, where the logits are equal. No labels.

    Args:
        temperature: ``T > 0``.

    Raises:
        ValueError: the temperature is not positive; the shapes differ.

    Yang et al., Multi-Label Knowledge Distillation, 2023 (there ``T = 1``). arXiv:2308.06453

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> Binary(temperature=2.0)(logits, logits).item()
    0.0
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.temperature = temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        student, teacher = over(student, self.temperature), over(teacher, self.temperature)
        yes, no = (kl(F.logsigmoid(sign * student), F.logsigmoid(sign * teacher)) for sign in (1, -1))
        return (yes + no).sum() * (self.temperature**2 / len(student))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
