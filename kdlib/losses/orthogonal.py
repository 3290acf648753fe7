"""VkD: one orthogonal projection between pooled features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import pooled
from .base import full_precision
from .learned import Learned


class VkD(Learned):
    r"""``smooth-L1(P · mean(student), layer-norm(mean(teacher)))``, mean over samples and channels; ``P`` orthogonal.

    Both sides are averaged over positions; the teacher is then standardised over its channels (eps 1e-5, nothing
    learned), smooth-L1 has beta 1. ``P`` is a ``(C', C)`` matrix with orthonormal columns (rows if ``C' < C``), which
    keeps the student's distances: the orthonormal factor of the learned ``projection``, whose scale does not matter.

    Shapes: student tokens ``(B, N, C)``, teacher tokens ``(B, N', C')``; maps and embeddings are taken as well. Learns
    ``projection``. Floor: 0. No labels. The published recipe adds a KL on the logits.

    Args:
        student_channels, teacher_channels: left out, ``fit`` finds them.

    Raises:
        ValueError: the batches differ; called before its sizes are known.

    Miles et al., VkD: Improving Knowledge Distillation using Orthogonal Projections, 2024, section 3. arXiv:2403.06213

    >>> loss = VkD(student_channels=3, teacher_channels=6)
    >>> loss(torch.rand(2, 9, 3), torch.rand(2, 4, 6)).shape
    torch.Size([])
    """

    view = "tokens"

    def __init__(self, student_channels: int | None = None, teacher_channels: int | None = None) -> None:
        super().__init__()
        self.size(student_channels, teacher_channels)

    def measure(self, student: Tensor, teacher: Tensor) -> tuple[int, int]:
        return pooled(student).shape[1], pooled(teacher).shape[1]

    def build(self, c_s: int, c_t: int) -> None:
        self.projection = nn.Parameter(nn.init.orthogonal_(torch.empty(c_t, c_s)))

    @property
    def weight(self) -> Tensor:
        """``P``, ``(C', C)``: the orthonormal factor of ``projection``, nearest in sign to it."""
        raw = self.projection.to(torch.promote_types(self.projection.dtype, torch.float32))
        tall = raw if raw.shape[0] >= raw.shape[1] else raw.mT
        q, r = torch.linalg.qr(tall)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        return q if raw.shape[0] >= raw.shape[1] else q.mT

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self.require_fit()
        if len(student) != len(teacher):
            raise ValueError(f"VkD takes one batch, got {len(student)} student and {len(teacher)} teacher samples")
        return self.distance(student, teacher, self.weight.to(student.dtype))

    def distance(self, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        """The loss under a given projection."""
        target = pooled(teacher)
        return F.smooth_l1_loss(pooled(student) @ weight.mT, F.layer_norm(target, target.shape[1:]))

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"
