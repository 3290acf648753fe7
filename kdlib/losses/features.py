"""Losses between features, element by element or vector by vector."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from .algebra import channel_axis, cosine_gap, half_mean_square, may_be_kept, mean_square, pooled, unit
from .base import HALF, Loss, full_precision
from .checks import check_alike, check_choice


class FeatureMSE(Loss):
    """``(student − teacher)²``, mean over all elements.

    Shapes: student and teacher of one shape, read as tokens ``(B, N, C)`` unless the term says otherwise.
    Floor: 0. No labels. This is the imitation term of RIFormer, on block outputs and on token mixers alike. FitNets
    writes half the squared norm, its sum over elements. Of a half-precision student the difference, taken in float32,
    is kept for the backward pass in the student's precision.

    Args:
        normalize: what is done to both sides first. ``"l2"``: each position's channels to unit length; ``"layer"``:
            each position's channels to mean 0 and variance 1; ``"batch"``: each channel to mean 0 and variance 1 over
            the batch and all positions, as a batch norm without parameters does it. Both divide by
            ``√(variance + 1e-5)``, so that features whose variance is near 1e-5 stay smaller. Channels are axis 1 of a
            map ``(B, C, H, W)``, else the last axis.

    Raises:
        ValueError: the shapes differ, or normalize is none of these.

    Romero et al., FitNets, 2015, eq. 3. arXiv:1412.6550. Wang et al., RIFormer, 2023, eq. 6-7. arXiv:2304.05659

    >>> FeatureMSE()(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)).item()
    1.0
    """

    view = "tokens"

    def __init__(self, normalize: Literal["l2", "layer", "batch"] | None = None) -> None:
        super().__init__()
        check_choice(self, normalize=(normalize, (None, "l2", "layer", "batch")))
        self.normalize = normalize

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        half = student.dtype in HALF and student.numel() > 0
        if half and self.normalize is None and may_be_kept(teacher):
            check_alike(self, student, teacher, "any")
            return half_mean_square(student, teacher.detach())
        return self._plain(student, teacher)

    @full_precision
    def _plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "any")
        return mean_square(self._normalized(student), self._normalized(teacher))

    def _normalized(self, x: Tensor) -> Tensor:
        axis = channel_axis(x)
        if self.normalize == "l2":
            return unit(x, dim=axis)
        if self.normalize == "layer":
            return F.layer_norm(x.movedim(axis, -1), (x.shape[axis],))
        if self.normalize == "batch":
            x = x.movedim(axis, -1).flatten(0, -2)
            return (x - x.mean(0)) * (x.var(0, unbiased=False) + 1e-5).rsqrt()
        return x

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}"


class CosineDistance(Loss):
    """``1 − cos(student, teacher)`` of the channels at each position, mean over batch and positions.

    Shapes: student and teacher of one shape, read as tokens ``(B, N, C)`` unless the term says otherwise; channels are
    axis 1 of a map, else the last axis. Floor: 0, where every student vector is the teacher's times a positive number.
    No labels. A zero vector has cosine 0 with everything.
    Computed as ``|u − v|² / 2`` of unit vectors, which keeps its digits as the two come close.

    Raises:
        ValueError: the shapes differ.

    The feature term of many recipes, e.g. Chen and He, SimSiam, 2021, eq. 1 (there without the 1). arXiv:2011.10566

    >>> tokens = torch.ones(2, 3, 4)
    >>> CosineDistance()(tokens, -2 * tokens).item()
    2.0
    """

    view = "tokens"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "any")
        return cosine_gap(student, teacher, channel_axis(student)).mean()


class ChannelMean(Loss):
    """``(mean s − mean t)²`` of each channel's mean over positions, mean over samples and channels.

    The statistics term of SRRL; the whole method is ``SRRL``.

    Shapes: student and teacher maps ``(B, C, H, W)``; the grids may differ. Floor: 0. No labels.

    Raises:
        ValueError: not maps, or batch or channels differ.

    Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021 (no arXiv version).

    >>> ChannelMean()(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 5, 5)).item()
    1.0
    """

    view = "map"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim != 4 or teacher.ndim != 4:
            raise ValueError(
                f"ChannelMean takes maps (B, C, H, W), got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )
        student, teacher = pooled(student), pooled(teacher)
        check_alike(self, student, teacher, "B C")
        return F.mse_loss(student, teacher)
