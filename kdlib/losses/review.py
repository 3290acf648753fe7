"""ReviewKD: the student's levels, fused from deep to shallow, against the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import full_precision
from .checks import check_lists
from .learned import Learned, run
from .levels import HierarchicalContext, as_map


class ReviewKD(Learned):
    r"""``HierarchicalContext`` between the teacher's levels and the student's, fused from deep to shallow.

    At each level, from the deepest: ``x = bn(conv1×1(s))``; but for the deepest, the carry from below is resized to it
    (nearest) and mixed in, ``x ← g₁ x + g₂ carry`` with ``(g₁, g₂) = σ(conv1×1([x, carry]))``; ``x``, resized to the
    teacher's grid, is the next carry, and ``bn(conv3×3(x))`` is compared with the teacher's level; each level counts by
    its mean over elements, and levels are summed.

    Shapes: lists, shallow to deep, of student maps ``(B, C_k, H, W)`` and teacher maps ``(B, C'_k, H', W')``, where a
    deepest pair of vectors ``(B, C)`` counts as 1×1 maps. Learns the fusion; its batch norms use the batch's statistics
    while training. Floor: 0. No labels. The published training warms the weight up over 20 epochs.

    Args:
        student_channels, teacher_channels: one number a level; left out, ``fit`` finds them.
        hidden: channels of the carry; by default the student's deepest, at most 512.

    Raises:
        ValueError: not lists of one length; called before its sizes are known.

    Chen et al., Distilling Knowledge via Knowledge Review, 2021, section 3. arXiv:2104.09044

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
        student, teacher = [as_map(s) for s in student], [as_map(t) for t in teacher]
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
