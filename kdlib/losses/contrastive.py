"""InfoNCE: a sample's own teacher embedding against those of the other samples in the batch, on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .algebra import unit
from .base import Loss, full_precision
from .checks import check_alike, check_positive


class InfoNCE(Loss):
    r"""``−log softmax_j(cos(s_i, t_j) / T)`` at ``j = i``, mean over samples: other samples' teachers are negatives.

    With several processes the teacher's embeddings of all ranks are negatives; the mean over ranks, which DDP takes of
    the gradients, is then the loss of the whole batch.

    Shapes: student and teacher ``(B, D)`` of one shape, and of one ``B`` on every rank. Floor: 0, approached where own
    cosines are 1 and ``T`` is small. No labels. A batch of one has no negative: the value is 0.

    Args:
        temperature: ``T > 0``.
        symmetric: average with the other direction, in which a teacher finds its student among all students; their
            gradient flows back to the rank that they come from.

    Raises:
        ValueError: the temperature is not positive; the shapes differ.

    van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018, eq. 4. arXiv:1807.03748

    >>> round(InfoNCE(temperature=0.05)(torch.eye(4), torch.eye(4)).item(), 5)
    0.0
    """

    view = "embedding"
    floor = None

    def __init__(self, temperature: float = 0.07, symmetric: bool = False) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.temperature, self.symmetric = temperature, symmetric

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B D")
        student, teacher = unit(student), unit(teacher)
        own = torch.arange(len(student), device=student.device) + len(student) * _rank()
        loss = F.cross_entropy(student @ gather(teacher).mT / self.temperature, own)
        if self.symmetric:
            loss = (loss + F.cross_entropy(teacher @ gather(student).mT / self.temperature, own)) / 2
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}"


def gather(x: Tensor) -> Tensor:
    """``x`` of every rank, in order of ranks, along the batch; gradients flow back to the rank that they belong to."""
    if _world() == 1:
        return x
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.batch = len(x)
        parts = [torch.empty_like(x) for _ in range(_world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.narrow(0, ctx.batch * _rank(), ctx.batch)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
