"""Losses over several levels of a network: lists of maps, shallow to deep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import same_grid
from .base import Loss, check_alike, check_lists, full_precision
from .learned import Learned, run


class FSP(Loss):
    r"""``(F_s − F_t)²`` of the flows between consecutive levels, mean over entries and samples, sum over flows.

    The flow from level ``k`` to ``k + 1`` is ``F = f_kᵀ f_{k+1} / (H · W)``, a ``C_k × C_{k+1}`` matrix a sample; where
    the two grids differ, the larger map is averaged down. The paper sums over the entries of the matrix; the published
    implementations, and this one, take their mean.

    Shapes: lists of at least two maps ``(B, C_k, H_k, W_k)``, shallow to deep, with the student's channels equal to the
    teacher's. Floor: 0. No labels.

    Raises:
        ValueError: not lists of one length, fewer than two levels, or other channels.

    Yim et al., A Gift from Knowledge Distillation, CVPR 2017, eq. 1-2 (no arXiv version).

    >>> levels = [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4, 4)]
    >>> FSP()(levels, levels).item()
    0.0
    """

    view = "map"
    lists = True

    @full_precision
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        check_lists(self, student, teacher, least=2)
        for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if s.ndim != 4 or t.ndim != 4 or s.shape[:2] != t.shape[:2]:
                raise ValueError(
                    f"FSP takes maps (B, C, H, W) of one B and C at each level; at level {level} the student is "
                    f"{tuple(s.shape)}, the teacher {tuple(t.shape)}"
                )
        flows = zip(_flows(student), _flows(teacher), strict=True)
        return torch.stack([F.mse_loss(s, t) for s, t in flows]).sum()


class HierarchicalContext(Loss):
    r"""``Σ (MSE(f) + Σ_i 2⁻ⁱ MSE(pool_i f)) / (1 + Σ_i 2⁻ⁱ)`` over levels: maps, and their averages on small grids.

    The grids are those of 4×4, 2×2 and 1×1, in this order, that are below the map's height (as published, the height
    alone decides); MSE is a mean over all elements. HCL, for short.

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
        for s, t in zip(map(_as_map, student), map(_as_map, teacher), strict=True):
            check_alike(self, s, t, "B C H W")
            grids = [size for size in (4, 2, 1) if size < s.shape[2]]
            value, total = F.mse_loss(s, t), 1.0
            for i, size in enumerate(grids, start=1):
                gap = F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
                value, total = value + gap / 2**i, total + 1 / 2**i
            values.append(value / total)
        return torch.stack(values).sum()


class ReviewKD(Learned):
    r"""``HierarchicalContext`` between the teacher's levels and the student's, fused from deep to shallow.

    At each level, from the deepest: ``x = bn(conv1×1(s))``; but for the deepest, the carry from below is resized to it
    (nearest) and mixed in, ``x ← g₁ x + g₂ carry`` with ``(g₁, g₂) = σ(conv1×1([x, carry]))``; ``x``, resized to the
    teacher's grid, is the next carry, and ``bn(conv3×3(x))`` is compared with the teacher's level.

    Shapes: lists, shallow to deep, of student maps ``(B, C_k, H, W)`` and teacher maps ``(B, C'_k, H', W')``, where a
    deepest pair of vectors ``(B, C)`` counts as 1×1 maps. Learns the fusion; its batch norms use the batch's statistics
    while training. Floor: 0. No labels. The published training warms the weight up over 20 epochs.

    Args:
        student_channels, teacher_channels: one number a level; left out, ``fit`` finds them.
        hidden: channels of the carry; by default the student's deepest, at most 512.

    Raises:
        ValueError: not lists of one length; called before its sizes are known.

    Chen et al., Distilling Knowledge via Knowledge Review, 2021, eq. 6 and figure 3. arXiv:2104.09044

    >>> student = [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 4, 4)]
    >>> teacher = [torch.rand(2, 6, 8, 8), torch.rand(2, 8, 4, 4)]
    >>> loss = ReviewKD()
    >>> loss.fit(student, teacher)
    >>> loss(student, teacher).shape
    torch.Size([])
    """

    view = "map"
    lists = True

    def __init__(
        self,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.compare = HierarchicalContext()
        self.size(student_channels, teacher_channels)

    def measure(self, student: Any, teacher: Any) -> tuple[Any, ...]:
        check_lists(self, student, teacher)
        return tuple(s.shape[1] for s in student), tuple(t.shape[1] for t in teacher)

    def build(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        hidden = self.hidden or min(512, student_channels[-1])
        deepest = len(student_channels) - 1
        self.fusions = nn.ModuleList(
            _Fusion(c_s, hidden, c_t, carries=k < deepest)
            for k, (c_s, c_t) in enumerate(zip(student_channels, teacher_channels, strict=True))
        )

    @full_precision
    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        check_lists(self, student, teacher)
        self.require_fit()
        student, teacher = [_as_map(s) for s in student], [_as_map(t) for t in teacher]
        fused: list[Tensor] = []
        carry: Tensor | None = None
        for fusion, s, t in reversed(list(zip(self.fusions, student, teacher, strict=True))):
            x, carry = fusion(s, carry, t.shape[-2:])
            fused.insert(0, x)
        return self.compare(fused, teacher)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, hidden={self.hidden}"


class _Fusion(nn.Module):
    """One level of the review: projects, mixes the carry in, and gives what is compared and the next carry."""

    def __init__(self, c_s: int, hidden: int, c_t: int, carries: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(c_s, hidden, 1, bias=False), nn.BatchNorm2d(hidden))
        self.gate = nn.Conv2d(2 * hidden, 2, 1) if carries else None
        self.leave = nn.Sequential(nn.Conv2d(hidden, c_t, 3, padding=1, bias=False), nn.BatchNorm2d(c_t))

    def forward(self, x: Tensor, carry: Tensor | None, grid: torch.Size) -> tuple[Tensor, Tensor]:
        x = run(self.enter, x)
        if self.gate is not None and carry is not None:
            carry = F.interpolate(carry, x.shape[-2:], mode="nearest")
            gates = run(self.gate, torch.cat([x, carry], dim=1)).sigmoid()
            x = gates[:, :1] * x + gates[:, 1:] * carry
        x = F.interpolate(x, grid, mode="nearest")
        return run(self.leave, x), x


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.ndim == 2 else x


def _flows(levels: Sequence[Tensor]) -> list[Tensor]:
    flows = []
    for shallow, deep in pairwise(levels):
        a, b = (x.flatten(2) for x in same_grid(shallow, deep))
        flows.append(a @ b.mT / a.shape[-1])
    return flows
