"""Losses over several levels of a network: lists of maps, shallow to deep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .algebra import same_grid
from .base import Loss, full_precision
from .checks import check_alike, check_choice, check_lists


class FSP(Loss):
    r"""``(F_s − F_t)²`` of the flows between consecutive levels, mean over entries and samples, sum over flows.

    The flow from level ``k`` to ``k + 1`` is ``F = f_kᵀ f_{k+1} / (H · W)``, a ``C_k × C_{k+1}`` matrix a sample; where
    the two grids differ, the larger map is averaged down (other code takes the maximum). ``variant="code"``: the
    published implementations take the mean over the entries of the matrix; ``variant="paper"``: the paper takes their
    sum.

    Shapes: lists of at least two maps ``(B, C_k, H_k, W_k)``, shallow to deep, with the student's channels equal to the
    teacher's. Floor: 0. No labels.

    Args:
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: not lists of one length, fewer than two levels, or other channels.

    Yim et al., A Gift from Knowledge Distillation, CVPR 2017, eq. 1-2 (no arXiv version).

    >>> levels = [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4, 4)]
    >>> FSP()(levels, levels).item()
    0.0
    """

    view = "map"
    lists = True

    def __init__(self, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        check_choice(self, variant=(variant, ("code", "paper")))
        self.variant = variant

    @full_precision
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        check_lists(self, student, teacher, least=2)
        for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.ndim != 4 or t.ndim != 4 or s.shape[:2] != t.shape[:2]:
                raise ValueError(
                    f"FSP takes maps (B, C, H, W) of one B and C at each level; at level {level} the student is "
                    f"{tuple(s.shape)}, the teacher {tuple(t.shape)}"
                )
        gaps = [(s - t).square() for s, t in zip(_flows(student), _flows(teacher), strict=True)]
        return torch.stack([(gap if self.variant == "code" else gap.sum((1, 2))).mean() for gap in gaps]).sum()

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"


class HierarchicalContext(Loss):
    r"""``Σ (MSE(f) + Σ_i 2⁻ⁱ MSE(pool_i f)) / (1 + Σ_i 2⁻ⁱ)`` over levels: maps, and their averages on small grids.

    The grids are those of 4×4, 2×2 and 1×1, in this order, that are below the map's height (as published, the height
    alone decides); MSE is a mean over all elements. HCL, for short. The paper tells in words to compare pooled maps and
    gives no formula, so that there is no variant: grids, weights and means are the authors' code's.

    Shapes: lists of maps ``(B, C_k, H_k, W_k)`` of one shape at each level; vectors ``(B, C)`` count as 1×1 maps.
    Floor: 0. No labels.

    Raises:
        ValueError: not lists of one length, or the shapes of a level differ.

    Chen et al., Distilling Knowledge via Knowledge Review, 2021, section 3.3. arXiv:2104.09044

    >>> levels = [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4, 4)]
    >>> HierarchicalContext()(levels, levels).item()
    0.0
    """

    view = "map"
    lists = True

    @full_precision
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        check_lists(self, student, teacher)
        values = []
        for s, t in zip(map(as_map, student), map(as_map, teacher), strict=True):
            check_alike(self, s, t, "B C H W")
            grids = [size for size in (4, 2, 1) if size < s.shape[2]]
            value, total = F.mse_loss(s, t), 1.0
            for i, size in enumerate(grids, start=1):
                gap = F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
                value, total = value + gap / 2**i, total + 1 / 2**i
            values.append(value / total)
        return torch.stack(values).sum()


def as_map(x: Tensor) -> Tensor:
    """A vector ``(B, C)`` as a 1×1 map."""
    return x[:, :, None, None] if x.ndim == 2 else x


def _flows(levels: Sequence[Tensor]) -> list[Tensor]:
    flows = []
    for shallow, deep in pairwise(levels):
        a, b = (x.flatten(2) for x in same_grid(shallow, deep))
        flows.append(a @ b.mT / a.shape[-1])
    return flows
