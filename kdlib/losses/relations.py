"""Losses between the relations that features have among themselves."""

from __future__ import annotations

from torch import Tensor

from . import fused_gram, token_gap
from .algebra import gram_gap, may_be_kept, unit
from .base import HALF, Loss, autocast_off, full_precision


class GramRelation(Loss):
    r"""``mean (S Sᵀ − T Tᵀ)²``: how alike each two tokens of an image are, in the student and in the teacher.

    Shapes: student tokens ``(B, N, C)``, teacher tokens ``(B, N, C')``; the numbers of channels may differ.
    Mean over images and over the ``N × N`` pairs. Floor: 0. No labels.

    Computed in the cheapest of its exact forms. With ``A = S + T`` and ``D = S − T``, ``SSᵀ − TTᵀ = (ADᵀ + DAᵀ) / 2``:
    one ``N × N`` product where ``N`` is small. Else only channel Grams are formed,

    ``‖SSᵀ − TTᵀ‖² = (⟨AᵀA, DᵀD⟩ + ⟨AᵀD, DᵀA⟩) / 2``,

    every summand of which vanishes with ``D``, so nothing cancels as the student comes close. With ``C ≠ C'`` the Grams
    are compared as written, or it is ``‖SᵀS‖² + ‖TᵀT‖² − 2 ‖SᵀT‖²``. On a Hopper GPU where float32 products may be
    TF32 (``torch.set_float32_matmul_precision("high")``), tokens of at most 128 channels are read once, by Triton
    kernels; that form is differentiable once.

    Args:
        normalize: tokens are scaled to unit length first, so that the relation is their cosine.

    Raises:
        ValueError: not tokens, or the batch or the number of tokens differs.

    Wang et al., RIFormer, 2023, eq. 8. arXiv:2304.05659. Hao et al., Manifold Distillation, 2022, eq. 3 (its
    intra-image part). arXiv:2107.01378

    >>> tokens = torch.randn(2, 9, 4)
    >>> GramRelation()(tokens, 3 * tokens).item() < 1e-12
    True
    """

    view = "tokens"

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                f"GramRelation takes tokens (B, N, C) of one B and N, got student {tuple(student.shape)} and teacher "
                f"{tuple(teacher.shape)}; an adapter that resizes the grid, or another tap, brings them together"
            )
        images, n, _ = student.shape
        half = student.dtype in HALF and student.numel() > 0 and may_be_kept(teacher)
        if fused_gram.serves(student, teacher):  # which reads any precision, and computes in float32
            total = fused_gram.gram_gap(student, teacher, self.normalize)
        elif half and token_gap.serves(student, teacher):  # likewise
            with autocast_off(student.device):
                total = token_gap.gram_gap(student, teacher.detach(), self.normalize)
        else:
            total = self._plain(student, teacher)
        return total / (images * n * n)

    @full_precision
    def _plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        if token_gap.serves(student, teacher):
            return token_gap.gram_gap(student, teacher, self.normalize)
        if self.normalize:
            student, teacher = unit(student), unit(teacher)
        return gram_gap(student, teacher)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"
