"""Losses between the embeddings ``(B, D)`` of a batch, through similarities and kernels of its samples."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .algebra import weighted
from .base import Loss, full_precision
from .checks import check_alike, check_choice, check_embeddings, check_positive


class PKT(Loss):
    r"""``q_t · log((q_t + eps) / (q_s + eps))``, mean over the ``B × B`` entries, of neighbour probabilities ``q``.

    ``q`` is ``(cos + 1) / 2`` of each two samples, each row divided by its sum; the cosine is of ``x / (|x| + eps)``.
    ``variant="code"``: the authors' code takes the mean over all ``B²`` entries, and a sample is its own neighbour too.
    ``variant="paper"``: the sum over pairs of different samples, and ``q`` is normalised over the others alone.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0. No labels.

    Args:
        eps: added to lengths and inside the logarithm.
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: eps is not positive, or another variant; not embeddings of one batch.

    Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, 2018, section 3.
    arXiv:1803.10837

    >>> points = torch.tensor([[0.0, 1.0], [3.0, 4.0], [1.0, 1.0]])
    >>> abs(PKT()(2 * points, points).item()) < 1e-6
    True
    """

    view = "embedding"

    def __init__(self, eps: float = 1e-7, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        check_positive(self, eps=eps)
        check_choice(self, variant=(variant, ("code", "paper")))
        self.eps, self.variant = eps, variant

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_embeddings(self, student, teacher)
        q_s, q_t = self._neighbours(student), self._neighbours(teacher)
        gap = q_t - q_s  # its rows sum to zero: taking it off changes nothing but the rounding
        p, q = q_t + self.eps, q_s + self.eps
        near = gap.abs() < q / 2  # further away 1 + gap / q may round to 0, or the gradient of gap / q overflow
        log = torch.where(near, (gap.masked_fill(~near, 0) / q).log1p(), p.log() - q.log())
        values = weighted(q_t, log) - gap
        return values.mean() if self.variant == "code" else values.sum()

    def _neighbours(self, x: Tensor) -> Tensor:
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + self.eps)
        alike = ((x @ x.mT + 1) / 2).clamp_min(0)  # of opposite samples it is 0 but for the rounding
        if self.variant == "paper":
            alike = alike.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
        total = alike.sum(1, keepdim=True)
        return alike / torch.where(total > 0, total, 1.0)  # a batch of one has no neighbour

    def extra_repr(self) -> str:
        return f"eps={self.eps}, variant={self.variant!r}"


class CorrelationCongruence(Loss):
    r"""``Σ_d |δ_i| · |δ_{i+1}|`` with ``δ = student − teacher``, mean over consecutive samples ``i`` of the batch.

    The loss that RepDistiller publishes under this name. It is not the one of the paper, which is ``CCKD``; and it
    depends on the order of the batch.

    Shapes: student and teacher ``(B, D)`` of one shape. Floor: 0. No labels. A batch of one has no pair: value 0.

    Raises:
        ValueError: the shapes differ.

    RepDistiller, distiller_zoo/CC.py; after Peng et al., Correlation Congruence, 2019. arXiv:1904.01802

    >>> CorrelationCongruence()(torch.zeros(3, 2), torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]])).item()
    1.5
    """

    view = "embedding"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B D")
        gap = (student - teacher).abs()
        return (gap[:-1] * gap[1:]).sum() / max(1, len(gap) - 1)


class CCKD(Loss):
    r"""``‖K_s − K_t‖ / B²``: the distance of two kernel matrices over the batch.

    ``kernel="bilinear"``: ``K = X Xᵀ``. ``kernel="gaussian"``: ``exp(−γ |x − y|²)`` of unit vectors, by its series
    ``exp(−2γ) · Σ_{p ≤ max_p} (2γ)^p / p! · (X Xᵀ)^p``, power by element; the embeddings are not scaled to unit length
    here, so give it normalised ones. ``variant="code"``, torchdistill's, takes the Frobenius norm; ``variant="paper"``
    its square.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0. No labels.

    Args:
        kernel: ``"gaussian"`` or ``"bilinear"``.
        gamma: of the Gaussian, positive.
        max_p: last power of the series.
        reduction: ``"batchmean"`` divides by ``B²``, ``"sum"`` does not.
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: an argument is out of range; not embeddings of one batch.

    Peng et al., Correlation Congruence for Knowledge Distillation, 2019, section 3. arXiv:1904.01802

    >>> points = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> CCKD(kernel="bilinear")(torch.zeros(2, 2), 2 * points).item()
    1.4142135381698608
    """

    view = "embedding"

    def __init__(
        self,
        kernel: Literal["gaussian", "bilinear"] = "gaussian",
        gamma: float = 0.4,
        max_p: int = 2,
        reduction: Literal["batchmean", "sum"] = "batchmean",
        variant: Literal["code", "paper"] = "code",
    ) -> None:
        super().__init__()
        check_choice(
            self,
            kernel=(kernel, ("gaussian", "bilinear")),
            reduction=(reduction, ("batchmean", "sum")),
            variant=(variant, ("code", "paper")),
        )
        check_positive(self, gamma=gamma)
        if max_p < 1:
            raise ValueError(f"CCKD: max_p must be at least 1, got {max_p}")
        self.kernel, self.gamma, self.max_p, self.reduction, self.variant = kernel, gamma, max_p, reduction, variant

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_embeddings(self, student, teacher)
        gap = self._matrix(student) - self._matrix(teacher)
        total = torch.linalg.vector_norm(gap) if self.variant == "code" else gap.square().sum()
        return total / len(student) ** 2 if self.reduction == "batchmean" else total

    def _matrix(self, x: Tensor) -> Tensor:
        products = x @ x.mT
        if self.kernel == "bilinear":
            return products
        series = torch.zeros_like(products)
        for p in range(self.max_p, -1, -1):
            series = series * products + (2 * self.gamma) ** p / math.factorial(p)
        return math.exp(-2 * self.gamma) * series

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, gamma={self.gamma}, max_p={self.max_p}, reduction={self.reduction!r}"
