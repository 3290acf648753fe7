"""Views of a feature, and the trained modules that bring a student feature to the teacher's shape.

A layout names a tensor's axes: ``NC`` (logits, embeddings), ``NLC`` (tokens; ``NLC+1`` has one class or register token
in front, ``NLC+5`` five), ``NCHW`` and ``NHWC`` (maps). A view is how a loss reads it: tokens ``(B, N, C)`` row by row,
map ``(B, C, H, W)``, embedding ``(B, C)`` (mean over space), logits ``(B, K)``, or raw (untouched).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Size, Tensor, nn, tensor

LAYOUT = re.compile(r"NC|NCHW|NHWC|NLC(\+\d+)?")
PREFIXES = (0, 1, 2, 4, 5, 8, 16)
"""Numbers of class, distillation and register tokens that are looked for in front of a grid of patches."""


def find_layout(shape: Size, images: Size, prefix: int | None = None) -> str:
    """The layout that a tensor of ``shape`` has, given the shape ``(B, 3, H, W)`` of the images that it came from.

    Of inputs that are no images only ``NC`` is told: in which axis a sequence runs, shapes do not show.

    Args:
        prefix: the number of tokens in front of the patches where the model tells it (timm's ``num_prefix_tokens``).

    Raises:
        ValueError: no layout fits, or more than one does; the message asks for ``layout=``.
    """
    fits = fitting_layouts(shape, images, prefix)
    if len(fits) == 1:
        return fits[0]
    if len(images) != 4:
        what = f"inputs {tuple(images)}, which are no images, cannot be told"
    elif len(shape) == 3 and _sequence_first(shape, images):
        what = f"{images[0]} images cannot be told: not its first axis is theirs, but its second"
    else:
        found = f"it could be {' or '.join(fits)}" if fits else "none of NC, NLC, NLC+k, NCHW, NHWC fits"
        what = f"images of {images[-2]}×{images[-1]} cannot be told: {found}"
    raise ValueError(
        f'the layout of a tensor {tuple(shape)} from {what}; say layout="…" on the term (NLC: batch, sequence, '
        'channels), or view="raw" to leave it untouched'
    )


def fitting_layouts(shape: Size, images: Size, prefix: int | None = None) -> list[str]:
    """All that ``find_layout`` would choose from; empty where nothing fits."""
    if len(shape) == 2:
        return ["NC"]
    if len(images) == 4 and len(shape) == 4:
        return [n for n, hw in (("NCHW", shape[2:]), ("NHWC", shape[1:3])) if _keeps_aspect(hw[0], hw[1], images)]
    if len(images) == 4 and len(shape) == 3 and not _sequence_first(shape, images):
        fits = [f"NLC+{p}" if p else "NLC" for p in PREFIXES if p < shape[1] and _grid(shape[1] - p, images)]
        likely = (f"NLC+{prefix}" if prefix else "NLC", "NLC+1")  # as told, or no prefix, or a class token alone
        return next(([layout] for layout in likely if layout in fits), fits)
    return []


def _sequence_first(shape: Size, images: Size) -> bool:
    """Whether the images stand in the second axis, and not in the first; windows and crops of them, which are more,
    stand in the first."""
    return shape[0] != images[0] and shape[1] == images[0]


def _keeps_aspect(height: int, width: int, images: Size) -> bool:
    """Whether a grid has the images' aspect ratio, up to the rounding of strides."""
    tall, wide = images[-2:]
    return abs(height * wide - width * tall) < max(tall, wide)


def _grid(tokens: int, images: Size) -> tuple[int, int] | None:
    """The (height, width) of ``tokens`` patches of an image, or None where they make no grid of its shape."""
    fits = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0 and _keeps_aspect(h, tokens // h, images)]
    return min(fits, key=lambda grid: abs(grid[0] * images[-1] - grid[1] * images[-2]), default=None)


def view_as(x: Tensor, view: str, layout: str, images: Size) -> Tensor:
    """A tensor of ``layout`` as ``view``; ``images`` is the shape of the images, for tokens that become a map.

    Raises:
        ValueError: an unknown layout, or a view that the layout cannot give.
    """
    if view == "raw":
        return x
    if not LAYOUT.fullmatch(layout):
        raise ValueError(f"no layout {layout!r}; known: NC, NLC, NLC+k (k tokens in front), NCHW, NHWC")
    if layout == "NC" and view in ("logits", "embedding"):
        return x
    if layout == "NC" or view == "logits":
        dense = " (of logits at each position: docs/howto/sequences.md)" if view == "logits" else ""
        raise ValueError(
            f"a tensor {tuple(x.shape)} of layout {layout} cannot be read as {view}; choose another view or tap{dense}"
        )
    if layout.startswith("NLC"):
        x = x[:, int(layout[4:] or 0) :]
        if view == "map":
            grid = _grid(x.shape[1], images)
            if grid is None:
                raise ValueError(
                    f"{x.shape[1]} tokens make no grid for images of {images[-2]}×{images[-1]}; use view='tokens'"
                )
            return rearrange(x, "b (h w) c -> b c h w", h=grid[0])
        return x if view == "tokens" else reduce(x, "b n c -> b c", "mean")
    axes = "b c h w" if layout == "NCHW" else "b h w c"
    if view == "embedding":
        return reduce(x, f"{axes} -> b c", "mean")
    return rearrange(_keeping_order(x), f"{axes} -> b (h w) c" if view == "tokens" else f"{axes} -> b c h w")


class _KeepOrder(torch.autograd.Function):
    """The same tensor, whose gradient is laid out in memory as itself is.

    A loss gives its gradient in the order of the view that it read. Where that is another order than the feature's,
    every kernel of the backward pass from there to the image would walk two layouts at once; here it is put in order
    by one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.order = sorted(range(inputs[0].ndim), key=inputs[0].stride, reverse=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        back = [ctx.order.index(axis) for axis in range(gradient.ndim)]
        return gradient.permute(ctx.order).contiguous().permute(back)


_KeepOrder.forward.__signature__ = inspect.signature(_KeepOrder.forward)  # type: ignore[attr-defined]  # as in kl


def _keeping_order(x: Tensor) -> Tensor:
    """``x`` itself where nothing flows back; a compiler chooses layouts on its own."""
    return x if torch.compiler.is_compiling() or not x.requires_grad else _KeepOrder.apply(x)


def _resized(x: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Maps or images ``(B, C, H, W)`` on another grid, antialiased, in their precision."""
    full = x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32))  # CPUs have no kernel for halves
    made = F.interpolate(full, size, mode=mode, align_corners=False, antialias=True)
    return made.to(x.dtype) if x.is_floating_point() else made


class Project(nn.Module):
    """A trained linear map over channels, after the grid was resized where it differs.

    Reads embeddings ``(B, C)``, tokens ``(B, N, C)`` or maps ``(B, C, H, W)`` and returns the same view with
    ``c_out`` channels and, for maps, the grid ``size``. Tokens that need another grid come as a map (``adapt``): of
    themselves they do not show which grid they had. Without bias: the loss sees features whose mean the student can
    move itself.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        grid: tuple[int, int] | None = None,
        size: tuple[int, int] | None = None,
        images: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(c_in, c_out, bias=False)
        self.grid, self.size, self.images = grid, size, images

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.linear(self._resize(x).movedim(1, -1)).movedim(-1, 1)
        return self.linear(x)

    def _resize(self, x: Tensor) -> Tensor:
        if self.size is None or tuple(x.shape[-2:]) == self.size:
            return x
        return _resized(x, self.size, "bilinear")

    def extra_repr(self) -> str:
        return f"grid={self.grid} -> {self.size}" if self.grid != self.size else ""


def adapt(adapter: nn.Module, x: Tensor, view: str, layout: str, images: Size) -> Tensor:
    """A student's tensor of ``layout`` as ``view``, brought to the teacher's shape by ``adapter``.

    Raises:
        ValueError: as ``view_as``; images of another aspect ratio than those that a resizing adapter was sized for.
    """
    if isinstance(adapter, Project) and adapter.images is not None and adapter.grid != adapter.size:
        (tall, wide), (height, width) = adapter.images, images[-2:]
        if abs(height * wide - width * tall) > 0.1 * height * wide:
            raise ValueError(
                f"the adapter was sized for images of {tall}×{wide}, these are {height}×{width}: the teacher's grid "
                "would turn with them; give all images one aspect ratio"
            )
        if view == "tokens":
            return rearrange(adapter(view_as(x, "map", layout, images)), "b c h w -> b (h w) c")
    brought: Tensor = adapter(view_as(x, view, layout, images))
    return brought


Adapter = str | Callable[[Size, Size], nn.Module]
"""``"linear"``, or a function from the two shapes (student's, teacher's, in the term's view) to a module."""


def build_adapter(kind: Adapter, view: str, student: Size, teacher: Size, images: Size) -> nn.Module:
    """The module that brings features of shape ``student`` to ``teacher``, both as ``view``.

    Raises:
        ValueError: an unknown kind, or a view that it cannot adapt.
    """
    if not isinstance(kind, str):
        return kind(student, teacher)
    if kind != "linear":
        raise ValueError(
            f"no adapter {kind!r}; known: 'linear', or a function (student shape, teacher shape) -> module"
        )
    side = _pair(images[-2:]) if len(images) == 4 else None
    if view == "map":
        return Project(student[1], teacher[1], _pair(student[2:]), _pair(teacher[2:]), side)
    if view == "tokens":
        ours, theirs = (_grid(shape[1], images) if side else None for shape in (student, teacher))
        if ours is None or theirs is None:  # the loss may do with two numbers of tokens
            return Project(student[2], teacher[2])
        return Project(student[2], teacher[2], ours, theirs, side)
    if view in ("embedding", "logits"):
        return Project(student[1], teacher[1])
    raise ValueError(f"adapter='linear' needs view='tokens', 'map' or 'embedding', got {view!r}")


def _pair(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], shape[1]


class Renormalize(nn.Module):
    """Turns the student's input into the teacher's: other mean and standard deviation, other resolution.

    Images ``(B, C, H, W)``, normalised with ``mean``, ``std``, come out normalised with the teacher's, resized to
    ``size`` (height, width) if given, in the precision in which they came. Everything is decided here, once; nothing is
    compared per step.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        ours, theirs = _stats(mean, std), _stats(teacher_mean, teacher_std)
        self.register_buffer("scale", ours[1] / theirs[1], persistent=False)
        self.register_buffer("shift", (ours[0] - theirs[0]) / theirs[1], persistent=False)
        self.size = size
        self.anew = (tuple(mean), tuple(std)) != (tuple(teacher_mean), tuple(teacher_std))

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = _resized(images, self.size, "bicubic")
        normalised = images * self.scale + self.shift
        return normalised.to(images.dtype) if images.is_floating_point() else normalised


def _stats(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    return tensor(list(mean)).view(-1, 1, 1), tensor(list(std)).view(-1, 1, 1)
