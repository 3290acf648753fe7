"""Losses between the distances, and the angles, of the embeddings ``(B, D)`` of a batch: RKD."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Loss, full_precision
from .checks import check_embeddings

PIECE = 2**23
"""How many numbers the differences of samples may be at a time, 32 MiB of float32: anchors are taken in pieces."""


class RKDDistance(Loss):
    r"""``smooth-L1(d_s / mean d_s, d_t / mean d_t)`` of the distances ``d`` between samples, beta 1, mean over pairs.

    The mean is over all ``B²`` pairs, the zero diagonal included, as in the authors' code, where the paper has the sum
    over pairs, ``B²`` times as much; the mean distance is over pairs of two samples. No two samples count as closer
    than 1e-6. The code's weight is 25. Distances and their gradients come from differences of samples, of which at most
    32 MiB are made at a time.

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
    ``B³`` times as much. The code's weight is 50. Closer than 1e-12 is to coincide.
    The directions ``e_ij`` come from differences of samples, which are exact where two lie close together; those of the
    Gram matrix are not. Anchors are taken in pieces, of which the directions take 32 MiB at most.

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
        return angle_gap(student, teacher)


def angle_gap(s: Tensor, t: Tensor) -> Tensor:
    """Mean of ``smooth-L1`` over all triples of samples; no gradient for ``t``."""
    value: Tensor = _AngleGap.apply(s, t, s.requires_grad and torch.is_grad_enabled())
    return value


class _AngleGap(torch.autograd.Function):
    """The gradient is made beside the value, piece by piece, while the directions are there."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, wanted: bool) -> Tensor:
        value, gradient = _value_and_gradient(s, t, wanted)
        ctx.save_for_backward(s, t, gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        s, t, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated once more
            _, gradient = _value_and_gradient(s, t, True)
        return grad * gradient, None, None


def _value_and_gradient(s: Tensor, t: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    value, towards, away = s.new_zeros(()), torch.zeros_like(s), []
    for piece in _pieces(len(s), max(s.shape[1], t.shape[1])):
        aims, _ = _directions(t, piece)
        cosines_t = aims @ aims.mT
        del aims
        e, inverse = _directions(s, piece)
        cosines = e @ e.mT
        value = value + F.smooth_l1_loss(cosines, cosines_t, reduction="sum")
        if wanted:
            slope = (cosines - cosines_t).clamp(-1, 1)
            by_e = slope @ e
            by_gap = (by_e - e * (by_e * e).sum(-1, keepdim=True)) * inverse  # along e nothing changes
            towards = towards + by_gap.sum(0)
            away.append(by_gap.sum(1))
    triples = len(s) ** 3
    gradient = (towards - torch.cat(away)) * (2 / triples) if wanted else towards  # 2: e is on both sides of a cosine
    return value / triples, gradient


def _directions(x: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
    """``(A, B, D)`` unit vectors from the anchors of a piece to all samples, and ``(A, B, 1)`` one over the distances.

    Both are 0 where two samples coincide.
    """
    gap = x - x[piece, None]
    length = torch.linalg.vector_norm(gap, dim=-1, keepdim=True)
    apart = length > 1e-12
    inverse = torch.where(apart, 1 / torch.where(apart, length, 1.0), 0.0)
    return gap * inverse, inverse


def _distances(x: Tensor) -> Tensor:
    """``(B, B)`` Euclidean distances, from differences, which the backward pass of cdist makes all at once."""
    pieces = _pieces(len(x), x.shape[1])
    return torch.cat([torch.cdist(x[piece], x, compute_mode="donot_use_mm_for_euclid_dist") for piece in pieces])


def _relative(x: Tensor) -> Tensor:
    """Distances over the mean distance of two different samples."""
    batch = len(x)
    diagonal = torch.eye(batch, dtype=torch.bool, device=x.device)
    distances = _distances(x).clamp_min(1e-6).masked_fill(diagonal, 0)
    return distances / (distances.sum() / (batch * (batch - 1)) if batch > 1 else 1.0)


def _pieces(batch: int, size: int) -> list[slice]:
    """Anchors, so many at a time that their differences from all samples are no more than ``PIECE`` numbers."""
    step = max(1, PIECE // (batch * size))
    return [slice(start, start + step) for start in range(0, batch, step)]
