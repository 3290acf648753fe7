"""Losses between feature maps ``(B, C, H, W)``, through distributions, standardised responses or an MMD."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .algebra import gram_gap, kl, over, same_grid, unit
from .base import Loss, full_precision
from .checks import check_alike, check_maps, check_positive


class ChannelWise(Loss):
    r"""``T² · KL(softmax(teacher / T) ‖ softmax(student / T))`` over the positions of each channel (CWD).

    Sum over positions, mean over channels and samples.

    Shapes: student and teacher maps ``(B, C, H, W)`` of one shape. Floor: 0, where every channel's distributions over
    positions are equal. No labels. A constant channel is the uniform distribution.

    Args:
        temperature: ``T > 0``.

    Raises:
        ValueError: the temperature is not positive; the shapes differ.

    Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, 2021, section 3. arXiv:2011.13256

    >>> features = torch.rand(2, 3, 4, 4)
    >>> ChannelWise(temperature=4.0)(features, features).item()
    0.0
    """

    view = "map"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.temperature = temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B C H W")
        log_q = over(student.flatten(2), self.temperature).log_softmax(dim=-1)
        log_p = over(teacher.flatten(2), self.temperature).log_softmax(dim=-1)
        return kl(log_q, log_p).mean() * self.temperature**2

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class PKD(Loss):
    r"""``½ · (n(student) − n(teacher))²``, mean over elements, where ``n`` standardises each channel over the batch.

    ``n(f) = (f − mean) / (std + 1e-6)`` over samples and positions, with the unbiased ``std``. It is one minus
    Pearson's correlation of the channel, but for ``N − 1`` and the ``1e-6``.

    Shapes: student and teacher maps of one ``(B, C)``; of two grids the student's is resized to the teacher's
    (bilinear, corners not aligned). Floor: 0. No labels. A constant channel is standardised to 0.

    Raises:
        ValueError: not maps of one batch and channels; a single value a channel (batch 1 on a 1×1 grid).

    Cao et al., PKD, 2022, section 3. arXiv:2207.02039

    >>> features = torch.rand(2, 3, 4, 4)
    >>> PKD()(3 * features + 1, features).item() < 1e-9
    True
    """

    view = "map"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher, channels=True)
        if student.shape[-2:] != teacher.shape[-2:]:
            student = F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)
        if student[:, 0].numel() < 2:
            raise ValueError("PKD standardises over batch and positions: it needs two values a channel, got one")
        return F.mse_loss(_standardize(student), _standardize(teacher)) / 2


class NST(Loss):
    r"""Squared MMD of the channels' maps: ``mean k(s, s) + mean k(t, t) − 2 · mean k(s, t)``, ``k(a, b) = (a·b)²``.

    Every channel's map is flattened and scaled to unit length; ``k`` is the mean over all pairs of channels of one
    sample, and over samples. The constant ``k(t, t)`` stays in the value, so the floor is 0. With ``S`` the ``(HW, C)``
    matrix of channels over ``√C`` it is ``‖SSᵀ − TTᵀ‖²``, and is computed so, in ``HW × HW`` or ``C × C`` products.

    Shapes: student map ``(B, C, H, W)``, teacher map ``(B, C', H', W')``; of two grids the larger is averaged down.
    Floor: 0. No labels. An all-zero channel counts as zero.

    Raises:
        ValueError: not maps of one batch.

    Huang and Wang, Like What You Like, 2017, section 4 (its polynomial kernel with d = 2, c = 0). arXiv:1707.01219

    >>> features = torch.rand(2, 3, 4, 4)
    >>> NST()(features, 5 * features).item() < 1e-9
    True
    """

    view = "map"

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        student, teacher = same_grid(student, teacher)
        s = unit(student.flatten(2)).mT / student.shape[1] ** 0.5
        t = unit(teacher.flatten(2)).mT / teacher.shape[1] ** 0.5
        return gram_gap(s, t) / len(s)


def _standardize(x: Tensor) -> Tensor:
    """Each channel of a map to mean 0 and unbiased variance 1 over samples and positions."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    return centred / (x.std((0, 2, 3), keepdim=True) + 1e-6)
