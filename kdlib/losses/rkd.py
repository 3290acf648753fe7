"""Losses between the distances, and the angles, of the embeddings ``(B, D)`` of a batch: RKD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, full_precision
from .checks import check_embeddings


class RKDDistance(Loss):
    r"""``smooth-L1(d_s / mean d_s, d_t / mean d_t)`` of the distances ``d`` between samples, beta 1, mean over pairs.

    The mean is over all ``B²`` pairs, the zero diagonal included, as in the authors' code, where the paper has the sum
    over pairs, ``B²`` times as much; the mean distance is over pairs of two samples. No two samples count as closer
    than 1e-6. The code's weight is 25.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0, where the configurations are similar. No labels. A batch
    of one has no pair: the value is 0.

    Raises:
        ValueError: not embeddings of one batch.

    Park et al., Relational Knowledge Distillation, 2019, section 3.2.1. arXiv:1904.05068

    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    >>> RKDDistance()(2 * points, points).item()
    0.0
    """

    view = "embedding"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_embeddings(self, student, teacher)
        return F.smooth_l1_loss(_relative(student), _relative(teacher))


class RKDAngle(Loss):
    r"""``smooth-L1(⟨e_ij, e_ik⟩_s, ⟨e_ij, e_ik⟩_t)``: cosines of the angles at each sample between any two others.

    Beta is 1, and ``e_ij = (x_j − x_i) / |x_j − x_i|``, zero where the two coincide. Mean over all ``B³`` triples,
    degenerate ones included (they add nothing), as in the authors' code, where the paper has the sum over triples,
    ``B³`` times as much. The code's weight is 50. The dot products come from the Gram
    matrix of the centred embeddings, ``G_jk − G_ij − G_ik + G_ii``, so no ``B × B × D`` tensor is made.

    Shapes: student ``(B, D)``, teacher ``(B, D')``. Floor: 0, where the configurations are similar. No labels.

    Raises:
        ValueError: not embeddings of one batch.

    Park et al., Relational Knowledge Distillation, 2019, section 3.2.2. arXiv:1904.05068

    >>> points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    >>> RKDAngle()(2 * points, points).item() < 1e-9
    True
    """

    view = "embedding"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_embeddings(self, student, teacher)
        return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, B)`` Euclidean distances, and the Gram matrix of the centred ``x``.

    Values come from differences, exact for samples that lie close together; gradients from the Gram matrix, for those
    of cdist allocate ``B × B × D``.
    """
    x = x - x.mean(0)
    gram = x @ x.mT
    square = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
    exact = torch.cdist(x.detach(), x.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    half = torch.where(exact > 1e-6, 0.5 / exact, 0.0)
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
