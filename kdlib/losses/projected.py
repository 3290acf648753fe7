"""Losses that learn what the student predicts of the teacher's map: MGD and VID."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import same_grid
from .base import full_precision
from .checks import check_choice, check_maps, check_positive
from .learned import Learned, run


class MGD(Learned):
    r"""``alpha / B · Σ (G(mask · A(student)) − teacher)²``: the teacher's map is generated from a masked student's.

    ``A`` is a 1×1 convolution where channels differ, ``G`` two 3×3 convolutions with a ReLU between. Sum over channels
    and positions, mean over samples. The published code masks whole channels for classification (``mask="channel"``,
    of each sample its own) and positions, as the paper has it, for detection (``mask="spatial"``).

    Shapes: student map ``(B, C, H, W)``, teacher map ``(B, C', H, W)``. Learns ``A`` and ``G``. Floor: 0, where the
    generated map is the teacher's. No labels. Draws a mask from torch's generator at each call; ``forward`` takes one
    as a third argument.

    Args:
        mask: ``"channel"`` or ``"spatial"``.
        ratio: share that is masked, in ``[0, 1)``; by default the published 0.15 for channels, 0.65 for positions.
        alpha: weight; by default the published 7e-5 for channels, 2e-5 for positions.
        student_channels, teacher_channels: left out, ``fit`` finds them.

    Raises:
        ValueError: an argument is out of range; not maps of one batch and grid; called before its sizes are known.

    Yang et al., Masked Generative Distillation, 2022, section 3. arXiv:2205.01529

    >>> loss = MGD(mask="channel", student_channels=3, teacher_channels=6)
    >>> loss(torch.rand(2, 3, 4, 4), torch.rand(2, 6, 4, 4)).shape
    torch.Size([])
    """

    view = "map"

    def __init__(
        self,
        mask: Literal["channel", "spatial"] = "channel",
        ratio: float | None = None,
        alpha: float | None = None,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, mask=(mask, ("channel", "spatial")))
        self.mask = mask
        self.ratio = ratio if ratio is not None else {"channel": 0.15, "spatial": 0.65}[mask]
        self.alpha = alpha if alpha is not None else {"channel": 7e-5, "spatial": 2e-5}[mask]
        check_positive(self, alpha=self.alpha)
        if not 0 <= self.ratio < 1:
            raise ValueError(f"MGD: ratio must be in [0, 1), got {self.ratio}")
        self.size(student_channels, teacher_channels)

    def build(self, c_s: int, c_t: int) -> None:
        self.align = nn.Conv2d(c_s, c_t, 1) if c_s != c_t else nn.Identity()
        self.generate = nn.Sequential(nn.Conv2d(c_t, c_t, 3, padding=1), nn.ReLU(), nn.Conv2d(c_t, c_t, 3, padding=1))

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        check_maps(self, student, teacher)
        self.require_fit()
        x = run(self.align, student)
        if mask is None:
            shape = (*x.shape[:2], 1, 1) if self.mask == "channel" else (len(x), 1, *x.shape[2:])
            mask = (torch.rand(shape, device=x.device) >= self.ratio).to(x.dtype)
        return self.alpha * F.mse_loss(run(self.generate, x * mask), teacher, reduction="sum") / len(x)

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, ratio={self.ratio}, alpha={self.alpha}, sizes={self.sizes}"


class VID(Learned):
    r"""``½ ((μ(student) − teacher)² / v + log v)``, mean over elements: a Gaussian around what the student predicts.

    ``μ`` is three 1×1 convolutions with ReLU between; ``v = softplus(ρ) + eps`` is learned, one variance for each of
    the teacher's channels. The constant ``log 2π`` is left out, and the paper sums over elements.

    Shapes: student map ``(B, C, H, W)``, teacher map ``(B, C', H', W')``; of two grids the larger is averaged down.
    Learns ``μ`` and ``ρ``. Floor: ``½ log eps``, where ``μ`` is the teacher's map and ``v`` is down to ``eps``; the
    value may be negative. No labels.

    Args:
        variance: ``v`` before training.
        eps: the smallest variance.
        student_channels, teacher_channels: left out, ``fit`` finds them.
        hidden: channels within ``μ``; by default the teacher's.

    Raises:
        ValueError: an argument is out of range; not maps of one batch; called before its sizes are known.

    Ahn et al., Variational Information Distillation, 2019. arXiv:1904.05835

    >>> loss = VID(student_channels=3, teacher_channels=6)
    >>> loss(torch.rand(2, 3, 4, 4), torch.rand(2, 6, 4, 4)).shape
    torch.Size([])
    """

    view = "map"
    floor = None

    def __init__(
        self,
        variance: float = 5.0,
        eps: float = 1e-5,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, eps=eps, variance=variance)
        if variance <= eps:
            raise ValueError(f"VID: variance must be above eps, got {variance} and {eps}")
        self.variance, self.eps, self.hidden = variance, eps, hidden
        self.size(student_channels, teacher_channels)

    def build(self, c_s: int, c_t: int) -> None:
        hidden = self.hidden or c_t
        self.mean = nn.Sequential(
            nn.Conv2d(c_s, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, c_t, 1, bias=False),
        )
        self.rho = nn.Parameter(torch.full((c_t,), math.log(math.expm1(self.variance - self.eps))))

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        self.require_fit()
        student, teacher = same_grid(student, teacher)
        v = (F.softplus(self.rho.to(student.dtype)) + self.eps)[:, None, None]
        return ((run(self.mean, student) - teacher).square() / v + v.log()).mean() / 2

    def extra_repr(self) -> str:
        return f"variance={self.variance}, eps={self.eps}, sizes={self.sizes}"
