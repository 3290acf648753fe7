"""AttentionTransfer: where in an image a network looks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .algebra import same_grid, unit
from .base import Loss, full_precision
from .checks import check_choice, check_maps


class AttentionTransfer(Loss):
    r"""``(a_s − a_t)²`` of attention maps ``a = unit(Σ_c |f_c|^p)``: where in an image each of the two looks.

    The attention map is flattened, and at unit length. ``variant="code"`` is the
    authors' code: mean over samples and positions of ``(a_s − a_t)²``, with ``f^p`` without the absolute value, which
    differs for odd ``p`` only. ``variant="paper"``: mean over samples of ``‖a_s − a_t‖``, the paper's term without its
    factor ``β / 2`` and its sum over layers; it is some hundred times larger.
    Attention does not change with the map's scale, so each map is divided by its largest value before the power.

    Shapes: student map ``(B, C, H, W)``, teacher map ``(B, C', H', W')``; of two grids the larger is averaged down.
    Floor: 0. No labels. An all-zero map has attention 0 everywhere.

    Args:
        p: power, at least 1 (an integer for the code).
        variant: ``"code"`` or ``"paper"``.

    Raises:
        ValueError: an argument is out of range; not maps of one batch.

    Zagoruyko and Komodakis, Paying More Attention to Attention, 2017, eq. 2. arXiv:1612.03928

    >>> features = torch.rand(2, 3, 4, 4)
    >>> AttentionTransfer()(features, 5 * features).item() < 1e-12
    True
    """

    view = "map"

    def __init__(self, p: float = 2, variant: Literal["code", "paper"] = "code") -> None:
        super().__init__()
        check_choice(self, variant=(variant, ("code", "paper")))
        if p < 1 or (variant == "code" and p != int(p)):
            raise ValueError(f"AttentionTransfer: p must be at least 1, and an integer for variant='code', got {p}")
        self.p, self.variant = p, variant

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        student, teacher = same_grid(student, teacher)
        gap = self._attention(student) - self._attention(teacher)
        return gap.square().mean() if self.variant == "code" else torch.linalg.vector_norm(gap, dim=1).mean()

    def _attention(self, x: Tensor) -> Tensor:
        peak = x.detach().abs().amax((1, 2, 3), keepdim=True)
        x = x / torch.where(peak > 0, peak, 1.0)
        power = x.pow(int(self.p)) if self.variant == "code" else x.abs().pow(self.p)
        return unit(power.mean(1).flatten(1))

    def extra_repr(self) -> str:
        return f"p={self.p}, variant={self.variant!r}"
