"""GFNet-H, RIFormer's logit teacher: token mixing by a learned filter in the frequency domain, over four stages.

Source: Global Filter Networks for Image Classification, NeurIPS 2021, arXiv 2107.00645, the hierarchical variant with
one residual per block and a layer scale. Importing this file registers the models with timm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from recipes.riformer.backbone import Backbone, expect
from recipes.riformer.fusion import Mlp
from recipes.riformer.sizes import Size, model_cfg, refuse_pretrained

__all__ = ["GFNetH"]

Grid = tuple[int, int]


class GlobalFilter(nn.Module):
    """Circular convolution of tokens (B, H*W, C) with a learned kernel as large as the grid.

    rfft2 over H and W (norm "ortho"), times `complex_weight` (H, W//2+1, C, 2) = (real, imaginary), irfft2. Always in
    float32 or wider, whatever autocast says: half precision transforms exist for powers of two only.

    A real kernel has a Hermitian spectrum in column 0 (and in the last column for even W), trained weights need not.
    The CPU's inverse drops the rest; a GPU's is not obliged to. To compare devices, replace W[u] in these columns by
    (W[u] + conj(W[-u])) / 2, which leaves the CPU's result as it is.
    """

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.complex_weight = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        # space last and contiguous: Inductor of torch 2.11 expects other strides of a transform over inner dimensions
        spectrum = torch.fft.rfft2(x.to(wide).mT.contiguous().unflatten(2, self.grid), norm="ortho")
        # the complex product in real numbers: Inductor has no complex kernels on a GPU
        a, b = torch.view_as_real(spectrum).unbind(-1)
        c, d = self.complex_weight.to(wide).permute(3, 2, 0, 1)
        spectrum = torch.complex(a * c - b * d, a * d + b * c)
        return torch.fft.irfft2(spectrum, s=self.grid, norm="ortho").flatten(2).mT.to(x.dtype)


class Block(nn.Module):
    """x + gamma mlp(norm2(filter(norm1 x))) on tokens (B, N, C): one residual, so the filter's output is no branch."""

    def __init__(self, dim: int, hidden: int, grid: Grid, drop_path: float, layer_scale_init: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.filter = GlobalFilter(dim, grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden, nn.Linear)
        off = layer_scale_init is None or layer_scale_init is False
        self.gamma = None if off else nn.Parameter(torch.full((dim,), float(layer_scale_init or 0)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.mlp(self.norm2(self.filter(self.norm1(x))))
        return x + self.drop_path(branch if self.gamma is None else branch * self.gamma)


def _window(size: int, overlap: bool) -> tuple[int, int]:
    """Kernel and padding of a convolution with stride `size`: no overlap, or that of PoolFormer's (7, 2 and 3, 1)."""
    return (2 * size - 1, size // 2) if overlap else (size, 0)


def cut(grid: Grid, size: int, overlap: bool) -> Grid:
    """The grid that such a convolution makes."""
    kernel, padding = _window(size, overlap)
    height, width = ((side + 2 * padding - kernel) // size + 1 for side in grid)
    return height, width


class Patches(nn.Module):
    """A convolution with stride `size` from a map to tokens.

    Takes an image (B, C, H, W), or tokens (B, H*W, C) if their `grid` is given; returns tokens (B, h*w, dim).
    """

    def __init__(self, in_dim: int, dim: int, size: int, overlap: bool, grid: Grid | None = None) -> None:
        super().__init__()
        self.grid = grid
        kernel, padding = _window(size, overlap)
        self.conv = nn.Conv2d(in_dim, dim, kernel, size, padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is not None:
            x = x.transpose(1, 2).unflatten(2, self.grid)
        return self.conv(x).flatten(2).transpose(1, 2)


class Stage(nn.Module):
    """Downsampling (none in the first stage) and blocks; tokens (B, N, C) in and out, N = grid[0] * grid[1]."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], grid: Grid) -> None:
        super().__init__()
        self.grid, self.grad_checkpointing = grid, False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        return checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)


class GFNetH(Backbone):
    """Images (B, in_chans, H, W) of one fixed size to logits (B, num_classes).

    Args:
        depths: blocks per stage; as many stages as entries.
        dims: channels per stage.
        image_size: side of the square image in pixels, or (H, W). Filters and position embedding belong to this size;
            `resize.resize_state_dict` brings weights to another.
        num_classes: 0 for no classifier.
        in_chans: channels of the image.
        mlp_ratio: hidden channels of the MLP per channel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        layer_scale_init: first value of gamma; 0 makes every block start as identity, None or False is for no gamma at
            all (`timm.create_model` drops a None and takes the default of the size: say False there).
        overlap: patches overlap, as PoolFormer's do; the authors' do not.
        global_pool: "avg", or "" to hand out the tokens (only without a classifier).

    Raises:
        ValueError: for unequal lengths, an image too small for the stages, and in `forward` for another image size.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 10, 3),
        dims: Sequence[int] = (64, 128, 256, 512),
        image_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init: float | None = 1e-3,
        overlap: bool = False,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} need one entry per stage each")
        self.image_size = pair(image_size)
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, dims[-1], dims[-1]
        grids = [cut(self.image_size, 4, overlap)]
        while len(grids) < len(depths):
            grids.append(cut(grids[-1], 2, overlap))
        if min(map(min, grids)) < 1:
            raise ValueError(
                f"image_size {self.image_size} is too small for {len(depths)} stages, which divide it by "
                f"{4 * 2 ** (len(depths) - 1)}; use a larger image or fewer stages"
            )
        self.overlap = overlap
        self.stem = Patches(in_chans, dims[0], 4, overlap)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, grids[0][0] * grids[0][1], dims[0]), std=0.02))
        rates = [drop_path_rate * k / max(sum(depths) - 1, 1) for k in range(sum(depths))]
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            grid, first = grids[i], sum(depths[:i])
            downsample = Patches(dims[i - 1], dim, 2, overlap, grids[i - 1]) if i else nn.Identity()
            blocks = [
                Block(dim, int(dim * mlp_ratio), grid, rate, layer_scale_init) for rate in rates[first : first + depth]
            ]
            stages.append(Stage(downsample, blocks, grid))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def _embed(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(
                f"this GFNetH was built for images of {self.image_size} pixels (H, W), but was given "
                f"{tuple(x.shape[-2:])}; resize the images, or build it with that image_size and resize_state_dict"
            )
        return self.stem(x) + self.pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to normed tokens (B, N, dims[-1])."""
        return self.norm(self.stages(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (B, N, C) to logits (B, num_classes), or to pooled features (B, C) with `pre_logits`."""
        x = self.drop(x.mean(1) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and before them the normed last tokens (B, N, C) unless `intermediates_only`.

        Arguments as in `MetaFormer.forward_intermediates`; `output_fmt` is "NCHW" (B, C, h, w) or "NLC" (B, h*w, C).
        """
        expect("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(len(self.stages), indices)
        x, outputs = self._embed(x), []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            is_final = i == len(self.feature_info) - 1
            if i in take:
                tokens = self.norm(x) if norm and is_final else x
                outputs.append(tokens if output_fmt == "NLC" else tokens.transpose(1, 2).unflatten(2, stage.grid))
        if intermediates_only:
            return outputs
        return (self.norm(x) if is_final else x), outputs

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers leave without weight decay."""
        return {"pos_embed"}


def pair(image_size: int | Sequence[int]) -> Grid:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return int(height), int(width)


SIZES = {
    "ti": Size((3, 3, 10, 3), (64, 128, 256, 512), 1e-3, crop_pct=0.875),
    "s": Size((3, 3, 10, 3), (96, 192, 384, 768), 1e-5, crop_pct=0.875),
    "b": Size((3, 3, 27, 3), (96, 192, 384, 768), 1e-6, crop_pct=0.875),
    "nano": Size((2, 2), (48, 96), 0.1, image_size=28, crop_pct=1.0),
    "micro": Size((2, 2, 6, 2), (32, 64, 160, 256), 0.1, image_size=64, crop_pct=1.0),
}


def _entry(name: str, size: Size) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        refuse_pretrained(name, pretrained and not kwargs.get("pretrained_cfg"))  # a folder or hub page has weights
        image_size = pair(kwargs.pop("img_size", None) or kwargs.pop("image_size", size.image_size))
        overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
        overlay = {"input_size": (kwargs.get("in_chans", 3), *image_size)} | overlay
        arch: dict[str, Any] = {"depths": size.depths, "dims": size.dims, "layer_scale_init": size.layer_scale_init}
        return build_model_with_cfg(
            GFNetH,
            name,
            pretrained,
            image_size=image_size,
            pretrained_cfg_overlay=overlay,
            kwargs_filter=("img_size",),
            feature_cfg={"out_indices": tuple(range(len(size.depths))), "feature_cls": "getter"},
            **(arch | kwargs),
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"GFNetH({size.depths}, {size.dims}, {size.image_size}) for timm.create_model."
    return build


default_cfgs = generate_default_cfgs(
    {f"gfnet_h_{key}": model_cfg(size, fixed_input_size=True) for key, size in SIZES.items()}
)
for _key, _size in SIZES.items():
    globals()[f"gfnet_h_{_key}"] = register_model(_entry(f"gfnet_h_{_key}", _size))
