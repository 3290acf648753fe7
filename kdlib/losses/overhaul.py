"""OFD: the comprehensive overhaul of feature distillation."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import full_precision
from .checks import check_choice, check_maps
from .learned import Learned, run


class OFD(Learned):
    r"""``Σ (s − m)²`` where ``s > m`` or ``m > 0``, with ``m = max(teacher, margin)``: up to what the ReLU hides.

    A sum over all elements; those left out are of a student below a negative target, which the next ReLU hides. The
    margin is negative, one a channel: the mean of the teacher's negative responses,
    ``margin = b − |w| φ(b/|w|) / Φ(−b/|w|)`` if they are normal with mean ``b`` and deviation ``|w|``, as after a batch
    norm (``−3 |w|`` where ``Φ ≤ 0.001``). ``s`` is the student through a learned 1×1 convolution and batch norm.

    Shapes: student map ``(B, C, H, W)``, teacher map ``(B, C', H, W)``, both before their ReLU. Plain sum, as the
    published function, so that its value grows with the batch: half a batch has half of it, on each of two processes
    too. Its script divides by ``B · 10⁴`` and by ``2^(levels above)``: ``reduction="batchmean"`` divides by ``B``, and
    is a mean over samples; the rest is the term's weight. Floor: 0. No labels.

    Args:
        margin: ``(C',)`` or ``(1, C', 1, 1)``; or the teacher's batch norm before the ReLU, from which it is computed;
            left out, ``fit`` takes mean and deviation of the example's channels.
        project: False: the student comes in the teacher's channels already, nothing is learned.
        reduction: ``"sum"`` or, over samples, ``"batchmean"``.
        student_channels, teacher_channels: left out, ``fit`` finds them.

    Raises:
        ValueError: an argument is out of range; the maps do not fit; called before its sizes or margin are known.

    Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019, section 3. arXiv:1904.01866

    >>> loss = OFD(margin=torch.full((3,), -0.5), project=False, student_channels=3, teacher_channels=3)
    >>> loss(torch.full((2, 3, 1, 1), -2.0), torch.full((2, 3, 1, 1), -1.0)).item()
    0.0
    """

    view = "map"
    margin: Tensor

    def __init__(
        self,
        margin: Tensor | nn.Module | None = None,
        project: bool = True,
        reduction: Literal["sum", "batchmean"] = "sum",
        student_channels: int | None = None,
        teacher_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_choice(self, reduction=(reduction, ("sum", "batchmean")))
        self.project, self.reduction = project, reduction
        if isinstance(margin, nn.Module):
            margin = margin_of(margin.weight.detach(), margin.bias.detach())  # type: ignore[operator]
        self.given = None if margin is None else margin.detach().clone().reshape(1, -1, 1, 1)
        self.known = margin is not None
        self.register_load_state_dict_pre_hook(_margin_comes)
        self.size(student_channels, teacher_channels)

    def build(self, c_s: int, c_t: int) -> None:
        if not self.project and c_s != c_t:
            raise ValueError(f"OFD(project=False) needs equal channels, got student {c_s} and teacher {c_t}")
        if self.given is not None and self.given.shape[1] != c_t:
            raise ValueError(f"OFD: the margin has {self.given.shape[1]} channels, the teacher {c_t}")
        layers = [nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t)] if self.project else []
        self.connect = nn.Sequential(*layers)
        self.register_buffer("margin", self.given if self.given is not None else torch.full((1, c_t, 1, 1), math.nan))

    def fit(self, student: Tensor, teacher: Tensor, head: nn.Module | None = None) -> None:
        super().fit(student, teacher)
        if not self.known:
            values = teacher.detach().float().movedim(1, 0).flatten(1)
            self.margin.copy_(margin_of(values.std(1, unbiased=False), values.mean(1)).reshape(1, -1, 1, 1))
            self.known = True

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        self.require_fit()
        if not self.known:
            raise ValueError("OFD has no margin yet: pass margin= (the teacher's batch norm), or call fit")
        s = run(self.connect, student)
        m = torch.maximum(teacher, self.margin.to(s.dtype))
        total = ((s - m).square() * ((s > m) | (m > 0))).sum()
        return total if self.reduction == "sum" else total / len(s)

    def extra_repr(self) -> str:
        return f"project={self.project}, reduction={self.reduction!r}, sizes={self.sizes}"


def _margin_comes(loss: OFD, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Of a state dict; that the buffer holds one cannot be asked of a GPU without waiting for it."""
    loss.known = loss.known or prefix + "margin" in state


def margin_of(weight: Tensor, bias: Tensor) -> Tensor:
    """Mean of what is negative of a normal variable with deviation ``|weight|`` and mean ``bias``, by channel."""
    scale, mean = weight.double().abs().clamp_min(1e-12), bias.double()
    ratio = mean / scale
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(-ratio)
    margin = torch.where(below > 1e-3, mean - scale * density / below.clamp_min(1e-3), -3 * scale)
    return margin.to(weight.dtype)
