"""The blocks of a fused RIFormer on a GPU, by kernels that read and write the hidden layer little or not at all.

The first branch of a `FullBlock` is a scale and a shift of each sample's channels, x' = a x + b, so the second norm's
mean and variance follow from each channel's mean and variance of x (`scales`): one reading of x serves both norms. The
hidden layer of the MLP stays on chip where channels are few; elsewhere fc1 applies GELU before it writes, fc2 is the
library's product, added in place to the first branch.

For inference in half precision. What is not on a GPU, not in half precision, or wants a gradient runs as it did before.

Source of the fold: recipes/riformer/fusion.py. The statistics' algebra and the kernels are this project's own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

try:
    import triton

    from recipes.riformer.kernels import linear_gelu, mlp, moments
except ImportError as error:
    raise ImportError(
        "recipes.riformer.fast needs Triton, which comes with torch's builds for CUDA; pip install triton, or run "
        'recipes.riformer.model.fuse(net, "full"), which needs nothing'
    ) from error

from recipes.riformer.fusion import EPS
from recipes.riformer.model import MetaFormer, Stage, fuse

Tile = dict[str, int]
"""Launch parameters: M, N, (K, G,) num_warps, num_stages."""
SMALL, LARGE = Tile(M=64, N=64, num_warps=4, num_stages=2), Tile(M=128, N=64, num_warps=8, num_stages=2)
LINEAR = Tile(M=128, N=128, K=64, G=8, num_warps=8, num_stages=3)
ON_CHIP = (64, 96, 128, 192)
"""Channels at which the hidden layer stays on chip: docs/performance.md has what was measured."""


def scales(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a block does to (B, H, W, C) beside its MLP, as scales and shifts (B, C): what `moments` computes, plainly.

    With n1 the norm of gamma and beta over all of a sample, n2 one without, and x' = x + n1(x): x' = a x + b and
    n2(x') = p x + q.

    Returns:
        (a, b, p, q), in float32 or the float64 of `x`.
    """
    x = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(x, dim=(1, 2), correction=0)
    centre, spread = _of_sample(mean, var)
    rate = torch.rsqrt(spread + eps)
    a = 1 + rate * gamma
    b = beta - centre * rate * gamma
    centre, spread = _of_sample(a * mean + b, a * a * var)
    rate = torch.rsqrt(spread + eps)
    return a, b, a * rate, (b - centre) * rate


def _of_sample(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all channels from those of each, (B, C) to (B, 1)."""
    centre = mean.mean(1, keepdim=True)
    return centre, (var + (mean - centre).square()).mean(1, keepdim=True)


def parts_of(channels: int) -> tuple[int, int]:
    """Channels as at most three equal parts of a power of two, (parts, size).

    Raises:
        ValueError: channels that are not 1, 2 or 3 times a power of two of at least 16.
    """
    for parts in (1, 2, 3):
        size, rest = divmod(channels, parts)
        if not rest and size >= 16 and size & (size - 1) == 0:
            return parts, size
    raise ValueError(f"channels: got {channels}, expected 1, 2 or 3 times a power of two of at least 16")


def _check(dim: int, hidden: int, tile: Tile) -> None:
    if hidden % tile["N"] or dim % tile.get("K", 1):
        raise ValueError(
            f"{dim} channels and {hidden} hidden ones do not divide into tiles {tile}; run it without kernels"
        )


class FastBlocks(nn.Module):
    """The blocks of one stage in form "full", (B, H, W, C) in and out, by the kernels where these can run.

    Args:
        on_chip: whether the hidden layer stays on chip; by default where that was measured to be faster.
        tile: launch parameters of `mlp` or `linear_gelu`.
    """

    def __init__(self, blocks: nn.Sequential, on_chip: bool | None = None, tile: Tile | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        first: Any = blocks[0]
        args = first.args
        self.dim, self.hidden = args.dim, args.hidden
        self.on_chip = self.dim in ON_CHIP if on_chip is None else on_chip
        self.tile = tile or (LINEAR if not self.on_chip else SMALL if self.dim <= 96 else LARGE)
        _check(self.dim, self.hidden, self.tile)
        self.parts = parts_of(self.dim) if self.on_chip else None
        self._weights: list[tuple[Tensor, ...]] = []
        self.register_load_state_dict_post_hook(lambda blocks, _: blocks._weights.clear())

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.is_grad_enabled():
            if torch.is_grad_enabled():
                self._weights.clear()  # they may be trained
            return self.blocks(x)
        if not self._weights or (self._weights[0][2].dtype, self._weights[0][2].device) != (x.dtype, x.device):
            self._weights = [_weights(block, x) for block in self.blocks]
        return self.run(x.contiguous())

    def run(self, x: Tensor) -> Tensor:
        """All blocks by the kernels, whatever `x` is."""
        for weights in self._weights or [_weights(block, x) for block in self.blocks]:
            x = self._on_chip(x, *weights) if self.on_chip else self._two_products(x, *weights)
        return x

    def _on_chip(
        self, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        batch, height, width, dim = x.shape
        assert self.parts is not None
        parts, size = self.parts
        scale = torch.empty(4, batch, dim, device=x.device)
        _launch_moments(x, gamma, beta, b2, scale)
        out, tokens = torch.empty_like(x), batch * height * width
        grid = (triton.cdiv(tokens, self.tile["M"]),)
        mlp[grid](x, scale, w1, b1, w2, b2, out, tokens, height * width, batch,
                   C=dim, H=self.hidden, K=size, PARTS=parts, **self.tile)  # fmt: skip
        return out

    def _two_products(
        self, x: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
    ) -> Tensor:
        dim, tokens = self.dim, x.numel() // self.dim
        out, z = torch.empty_like(x), torch.empty_like(x)
        _launch_moments(x, gamma, beta, b2, out, z)
        hidden = torch.empty(tokens, self.hidden, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(tokens, self.tile["M"]) * (self.hidden // self.tile["N"]),)
        linear_gelu[grid](z, w1, b1, hidden, tokens, C=dim, H=self.hidden, **self.tile)
        flat = out.view(tokens, dim)
        torch.addmm(flat, hidden, w2, out=flat)
        return out


def _launch_moments(
    x: Tensor, gamma: Tensor, beta: Tensor, b2: Tensor, first: Tensor, second: Tensor | None = None
) -> None:
    batch, height, width, dim = x.shape
    padded = triton.next_power_of_2(dim)
    rows = max(8192 // padded, 1)
    write = second is not None
    moments[(batch,)](x, gamma, beta, first, first, second if write else first, b2, EPS, height * width,
                       C=dim, P=padded, R=rows, WRITE=write, num_warps=8)  # fmt: skip


def _weights(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """gamma, beta, W1 (C, H), b1, W2 (H, C), b2: products in the dtype of `x`, the rest in float32."""
    own = [block.norm_reparam.weight, block.norm_reparam.bias, block.mlp.fc1.weight.T, block.mlp.fc1.bias,
           block.mlp.fc2.weight.T, block.mlp.fc2.bias]  # fmt: skip
    return tuple(
        tensor.detach().to(x.device, x.dtype if tensor.ndim == 2 else torch.float32).contiguous() for tensor in own
    )


def with_kernels(model: nn.Module) -> MetaFormer:
    """A copy of a RIFormer, fused "full" and in eval mode, whose blocks run by the kernels on a GPU.

    They keep copies of its weights, made when it first runs there, and again after a state dict was loaded or it ran
    with gradients.

    Raises:
        ValueError: what `fuse` refuses, or a size whose products do not divide into tiles.
    """
    fused = copy.deepcopy(model) if isinstance(model, MetaFormer) and model.form == "full" else fuse(model, "full")
    for stage in fused.stages:
        assert isinstance(stage, Stage)
        stage.blocks = FastBlocks(stage.blocks)  # type: ignore[assignment]
    return fused.eval()
