"""Losses between features, element by element."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Loss, check_alike, full_precision


class FeatureMSE(Loss):
    """Squared difference, mean over all elements.

    Shapes: student and teacher of one shape, read as tokens ``(B, N, C)`` unless the term says otherwise.
    Floor: 0. No labels. This is the imitation term of RIFormer, on block outputs and on token mixers alike.

    Raises:
        ValueError: the shapes differ.

    Romero et al., FitNets, 2015, eq. 3. arXiv:1412.6550. Wang et al., RIFormer, 2023, eq. 6-7. arXiv:2304.05659

    >>> FeatureMSE()(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)).item()
    1.0
    """

    view = "tokens"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "any")
        return F.mse_loss(student, teacher)
