"""``Σ ‖SSᵀ − TTᵀ‖²`` of few tokens, by one product of tokens with tokens forward and one backward.

With ``A = S + T`` and ``D = S − T`` it is ``‖M + Mᵀ‖² / 4`` with ``M = ADᵀ``: nothing cancels as the two come close.
The gradient is ``4 (SSᵀ − TTᵀ) S``. What autograd makes of the forward pass are two products, one of them transposed in
memory, for which float32 copies of both sides are kept; here it is the two sides as they came, and the gap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def serves(s: Tensor, t: Tensor) -> bool:
    """Whether this form is the cheapest of the exact ones."""
    return s.shape == t.shape and s.shape[-2] <= 3 * s.shape[-1]


def gram_gap(s: Tensor, t: Tensor, normalize: bool = False) -> Tensor:
    """``Σ ‖SSᵀ − TTᵀ‖²`` over a batch of ``(…, N, C)`` and ``(…, N, C)``, tokens at unit length if asked.

    In float32, or what is more precise, whatever the precision of the two. To be called, and gone back through, where
    autocast is off; the two may not be changed in place before the backward pass.
    """
    value: Tensor = _TokenGap.apply(s, t, normalize)
    return value


class _TokenGap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, normalize: bool) -> Tensor:
        by_s, by_t = (_scale(x) if normalize else None for x in (s, t))
        twice = _twice_the_gap(_scaled(s, by_s), _scaled(t, by_t))
        ctx.save_for_backward(s, t, by_s, by_t, twice)
        ctx.normalize = normalize
        return twice.square().sum() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        s, t, by_s, by_t, twice = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated once more
            by_s, by_t = (_scale(x) if ctx.normalize else None for x in (s, t))
            twice = _twice_the_gap(_scaled(s, by_s), _scaled(t, by_t))
        first = _gradient(s, by_s, twice, 2 * grad) if ctx.needs_input_grad[0] else None
        return first, _gradient(t, by_t, twice, -2 * grad) if ctx.needs_input_grad[1] else None, None


def _scale(x: Tensor, eps: float = 1e-12) -> Tensor:
    """What brings each token to unit length, ``(…, N, 1)``: one over its length, 1 for a zero vector."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_precision(x))
    return 1 / (length + (length <= eps))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.to(_precision(x)) if scale is None else x * scale


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _twice_the_gap(s: Tensor, t: Tensor) -> Tensor:
    """``2 (SSᵀ − TTᵀ)``, from scaled tokens."""
    m = (s + t) @ (s - t).mT
    return m + m.mT


def _gradient(x: Tensor, scale: Tensor | None, twice: Tensor, factor: Tensor) -> Tensor:
    """By ``x``, of what has the gradient ``factor · twice · X`` by the scaled tokens ``X``.

    ``x`` meets nothing here that it met in the forward pass: so a compiler has no float32 form of it to keep.
    """
    factor = factor.reshape((1,) * x.ndim)  # a tensor without axes would leave the product in half precision
    if scale is None:
        return (twice @ (x * factor)).to(x.dtype)
    whole = scale * (twice @ (x * (factor * scale)))
    along = scale * scale * (whole * x).sum(-1, keepdim=True)  # along itself a unit vector does not change
    return (whole - x * along).to(x.dtype)
