"""Losses between similarity matrices: of an image's channels, or of a batch's samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .algebra import same_grid, unit
from .base import Loss, full_precision
from .checks import check_choice, check_maps


class ICKD(Loss):
    r"""``‖N_s − N_t‖² / (C · B)``: how alike the channels of each image are, rows of their Gram matrix at unit length.

    ``N`` is a sample's ``C × C`` matrix of inner products of channels over positions, each row scaled to unit length.
    ``variant="cifar"`` divides the sum over the batch by ``C · B``; the authors' ImageNet code divides by ``B`` once
    more, which ``variant="imagenet"`` does. The published 1×1 convolution on the student is an adapter of the term.

    With fewer positions than channels the matrices are never made: with ``F`` the ``(C, HW)`` map, ``a_i`` its row over
    the length of ``f_i Fᵀ``, ``e = a_s − a_t`` and ``E = F_s − F_t``, row ``i`` of the difference is
    ``e_i F_sᵀ + a_t,i Eᵀ``, whose square needs ``HW × HW`` products only and vanishes without cancelling.

    Shapes: student and teacher maps of one ``(B, C)``; of two grids the larger is averaged down. Floor: 0. No labels.
    An all-zero channel has a zero row.

    Args:
        variant: ``"cifar"`` or ``"imagenet"``.

    Raises:
        ValueError: not maps of one batch and channels, or another variant.

    Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, 2021, section 3.
    arXiv:2202.03680

    >>> features = torch.rand(2, 3, 4, 4)
    >>> ICKD()(features, 5 * features).item() < 1e-9
    True
    """

    view = "map"

    def __init__(self, variant: Literal["cifar", "imagenet"] = "cifar") -> None:
        super().__init__()
        check_choice(self, variant=(variant, ("cifar", "imagenet")))
        self.variant = variant

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher, channels=True)
        s, t = (x.flatten(2) for x in same_grid(student, teacher))
        batch, channels, positions = s.shape
        if positions < channels:
            s, t = unit(s, dim=(1, 2)), unit(t, dim=(1, 2))
            a_s, a_t = _over_row_length(s), _over_row_length(t)
            e, gap = a_s - a_t, s - t
            total = (
                ((e @ (s.mT @ s)) * e).sum()
                + 2 * ((e @ (s.mT @ gap)) * a_t).sum()
                + ((a_t @ (gap.mT @ gap)) * a_t).sum()
            )
        else:
            total = (unit(s @ s.mT) - unit(t @ t.mT)).square().sum()
        return total / (channels * batch * (batch if self.variant == "imagenet" else 1))

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}"


class SimilarityPreserving(Loss):
    r"""``‖G_s − G_t‖² / B²``: how alike each two samples of the batch are, rows of their Gram matrix at unit length.

    ``G`` is the ``B × B`` matrix of inner products of the flattened samples, each row scaled to unit length in L2, as
    in the paper.

    Shapes: student ``(B, …)``, teacher ``(B, …)`` of any shape after the batch. Floor: 0. No labels. An all-zero sample
    has a zero row.

    Raises:
        ValueError: the batches differ.

    Tung and Mori, Similarity-Preserving Knowledge Distillation, 2019, section 3. arXiv:1907.09682

    >>> features = torch.rand(2, 3, 4, 4)
    >>> SimilarityPreserving()(features, 5 * features).item() < 1e-9
    True
    """

    view = "raw"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if len(student) != len(teacher):
            raise ValueError(
                f"SimilarityPreserving takes one batch, got {len(student)} student and {len(teacher)} teacher samples"
            )
        s, t = student.flatten(1), teacher.flatten(1)
        return (unit(s @ s.mT) - unit(t @ t.mT)).square().mean()


def _over_row_length(x: Tensor) -> Tensor:
    """Rows of ``(B, C, N)`` divided by the length of their row in ``x xᵀ``; rows of length 0 stay as they are."""
    square = ((x @ (x.mT @ x)) * x).sum(-1, keepdim=True)
    return x * torch.where(square > 1e-24, square, 1.0).rsqrt()
