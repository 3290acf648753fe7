"""Sums and norms that several losses need, in forms that neither overflow, nor cancel, nor allocate needlessly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(x: Tensor, dim: int | tuple[int, int] = -1, eps: float = 1e-12) -> Tensor:
    """``x`` at unit length along ``dim``; a zero vector stays zero and has a gradient of ordinary size."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > eps, length, 1.0)


def cosine_gap(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """``1 − cos`` along ``dim``, 1 beside a zero vector; as ``|u − v|² / 2``, which keeps its digits near equality."""
    u, v = unit(a, dim), unit(b, dim)
    zeros = (1 - u.detach().norm(dim=dim).round()) + (1 - v.detach().norm(dim=dim).round())
    return ((u - v).square().sum(dim) + zeros) / 2


def mean_square(s: Tensor, t: Tensor) -> Tensor:
    """Mean of ``(s − t)²`` over all elements of two tensors of one shape, read in the order of ``s`` in memory.

    A mean over elements has no order, but torch writes the gradient of its own ``mse_loss`` in the order of the axes:
    of a map that is read as tokens it comes back transposed, and every kernel of the backward pass after it walks two
    layouts at once.
    """
    order = sorted(range(s.ndim), key=s.stride, reverse=True)
    return F.mse_loss(s.permute(order), t.permute(order))


def gram_gap(s: Tensor, t: Tensor) -> Tensor:
    """``Σ ‖SSᵀ − TTᵀ‖²`` over a batch of ``(…, N, C)`` and ``(…, N, C')``, in the cheaper of its exact forms."""
    n, c_s, c_t = s.shape[-2], s.shape[-1], t.shape[-1]
    channel_form = 5 * c_s * c_t if c_s == c_t else c_s * c_s + c_t * c_t + c_s * c_t
    if n * (c_s + c_t) <= channel_form:
        return F.mse_loss(s @ s.mT, t @ t.mT, reduction="sum")
    if c_s == c_t:
        d = s - t
        return ((s.mT @ s + t.mT @ t) * (d.mT @ d)).sum() + 2 * ((s.mT @ d) * (d.mT @ t)).sum()
    return (s.mT @ s).square().sum() + (t.mT @ t).square().sum() - 2 * (s.mT @ t).square().sum()


def pool_to(x: Tensor, height: int, width: int) -> Tensor:
    """Map ``x`` averaged down to a grid; itself where it has that grid."""
    return x if x.shape[-2:] == (height, width) else F.adaptive_avg_pool2d(x, (height, width))


def same_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps on the smaller of their grids, the larger one averaged down to it."""
    height = min(student.shape[-2], teacher.shape[-2])
    width = min(student.shape[-1], teacher.shape[-1])
    return pool_to(student, height, width), pool_to(teacher, height, width)


def channel_axis(x: Tensor) -> int:
    """Axis of the channels: 1 in a map ``(B, C, H, W)``, the last in tokens ``(B, N, C)`` and embeddings ``(B, D)``."""
    return 1 if x.ndim == 4 else -1


def pooled(x: Tensor) -> Tensor:
    """``(B, C)``: the mean over positions of a map or of tokens; an embedding as it is."""
    return x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x
