"""CRD: a sample's own embedding against those of other samples, from a memory of the whole data set."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .algebra import unit
from .base import full_precision
from .checks import check_choice, check_positive
from .contrastive import gather
from .learned import Learned, run


class CRD(Learned):
    r"""``−log e_i / (e_i + c) − Σ_j log c / (e_j + c)``: own embedding against others from a memory, from both sides.

    ``u = unit(W x + b)`` on each side. With ``e_ij = exp(⟨other side's memory[j], u_i⟩ / T) / Z``, positive ``j = i``
    and ``n`` negatives drawn uniformly from the data set, and ``c = n / samples``:

    ``−Σ_i (log e_ii / (e_ii + c + 1e-7) + Σ_j log c / (e_ij + c + 1e-7)) / B``, summed over the two sides.

    ``variant="code"``: ``Z`` is ``samples`` times the mean of ``exp(…)`` in the first batch and never changes; buffer
    ``z`` holds it, or ``−log Z`` where that is too large for its precision.
    ``variant="paper"``: its critic ``h = exp(…) / (exp(…) + c)``, that is without ``Z`` and 1e-7. In both, after each
    training step ``memory[i] ← unit(momentum · memory[i] + (1 − momentum) · u_i)``. The teacher's features get no
    gradient, but the layer ``W, b`` on its side is trained. In eval mode the memories stay as they are.

    With several processes, ``Z`` is the mean over ranks and every rank applies every rank's updates, so that memories
    which DDP made equal at its construction stay equal; ``broadcast_buffers=False`` saves sending them at each step.
    Scores are taken from one product with the whole memory where that allocates less than gathering negatives.

    Shapes: student ``(B, D)``, teacher ``(B, D')``, indices in the data set int64 ``(B,)``. Floor: above 0, reached
    where positives and negatives are told apart. Needs indices, no labels; mixup is not allowed, for a mixed image has
    no row of its own in the memory. Two buffers of ``samples · dim`` numbers.

    Args:
        samples: number of training images; a recipe leaves it out, and takes it from its data.
        dim: size of the common embedding.
        negatives: ``n``, for each sample.
        temperature: ``T > 0``.
        momentum: of the memories, in ``[0, 1)``.
        variant: ``"code"`` or ``"paper"``.
        student_size, teacher_size: ``D``, ``D'``; left out, ``fit`` finds them.

    Raises:
        ValueError: an argument is out of range; not embeddings of one batch; called before its sizes are known.

    Tian et al., Contrastive Representation Distillation, 2020, section 3. arXiv:1910.10699

    >>> loss = CRD(samples=50, dim=8, negatives=16, student_size=4, teacher_size=6)
    >>> loss(torch.rand(2, 4), torch.rand(2, 6), torch.tensor([7, 11])).shape
    torch.Size([])
    """

    view = "embedding"
    against = ("teacher", "indices")
    floor = None
    memory_student: Tensor
    memory_teacher: Tensor
    z: Tensor

    def __init__(
        self,
        samples: int | None = None,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        student_size: int | None = None,
        teacher_size: int | None = None,
        variant: Literal["code", "paper"] = "code",
    ) -> None:
        super().__init__()
        check_choice(self, variant=(variant, ("code", "paper")))
        check_positive(self, dim=dim, negatives=negatives, temperature=temperature)
        if samples is not None:
            check_positive(self, samples=samples)
        if not 0 <= momentum < 1:
            raise ValueError(f"CRD: momentum must be in [0, 1), got {momentum}")
        self.samples, self.dim, self.negatives = samples or 0, dim, negatives
        self.temperature, self.momentum, self.variant = temperature, momentum, variant
        self.size(student_size, teacher_size)

    def build(self, student_size: int, teacher_size: int) -> None:
        if not self.samples:
            raise ValueError(
                "CRD: samples is missing; give the number of training images, each has a row in the memory"
            )
        self.embed_student = nn.Linear(student_size, self.dim)
        self.embed_teacher = nn.Linear(teacher_size, self.dim)
        bound = (3 / self.dim) ** 0.5
        self.register_buffer("memory_student", torch.empty(self.samples, self.dim).uniform_(-bound, bound))
        self.register_buffer("memory_teacher", torch.empty(self.samples, self.dim).uniform_(-bound, bound))
        self.register_buffer("z", torch.full((2,), -1.0))

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor, contrast: Tensor | None = None) -> Tensor:
        self.require_fit()
        indices = indices.long()
        if student.ndim != 2 or teacher.ndim != 2 or not len(student) == len(teacher) == indices.numel():
            raise ValueError(
                f"CRD takes embeddings (B, D) and indices (B,) of one batch, got student {tuple(student.shape)}, "
                f"teacher {tuple(teacher.shape)}, indices {tuple(indices.shape)}"
            )
        if contrast is None:
            drawn = torch.randint(self.samples, (len(student), self.negatives), device=student.device)
            contrast = torch.cat([indices[:, None], drawn], dim=1)
        u_s, u_t = unit(run(self.embed_student, student)), unit(run(self.embed_teacher, teacher))
        scores_s = self._scores(self.memory_teacher, u_s, contrast)
        scores_t = self._scores(self.memory_student, u_t, contrast)
        with torch.no_grad():
            log_z = self._scale(scores_s, scores_t)
            if self.training:
                self._keep(log_z)
                self._remember(indices, u_s, u_t)
        return (self._estimate(scores_s, log_z[0]) + self._estimate(scores_t, log_z[1])) / len(student)

    def _scale(self, *sides: Tensor) -> Tensor:
        """``log Z`` of both sides, ``(2,)``."""
        if self.variant == "paper":
            return sides[0].new_zeros(2)
        first = _mean_over_ranks(torch.stack([_log_mean(x.flatten()) for x in sides])) + math.log(self.samples)
        z = self.z.to(first.dtype)
        return torch.where(_known(z), torch.where(z > 0, z.log(), -z), first)

    def _keep(self, log_z: Tensor) -> None:
        """``Z`` in the buffer, of the first batch; ``−log Z`` if it is larger than what the buffer can hold."""
        fits = log_z < math.log(torch.finfo(self.z.dtype).max)
        first = torch.where(fits, log_z.exp(), -log_z).to(self.z.dtype)
        self.z.copy_(torch.where(_known(self.z), self.z, first))

    def _scores(self, memory: Tensor, u: Tensor, contrast: Tensor) -> Tensor:
        """``(B, 1 + n)``: inner products with the memory's rows, over the temperature."""
        if self.samples * (self.dim + len(u)) <= contrast.numel() * self.dim:
            copied = memory.to(u.dtype, copy=True)  # the memory changes before backward needs it
            return (u @ copied.mT).gather(1, contrast) / self.temperature
        return torch.einsum("bnd,bd->bn", memory[contrast].to(u.dtype), u) / self.temperature

    def _estimate(self, scores: Tensor, log_z: Tensor) -> Tensor:
        """The sum over one side. Negatives come as ``log(1 + (e + eps) / c)``: small numbers, of which a million add up
        without losing their digits."""
        c = (scores.shape[1] - 1) / self.samples
        log_e = scores - (log_z + math.log(c))  # of e / c
        eps = 1e-7 if self.variant == "code" else 0.0
        log_all = torch.logaddexp(log_e, torch.full_like(log_e, math.log1p(eps / c)))
        return log_all.sum() - log_e[:, 0].sum()

    def _remember(self, indices: Tensor, u_s: Tensor, u_t: Tensor) -> None:
        indices = gather(indices)
        order = torch.arange(len(indices), device=indices.device)
        last = torch.where(indices[:, None] == indices, order, -1).amax(1)
        for memory, u in ((self.memory_student, u_s), (self.memory_teacher, u_t)):
            rows = gather(u.detach())[last].to(memory.dtype)
            memory.index_copy_(0, indices, unit(self.momentum * memory[indices] + (1 - self.momentum) * rows))

    def extra_repr(self) -> str:
        return f"samples={self.samples}, dim={self.dim}, negatives={self.negatives}, variant={self.variant!r}"


def _log_mean(x: Tensor) -> Tensor:
    """Logarithm of the mean of ``exp(x)`` over the first axis."""
    return x.logsumexp(0) - math.log(len(x))


def _mean_over_ranks(log: Tensor) -> Tensor:
    """Of the numbers whose logarithm is given; its logarithm."""
    return _log_mean(gather(log[None]))


def _known(z: Tensor) -> Tensor:
    """Where a batch has set it, and no cast to half precision has lost it."""
    return (z < -1) | ((z > 0) & (z < torch.inf))
