"""Losses between class scores ``(B, K)`` through their correlations, across classes and across the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .algebra import centred, cosine_gap, gram_gap, over
from .base import Loss, full_precision
from .checks import check_alike, check_choice, check_positive


class DIST(Loss):
    r"""``T² · (beta · (1 − mean_b ρ(s_b, t_b)) + gamma · (1 − mean_k ρ(s_k, t_k)))`` of softmax probabilities at ``T``.

    ``ρ`` is Pearson's correlation: of a sample across its classes (inter-class), and of a class across the batch
    (intra-class). ``variant="code"``: the authors' classification code, where ``ρ = ⟨a, b⟩ / (|a| |b| + 1e-8)`` of
    centred vectors; the 1e-8 is felt where a class is improbable in the whole batch. ``variant="paper"``: the equations
    as printed, with ``ρ`` exact (0 beside a constant vector) and without ``T²``, which the authors' segmentation code
    leaves out as well.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0, where the probabilities of the two correlate perfectly
    (above it by what the 1e-8 takes away). No labels. With one sample there is nothing to correlate across the batch,
    and the intra-class part is constant.

    Args:
        beta: weight of the inter-class part.
        gamma: weight of the intra-class part.
        temperature: ``T > 0``.
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: the temperature is not positive, or another variant; the shapes differ.

    Huang et al., Knowledge Distillation from A Stronger Teacher, 2022, section 3. arXiv:2205.10536

    >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0]])
    >>> abs(DIST()(logits, logits).item()) < 1e-5
    True
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        variant: Literal["code", "paper"] = "code",
    ) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        check_choice(self, variant=(variant, ("code", "paper")))
        self.beta, self.gamma, self.temperature, self.variant = beta, gamma, temperature, variant

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        p = over(student, self.temperature).softmax(dim=-1)
        q = over(teacher, self.temperature).softmax(dim=-1)
        inter, intra = (self._distance(p, q, dim).mean() for dim in (1, 0))
        return (self.beta * inter + self.gamma * intra) * (self.temperature**2 if self.variant == "code" else 1)

    def _distance(self, p: Tensor, q: Tensor, dim: int) -> Tensor:
        if self.variant == "paper":
            return cosine_gap(centred(p, dim), centred(q, dim), dim)
        a, b = p - p.mean(dim, keepdim=True), q - q.mean(dim, keepdim=True)
        lengths = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
        return 1 - (a * b).sum(dim) / (lengths + 1e-8)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}, variant={self.variant!r}"


class ClassCorrelation(Loss):
    r"""``‖PᵀP − QᵀQ‖² / K``: how classes go together in a batch, in student and teacher probabilities at ``T``.

    Sum over the ``K × K`` entries, divided by ``K``; no ``T²``. The class part of multi-level logit distillation, at
    one temperature: add several for the published sum. Computed from ``B × B`` products where these are cheaper.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0. No labels.

    Args:
        temperature: ``T > 0``.

    Raises:
        ValueError: the temperature is not positive; the shapes differ.

    Jin et al., Multi-Level Logit Distillation, CVPR 2023 (no arXiv version).

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> ClassCorrelation()(logits, logits).item()
    0.0
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.temperature = temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        p = over(student, self.temperature).softmax(dim=-1)
        q = over(teacher, self.temperature).softmax(dim=-1)
        return gram_gap(p.mT, q.mT) / p.shape[1]

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class BatchCorrelation(Loss):
    r"""``‖PPᵀ − QQᵀ‖² / B``: how samples go together in a batch, in student and teacher probabilities at ``T``.

    Sum over the ``B × B`` entries, divided by ``B``; no ``T²``. The batch part of multi-level logit distillation, at
    one temperature: add several for the published sum.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0. No labels.

    Args:
        temperature: ``T > 0``.

    Raises:
        ValueError: the temperature is not positive; the shapes differ.

    Jin et al., Multi-Level Logit Distillation, CVPR 2023 (no arXiv version).

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> BatchCorrelation()(logits, logits).item()
    0.0
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.temperature = temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        p = over(student, self.temperature).softmax(dim=-1)
        q = over(teacher, self.temperature).softmax(dim=-1)
        # every row sums to 1, so that 1 / K may be taken off: it is most of a flat row, and would cost three digits
        p, q = p - p.mean(dim=-1, keepdim=True), q - q.mean(dim=-1, keepdim=True)
        return gram_gap(p, q) / p.shape[0]

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
