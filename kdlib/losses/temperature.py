"""LearnableTemperature: the temperature of a held loss, learned against the student."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import full_precision
from .checks import check_positive
from .wrappers import Wrapper


class LearnableTemperature(Wrapper):
    r"""``T² · loss(student / T, teacher / T)`` with a learned ``T = start + span · σ(θ)`` that makes the task harder.

    ``θ`` is one trained number. Its gradient is multiplied by ``λ``, which goes from 0 to −1 along half a cosine in the
    first ``ramp`` epochs: the student goes down the loss, the temperature up it, ever more (a curriculum). The gradient
    reaches ``T`` through the student's logits, the teacher's, and ``T²``. ``set_epoch`` moves ``λ``; it is −1 from
    the start in a loop that never calls it.

    Shapes: logits ``(B, K)``, and what the held loss needs. Floor: where the held loss has it. Labels: as the held
    loss. Hold a loss at temperature 1: another one multiplies ``T``.

    Args:
        loss: any loss between logits.
        start: the smallest temperature, positive.
        span: ``T`` stays below ``start + span``.
        ramp: epochs until ``λ`` is −1.
        initial: ``θ`` before training.

    Raises:
        ValueError: the loss does not read logits; start, span or ramp is not positive.

    Li et al., Curriculum Temperature for Knowledge Distillation, 2023, section 3 (its global form). arXiv:2211.16231

    >>> from kdlib.losses import SoftTarget
    >>> loss = LearnableTemperature(SoftTarget())
    >>> round(loss.temperature.item(), 3)
    15.621
    """

    lambda_: Tensor

    def __init__(
        self, loss: nn.Module, start: float = 1.0, span: float = 20.0, ramp: float = 10.0, initial: float = 1.0
    ) -> None:
        super().__init__(loss)
        check_positive(self, start=start, span=span, ramp=ramp)
        self.start, self.span, self.ramp = start, span, ramp
        self.theta = nn.Parameter(torch.tensor([float(initial)]))  # not 0-dimensional: FSDP2 could not shard it
        self.register_buffer("lambda_", torch.tensor(-1.0))
        for part in loss.modules():
            if hasattr(part, "follows_teacher"):
                part.follows_teacher = True  # type: ignore[assignment]

    @property
    def temperature(self) -> Tensor:
        """``T``, whose gradient towards ``θ`` is multiplied by ``λ``."""
        fixed = self.theta.detach()
        reversed_theta = fixed + self.lambda_ * (self.theta - fixed)
        return self.start + self.span * torch.sigmoid(reversed_theta).squeeze()

    def set_epoch(self, epoch: float, epochs: int) -> None:
        super().set_epoch(epoch, epochs)
        self.lambda_.fill_((math.cos(math.pi * min(epoch / self.ramp, 1.0)) - 1) / 2)

    @full_precision
    def forward(self, student: Tensor, *against: Tensor) -> Tensor:
        teacher, rest = self.split(against)
        temperature = self.temperature.to(student.dtype)
        given = () if teacher is None else (_over(teacher, temperature),)
        return self.loss(_over(student, temperature), *given, *rest) * temperature.square()

    def extra_repr(self) -> str:
        return f"start={self.start}, span={self.span}, ramp={self.ramp}"


def _over(logits: Tensor, temperature: Tensor) -> Tensor:
    """``logits / temperature``, from whose ``-inf``, that a class is masked by, the temperature learns nothing."""
    masked = logits == -torch.inf
    return (logits.masked_fill(masked, 0) / temperature).masked_fill(masked, -torch.inf)
