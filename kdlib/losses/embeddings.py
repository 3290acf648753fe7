"""Losses between the embeddings ``(B, D)`` of a batch, through distances, angles and similarities of its samples."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, check_alike, check_choice, check_positive, full_precision


class RKDDistance(Loss):
    r"""``smooth-L1(d_s / mean d_s, d_t / mean d_t)`` of the distances ``d`` between samples, beta 1, mean over pairs.

    The mean is over all ``B²`` pairs, the zero diagonal included, as published; the mean distance is over others. No two
    samples count as closer than 1e-6. The published weight is 25.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0, where the configurations are similar. No labels. A batch
    of one has no pair: the value is 0.

    Raises:
        ValueError: not embeddings of one batch.

    Park et al., Relational Knowledge Distillation, 2019, eq. 5-7. arXiv:1904.05068

    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    >>> RKDDistance()(2 * points, points).item()
    0.0
    """

    view = "embedding"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_embeddings(self, student, teacher)
        return F.smooth_l1_loss(_relative(student), _relative(teacher))


class RKDAngle(Loss):
    r"""``smooth-L1(⟨e_ij, e_ik⟩_s, ⟨e_ij, e_ik⟩_t)``: cosines of the angles at each sample between any two others.

    Beta is 1, and ``e_ij = (x_j − x_i) / |x_j − x_i|``, zero where the two coincide. Mean over all ``B³``
    triples, degenerate ones included, as published. The published weight is 50. The dot products come from the Gram
    matrix of the centred embeddings, ``G_jk − G_ij − G_ik + G_ii``, so no ``B × B × D`` tensor is made.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0, where the configurations are similar. No labels.

    Raises:
        ValueError: not embeddings of one batch.

    Park et al., Relational Knowledge Distillation, 2019, eq. 8-9. arXiv:1904.05068

    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    >>> RKDAngle()(2 * points, points).item() < 1e-9
    True
    """

    view = "embedding"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_embeddings(self, student, teacher)
        return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


class PKT(Loss):
    r"""``q_t · log((q_t + eps) / (q_s + eps))``, mean over the ``B × B`` entries, of neighbour probabilities ``q``.

    ``q`` is ``(cos + 1) / 2`` of each two samples, each row divided by its sum; the cosine is of ``x / (|x| + eps)``.
    As published, the mean is over ``B²`` entries (not a sum over each row), and a sample is its own neighbour too.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0. No labels.

    Args:
        eps: added to lengths and inside the logarithm.

    Raises:
        ValueError: eps is not positive; not embeddings of one batch.

    Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, 2018, eq. 3-6.
    arXiv:1803.10837

    >>> points = torch.tensor([[0.0, 1.0], [3.0, 4.0], [1.0, 1.0]])
    >>> abs(PKT()(2 * points, points).item()) < 1e-6
    True
    """

    view = "embedding"

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        check_positive(self, eps=eps)
        self.eps = eps

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        _check_embeddings(self, student, teacher)
        q_s, q_t = self._neighbours(student), self._neighbours(teacher)
        return (q_t * ((q_t + self.eps).log() - (q_s + self.eps).log())).mean()

    def _neighbours(self, x: Tensor) -> Tensor:
        x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + self.eps)
        alike = (x @ x.mT + 1) / 2
        return alike / alike.sum(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


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

    Peng et al., Correlation Congruence for Knowledge Distillation, 2019, eq. 5-10. arXiv:1904.01802

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
        _check_embeddings(self, student, teacher)
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


def _check_embeddings(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"{type(loss).__name__} takes embeddings (B, D) of one batch, got student {tuple(student.shape)}, teacher "
            f"{tuple(teacher.shape)}; the term's view='embedding' pools maps and tokens"
        )


def _distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, B)`` Euclidean distances, and the Gram matrix of the centred ``x``.

    Values come from differences, exact for samples that lie close together; gradients from the Gram matrix, for those
    of cdist allocate ``B × B × D``.
    """
    x = x - x.mean(0)
    gram = x @ x.mT
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    exact = torch.cdist(x.detach(), x.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    half = torch.where(exact > 1e-6, 0.5 / exact.clamp_min(1e-6), 0.0)
    return exact + half * (square - square.detach()), gram


def _relative(x: Tensor) -> Tensor:
    """Distances over the mean distance of two different samples."""
    batch = len(x)
    diagonal = torch.eye(batch, dtype=torch.bool, device=x.device)
    distances = _distances(x)[0].clamp_min(1e-6).masked_fill(diagonal, 0)
    return distances / (distances.sum() / (batch * (batch - 1)) if batch > 1 else 1.0)


def _cosines(x: Tensor) -> Tensor:
    """``(B, B, B)``: entry ``i, j, k`` is the cosine of the angle at ``i`` between ``j`` and ``k``."""
    distances, gram = _distances(x)
    apart = distances > 1e-12
    inverse = torch.where(apart, 1 / torch.where(apart, distances, 1.0), 0.0)
    products = gram - gram[:, :, None] - gram[:, None, :] + gram.diagonal()[:, None, None]
    return products * inverse[:, :, None] * inverse[:, None, :]
