"""Triton kernels of `fused_gram.py`: Grams of the sums and differences of two sets of tokens, and their gradient.

A token is divided by its length on chip, and its sum and difference are never written. Tiles lie channels first,
(W, N), W a power of two that holds all channels: what lies beyond them is read as zero and adds nothing.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl


@torch.compiler.assume_constant_result
def on_hopper() -> bool:
    """The tiles need 224 KB of shared memory, and were tried on no other chip."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(torch.cuda.current_device()).major == 9


@triton.jit
def _units(x, image, channel, token, sb, sn, sc, C, N, NORMALIZE: tl.constexpr):
    """Tokens of an image, (W, N) in float32, at unit length if asked; and one over their lengths, 1 of a zero token."""
    at = x + image.to(tl.int64) * sb + channel[:, None] * sc + token[None, :] * sn
    value = tl.load(at, mask=(channel < C)[:, None] & (token < N)[None, :], other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 0))
    length += length <= 1e-12
    return (value / length[None, :] if NORMALIZE else value), 1 / length


@triton.jit
def _near(x, ROUND: tl.constexpr):
    """The nearest TF32 number. The tensor cores cut the last 13 bits off, which makes every product too small."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True) if ROUND else x


@triton.jit
def grams(
    s, t, parts, s_b, s_n, s_c, t_b, t_n, t_c, C, N, chunk,
    W: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, NORMALIZE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Programs (B, chunks, W / COLS): COLS rows of AᵀA, DᵀD and AᵀD of a chunk of tokens into (chunks, 3, B, C, C)."""
    image, part, rows = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, own = tl.arange(0, W), rows * COLS + tl.arange(0, COLS)
    sums = tl.zeros([COLS, W], tl.float32)
    gaps = tl.zeros([COLS, W], tl.float32)
    both = tl.zeros([COLS, W], tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, N), STEP):
        token = start + tl.arange(0, STEP)
        first, first_scale = _units(s, image, channel, token, s_b, s_n, s_c, C, N, NORMALIZE)
        second, second_scale = _units(t, image, channel, token, t_b, t_n, t_c, C, N, NORMALIZE)
        total, gap = _near(first + second, ROUND), _near(first - second, ROUND)
        if COLS == W:
            mine, less = total, gap
        else:  # the same tokens' own channels once more; the lengths are those of all channels
            first, _ = _units(s, image, own, token, s_b, s_n, s_c, C, N, False)
            second, _ = _units(t, image, own, token, t_b, t_n, t_c, C, N, False)
            if NORMALIZE:
                first *= first_scale[None, :]
                second *= second_scale[None, :]
            mine, less = _near(first + second, ROUND), _near(first - second, ROUND)
        sums = tl.dot(mine, tl.trans(total), sums, input_precision="tf32")
        gaps = tl.dot(less, tl.trans(gap), gaps, input_precision="tf32")
        both = tl.dot(mine, tl.trans(gap), both, input_precision="tf32")
    size = tl.num_programs(0).to(tl.int64) * C * C
    at = parts + part * 3 * size + image.to(tl.int64) * C * C + own[:, None] * C + channel[None, :]
    known = (own < C)[:, None] & (channel < C)[None, :]
    tl.store(at, sums, mask=known)
    tl.store(at + size, gaps, mask=known)
    tl.store(at + 2 * size, both, mask=known)


@triton.jit
def gradient(
    s, t, on_sum, on_gap, out, s_b, s_n, s_c, t_b, t_n, t_c, o_b, o_n, o_c, C, N, chunk,
    W: tl.constexpr, STEP: tl.constexpr, NORMALIZE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Programs (B, chunks): A @ on_sum + D @ on_gap, then back through the division by the student's length."""
    image, part, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, W)
    square = image.to(tl.int64) * C * C + channel[:, None] * C + channel[None, :]
    known = (channel < C)[:, None] & (channel < C)[None, :]
    by_sum = tl.trans(_near(tl.load(on_sum + square, mask=known, other=0.0), ROUND))
    by_gap = tl.trans(_near(tl.load(on_gap + square, mask=known, other=0.0), ROUND))
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, N), STEP):
        token = start + tl.arange(0, STEP)
        first, scale = _units(s, image, channel, token, s_b, s_n, s_c, C, N, NORMALIZE)
        second, _ = _units(t, image, channel, token, t_b, t_n, t_c, C, N, NORMALIZE)
        found = tl.dot(by_sum, _near(first + second, ROUND), input_precision="tf32")
        found = tl.dot(by_gap, _near(first - second, ROUND), found, input_precision="tf32")
        if NORMALIZE:
            found = (found - first * tl.sum(first * found, 0)[None, :]) * scale[None, :]
        at = out + image.to(tl.int64) * o_b + channel[:, None] * o_c + token[None, :] * o_n
        tl.store(at, found.to(out.dtype.element_ty), mask=(channel < C)[:, None] & (token < N)[None, :])
