"""Triton kernels of a fused RIFormer's blocks; `fast.py` says what they compute and starts them.

moments       both norms of a block, as scales and shifts of each sample's channels; or what they make of every token
mlp           the rest of the block, the hidden layer on chip
linear_gelu   fc1 with GELU, where channels are too many for that
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def moments(
    x, gamma, beta, scale, first, second, bias2, eps, hw,
    C: tl.constexpr, P: tl.constexpr, R: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One program a sample: scales a, b, p, q into (4, B, C); with WRITE, in their place, a x + b + bias2 and
    p x + q for every token."""
    sample, samples = tl.program_id(0), tl.num_programs(0)
    channel, row = tl.arange(0, P), tl.arange(0, R)
    known = channel < C
    base = x + sample.to(tl.int64) * hw * C
    at = row[:, None] * C + channel[None, :]
    # deviations from the first token, so that a mean far from zero costs no digits
    origin = tl.load(base + channel, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros([R, P], tl.float32)
    square = tl.zeros([R, P], tl.float32)
    for start in range(0, hw, R):
        inside = known[None, :] & (start + row < hw)[:, None]
        value = tl.load(base + start * C + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - origin[None, :], 0.0)
        total += value
        square += value * value
    shift = tl.sum(total, 0) / hw
    var = tl.maximum(tl.sum(square, 0) / hw - shift * shift, 0.0)
    mean = origin + shift
    centre = tl.sum(mean, 0) / C
    off = tl.where(known, mean - centre, 0.0)
    rate = tl.rsqrt(tl.sum(var + off * off, 0) / C + eps)
    g = tl.load(gamma + channel, mask=known, other=0.0)
    a = tl.where(known, 1 + rate * g, 0.0)
    b = tl.load(beta + channel, mask=known, other=0.0) - centre * rate * g
    mean = tl.where(known, a * mean + b, 0.0)
    centre = tl.sum(mean, 0) / C
    off = tl.where(known, mean - centre, 0.0)
    rate = tl.rsqrt(tl.sum(a * a * var + off * off, 0) / C + eps)
    p, q = a * rate, (b - centre) * rate
    if WRITE:
        b += tl.load(bias2 + channel, mask=known, other=0.0)
        there = sample.to(tl.int64) * hw * C
        for start in range(0, hw, R):
            inside = known[None, :] & (start + row < hw)[:, None]
            value = tl.load(base + start * C + at, mask=inside, other=0.0).to(tl.float32)
            place = there + start * C + at
            tl.store(first + place, (value * a[None, :] + b[None, :]).to(first.dtype.element_ty), mask=inside)
            tl.store(second + place, (value * p[None, :] + q[None, :]).to(second.dtype.element_ty), mask=inside)
    else:
        out = scale + sample * C + channel
        tl.store(out, a, mask=known)
        tl.store(out + samples * C, b, mask=known)
        tl.store(out + 2 * samples * C, p, mask=known)
        tl.store(out + 3 * samples * C, q, mask=known)


@triton.jit
def _gelu(x):
    """The exact GELU, its erf within 1.5e-7 by Abramowitz and Stegun 7.1.26: fewer instructions than libdevice's."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = poly * tl.exp(-z * z)  # 1 - erf(z)
    return x * tl.where(x < 0, 0.5 * tail, 1.0 - 0.5 * tail)


@triton.jit
def _third(x, scale, sample, rows, inside, samples, C: tl.constexpr, K: tl.constexpr, AT: tl.constexpr):
    """What fc1 reads of the AT-th part of a tile's channels."""
    channel = AT * K + tl.arange(0, K)
    known = inside[:, None] & (channel < C)[None, :]
    value = tl.load(x + rows[:, None] * C + channel[None, :], mask=known, other=0.0)
    at = scale + sample[:, None] * C + channel[None, :]
    step = samples * C
    p = tl.load(at + 2 * step, mask=known, other=0.0)
    q = tl.load(at + 3 * step, mask=known, other=0.0)
    return (value.to(tl.float32) * p + q).to(value.dtype)


@triton.jit
def _finish(
    x, scale, bias2, out, acc, sample, rows, inside, samples, C: tl.constexpr, K: tl.constexpr, AT: tl.constexpr
):
    """Adds the first branch to the AT-th part of what fc2 gave, and writes it."""
    channel = AT * K + tl.arange(0, K)
    known = inside[:, None] & (channel < C)[None, :]
    place = rows[:, None] * C + channel[None, :]
    value = tl.load(x + place, mask=known, other=0.0).to(tl.float32)
    at = scale + sample[:, None] * C + channel[None, :]
    a = tl.load(at, mask=known, other=0.0)
    b = tl.load(at + samples * C, mask=known, other=0.0)
    last = tl.load(bias2 + channel, mask=channel < C, other=0.0)
    tl.store(out + place, (acc + value * a + b + last[None, :]).to(out.dtype.element_ty), mask=known)


@triton.jit
def mlp(
    x, scale, weight1, bias1, weight2, bias2, out, tokens, hw, samples,
    C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of M tokens through the whole block, N hidden channels at a time; channels in PARTS parts of K = 2^k."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    inside = rows < tokens
    sample = rows // hw
    rows = rows.to(tl.int64)
    part, hidden = tl.arange(0, K), tl.arange(0, N)
    z0 = _third(x, scale, sample, rows, inside, samples, C, K, 0)
    acc0 = tl.zeros([M, K], tl.float32)
    if PARTS > 1:
        z1 = _third(x, scale, sample, rows, inside, samples, C, K, 1)
        acc1 = tl.zeros([M, K], tl.float32)
    if PARTS > 2:
        z2 = _third(x, scale, sample, rows, inside, samples, C, K, 2)
        acc2 = tl.zeros([M, K], tl.float32)
    for start in range(0, H, N):
        one = weight1 + part[:, None] * H + (start + hidden)[None, :]  # (C, H)
        two = weight2 + (start + hidden)[:, None] * C + part[None, :]  # (H, C)
        h = tl.dot(z0, tl.load(one))
        if PARTS > 1:
            h = tl.dot(z1, tl.load(one + K * H), h)
        if PARTS > 2:
            h = tl.dot(z2, tl.load(one + 2 * K * H), h)
        h = _gelu(h + tl.load(bias1 + start + hidden)[None, :]).to(z0.dtype)
        acc0 = tl.dot(h, tl.load(two), acc0)
        if PARTS > 1:
            acc1 = tl.dot(h, tl.load(two + K), acc1)
        if PARTS > 2:
            acc2 = tl.dot(h, tl.load(two + 2 * K), acc2)
    _finish(x, scale, bias2, out, acc0, sample, rows, inside, samples, C, K, 0)
    if PARTS > 1:
        _finish(x, scale, bias2, out, acc1, sample, rows, inside, samples, C, K, 1)
    if PARTS > 2:
        _finish(x, scale, bias2, out, acc2, sample, rows, inside, samples, C, K, 2)


@triton.jit
def linear_gelu(
    x, weight, bias, out, tokens,
    C: tl.constexpr, H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """gelu(x W + b) for (tokens, C) and (C, H): M by N of it a program, G rows of tiles side by side for the cache."""
    across = H // N
    down = tl.cdiv(tokens, M)
    band = tl.program_id(0) // (G * across)
    height = tl.minimum(down - band * G, G)
    i = band * G + tl.program_id(0) % (G * across) % height
    j = tl.program_id(0) % (G * across) // height
    rows, columns, part = i * M + tl.arange(0, M), j * N + tl.arange(0, N), tl.arange(0, K)
    inside = (rows < tokens)[:, None]
    left = x + rows.to(tl.int64)[:, None] * C + part[None, :]
    right = weight + part[:, None] * H + columns[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for _ in range(0, C, K):
        acc = tl.dot(tl.load(left, mask=inside, other=0.0), tl.load(right), acc)
        left += K
        right += K * H
    acc = _gelu(acc + tl.load(bias + columns)[None, :])
    tl.store(out + rows.to(tl.int64)[:, None] * H + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)
