"""``Σ ‖SSᵀ − TTᵀ‖²`` of many tokens of few channels on a GPU, in one reading of the tokens forward and one backward.

The form by channel Grams, as in ``algebra.gram_gap``: with ``A = S + T`` and ``D = S − T`` it is
``(⟨AᵀA, DᵀD⟩ + ⟨AᵀD, DᵀA⟩) / 2``. Plainly, unit tokens, ``A`` and ``D`` are written out and read by three products and
by four of the backward pass. Here they live on chip. ``pair_grams`` gives the three Grams; with ``P``, ``Q`` and ``R``
the gradients by ``AᵀA``, ``DᵀD`` and ``AᵀD``, that by ``S`` is ``A (P + Pᵀ + R) + D (Q + Qᵀ + Rᵀ)``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import may_be_kept

WIDEST = 128
"""Channels of which three Grams and a tile of tokens fit on a multiprocessor."""
ROWS, STEP = 64, 64
"""Rows of a Gram, and tokens, that a program has in hand at once: the fastest that were tried on an H100."""
ROUND = True
"""Whether operands are rounded to TF32 before the tensor cores cut them off."""
HAS_TRITON = find_spec("triton") is not None and torch.version.cuda is not None


def serves(s: Tensor, t: Tensor) -> bool:
    """Whether the kernels take these tokens, and are the cheaper way."""
    fit = s.shape == t.shape and 0 < s.shape[-1] <= min(WIDEST, s.shape[-2]) and s.numel() > 0
    if not (HAS_TRITON and s.is_cuda and t.is_cuda and fit and s.dtype != torch.float64 and may_be_kept(t)):
        return False
    from .gram_kernels import on_hopper

    return torch.backends.cuda.matmul.allow_tf32 and on_hopper()  # their products are in TF32


def gram_gap(s: Tensor, t: Tensor, normalize: bool) -> Tensor:
    """``Σ ‖SSᵀ − TTᵀ‖²`` over a batch of ``(B, N, C)`` and ``(B, N, C)``, tokens at unit length if asked.

    Differentiable once, by ``s`` alone.
    """
    sums, gaps, both = pair_grams(s, t.detach(), normalize).unbind(0)
    return (sums * gaps + both * both.mT).sum() / 2


# the kernels are imported where they run: triton takes long to import, and is not everywhere


@torch.library.custom_op("kdlib::pair_grams", mutates_args=())
def pair_grams(s: Tensor, t: Tensor, normalize: bool) -> Tensor:
    """``AᵀA``, ``DᵀD`` and ``AᵀD``, ``(3, B, C, C)`` in float32, of ``(B, N, C)`` tokens' sums A and differences D."""
    from .gram_kernels import grams

    plan = _plan(s, programs=256)
    images, _, channels = s.shape
    parts = torch.empty(plan.chunks, 3, images, channels, channels, device=s.device, dtype=torch.float32)
    grams[images, plan.chunks, max(1, plan.width // ROWS)](
        s, t, parts, *s.stride(), *t.stride(), channels, s.shape[1], plan.chunk, W=plan.width,
        COLS=min(ROWS, plan.width), STEP=STEP, NORMALIZE=normalize, ROUND=ROUND, num_warps=plan.warps, num_stages=2,
    )  # fmt: skip
    return parts.sum(0)


@torch.library.custom_op("kdlib::pair_grams_gradient", mutates_args=())
def pair_grams_gradient(s: Tensor, t: Tensor, on_sum: Tensor, on_gap: Tensor, normalize: bool) -> Tensor:
    """Gradient by ``s`` of what has the gradient ``A @ on_sum + D @ on_gap`` by unit tokens; both ``(B, C, C)``."""
    from .gram_kernels import gradient

    plan, out = _plan(s, programs=1024), torch.empty_like(s)
    gradient[len(s), plan.chunks](
        s, t, on_sum.contiguous(), on_gap.contiguous(), out, *s.stride(), *t.stride(), *out.stride(), s.shape[2],
        s.shape[1], plan.chunk, W=plan.width, STEP=STEP, NORMALIZE=normalize, ROUND=ROUND, num_warps=plan.warps,
        num_stages=2,
    )  # fmt: skip
    return out


class _Plan(NamedTuple):
    """How the tokens of a batch are shared out."""

    width: int
    """Channels, filled up to a power of two."""
    chunk: int
    """Tokens of one program; always the same for the same shape, so that sums are too."""
    chunks: int
    warps: int


def _plan(s: Tensor, programs: int) -> _Plan:
    images, tokens, channels = s.shape
    width = max(16, 1 << (channels - 1).bit_length())
    steps = -(-tokens // STEP)
    each = -(-steps // max(1, programs // images))
    return _Plan(width, each * STEP, -(-steps // each), 4 if width <= 64 else 8)


@pair_grams.register_fake
def _(s: Tensor, t: Tensor, normalize: bool) -> Tensor:
    return s.new_empty(3, len(s), s.shape[-1], s.shape[-1], dtype=torch.float32)


@pair_grams_gradient.register_fake
def _(s: Tensor, t: Tensor, on_sum: Tensor, on_gap: Tensor, normalize: bool) -> Tensor:
    return torch.empty_like(s)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.normalize = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    s, t = ctx.saved_tensors
    sums, gaps, both = grad.unbind(0)
    on_sum, on_gap = sums + sums.mT + both, gaps + gaps.mT + both.mT
    return pair_grams_gradient(s, t, on_sum, on_gap, ctx.normalize), None, None


pair_grams.register_autograd(_backward, setup_context=_remember)
