"""Sums and norms that several losses need, in forms that neither overflow, nor cancel, nor allocate needlessly."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import token_gap


def unit(x: Tensor, dim: int | tuple[int, int] = -1, eps: float = 1e-12) -> Tensor:
    """``x`` at unit length along ``dim``; a zero vector stays zero and has a gradient of ordinary size."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / (length + (length <= eps))


def centred(x: Tensor, dim: int) -> Tensor:
    """``x`` minus its mean along ``dim``; exactly 0, with the gradient of that, for a constant ``x``.

    What rounding leaves of a constant would otherwise be a direction, and count as much as any once at unit length.
    """
    rest = x - x.mean(dim, keepdim=True)
    fixed = rest.detach()
    rounding = 8 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True)
    return rest - fixed.masked_fill(torch.linalg.vector_norm(fixed, dim=dim, keepdim=True) > rounding, 0)


def cosine_gap(a: Tensor, b: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """``1 − cos`` along ``dim``, 1 beside a zero vector; as ``|u − v|² / 2``, which keeps its digits near equality."""
    length_a, length_b = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (a, b))
    zero_a, zero_b = length_a <= eps, length_b <= eps
    gap = a / (length_a + zero_a) - b / (length_b + zero_b)
    missing = (zero_a.to(gap.dtype) + zero_b).squeeze(dim)  # of the lengths that the units have
    return (torch.linalg.vector_norm(gap, dim=dim).square() + missing) / 2


def over(x: Tensor, temperature: float) -> Tensor:
    """``x / temperature``; ``x`` itself at 1."""
    return x if temperature == 1 else x / temperature


class _KL(torch.autograd.Function):
    """Keeps nothing but the two logarithms; what the backward pass makes of them may be differentiated again."""

    generate_vmap_rule = True  # with setup_context, what torch.func needs

    @staticmethod
    def forward(log_q: Tensor, log_p: Tensor) -> Tensor:
        p, gap = log_p.exp(), log_q - log_p
        gap.masked_fill_(p == 0, 1)  # also where both are -inf; what is summed there is q
        far = gap >= 1
        # the first form keeps its digits near equality, the second does not overflow; in place, one after the other,
        # they take the memory of one
        near = gap.expm1().sub_(gap).mul_(p).masked_fill_(far, 0).sum(-1)
        return near + torch.addcmul(log_q.exp(), p, gap.add_(1), value=-1).masked_fill_(~far, 0).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        log_q, log_p = ctx.saved_tensors
        p, grad = log_p.exp(), grad.unsqueeze(-1)
        by_q = grad * (log_q.exp() - p) if ctx.needs_input_grad[0] else None
        by_p = grad * p * (log_p - log_q).masked_fill(p == 0, 0) if ctx.needs_input_grad[1] else None
        return by_q, by_p


_KL.forward.__signature__ = inspect.signature(_KL.forward)  # type: ignore[attr-defined]  # torch asks in every call


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``Σ p log(p / q)`` over the last axis, of logarithms of distributions that sum to one there.

    As ``Σ (p log(p / q) + q − p)``, which is the same, but has no summand below 0: of distributions that nearly agree,
    ``p log(p / q)`` is first-order and cancels in the sum, and leaves its rounding. A class without mass in ``p`` adds
    nothing to the divergence, whatever ``q`` is there; one without mass in ``q`` alone makes it infinite.
    """
    value: Tensor = _KL.apply(log_q, log_p)
    return value


def weighted(weight: Tensor, log_q: Tensor) -> Tensor:
    """``weight · log_q``, 0 where the weight is 0, even beside a logarithm of ``-inf``."""
    return weight * log_q.masked_fill(weight == 0, 0)


def mean_square(s: Tensor, t: Tensor) -> Tensor:
    """Mean of ``(s − t)²`` over all elements of two tensors of one shape, read in the order of ``s`` in memory.

    A mean over elements has no order, but torch writes the gradient of its own ``mse_loss`` in the order of the axes:
    of a map that is read as tokens it comes back transposed, and every kernel of the backward pass after it walks two
    layouts at once.
    """
    order = sorted(range(s.ndim), key=s.stride, reverse=True)
    return F.mse_loss(s.permute(order), t.permute(order))


class _HalfMeanSquare(torch.autograd.Function):
    """``mean_square`` in float32 of half-precision tensors, which keeps their difference in their own precision.

    The gradient ends in that precision anyway. Lifted to float32 before, both sides would be kept twice as large.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor) -> Tensor:
        gap = s.float() - t.float()
        ctx.save_for_backward(s, t, gap.to(s.dtype))
        return gap.square().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        s, t, gap = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated once more
            gap = s.float() - t.float()
        return (grad * (2 / gap.numel()) * gap.float()).to(s.dtype), None


def half_mean_square(s: Tensor, t: Tensor) -> Tensor:
    """Mean of ``(s − t)²`` of a half-precision ``s`` and any ``t``, a float32; no gradient for ``t``."""
    value: Tensor = _HalfMeanSquare.apply(s, t)
    return value


def may_be_kept(x: Tensor) -> bool:
    """Whether a backward pass may read it: what ``torch.inference_mode`` made may not. A compiler makes its own."""
    return torch.compiler.is_compiling() or not x.is_inference()


def gram_gap(s: Tensor, t: Tensor) -> Tensor:
    """``Σ ‖SSᵀ − TTᵀ‖²`` over a batch of ``(…, N, C)`` and ``(…, N, C')``, in the cheapest of its exact forms."""
    n, c_s, c_t = s.shape[-2], s.shape[-1], t.shape[-1]
    if token_gap.serves(s, t):
        return token_gap.gram_gap(s, t)
    if c_s == c_t:
        total, gap = s + t, s - t
        crossed = total.mT @ gap
        return ((total.mT @ total) * (gap.mT @ gap) + crossed * crossed.mT).sum() / 2
    if n * (c_s + c_t) <= c_s * c_s + c_t * c_t + c_s * c_t:
        return (s @ s.mT - t @ t.mT).square().sum()
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
