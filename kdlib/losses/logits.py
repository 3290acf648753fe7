"""Losses between class scores ``(B, K)``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .algebra import kl, over, weighted
from .base import Loss, full_precision
from .checks import DENSE, check_alike, check_positive


class SoftTarget(Loss):
    r"""``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, sum over classes, mean over samples.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0, where the two distributions are equal. No labels.
    ``T²`` keeps the gradient's size about the same at every temperature. DeiT's published loss divides by ``B · K``
    instead of ``B``; scale by ``1 / K`` to get it. A class that the teacher masks by ``-inf`` adds nothing; one
    that the student alone masks makes the value infinite.

    Args:
        temperature: ``T > 0``; larger is softer.

    Raises:
        ValueError: the temperature is not positive; the shapes differ.

    Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2. arXiv:1503.02531

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> SoftTarget(temperature=4.0)(logits, logits).item()
    0.0
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.temperature = temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        log_q = F.log_softmax(over(student, self.temperature), dim=-1)
        log_p = F.log_softmax(over(teacher, self.temperature), dim=-1)
        return kl(log_q, log_p).sum() * (self.temperature**2 / len(student))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class HardLabel(Loss):
    """``−log softmax(student)[argmax teacher]``: the teacher's most likely class as the label, mean over samples.

    Shapes: student and teacher logits ``(B, K)``. Floor: 0 (above it with smoothing). No labels.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in ``[0, 1)``.

    Raises:
        ValueError: label_smoothing is outside its range; the shapes differ.

    Touvron et al., Training data-efficient image transformers, 2021, eq. 3. arXiv:2012.12877

    >>> logits = torch.tensor([[0.0, 100.0]])
    >>> HardLabel()(logits, logits).item()
    0.0
    """

    floor = None

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _smoothing(self, label_smoothing)

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        return F.cross_entropy(student, teacher.argmax(dim=-1), label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"


class CrossEntropy(Loss):
    """``−Σ y · log softmax(student)``: cross-entropy with the labels ``y``, mean over samples.

    Shapes: student logits ``(B, K)``; labels int64 ``(B,)``, or probabilities ``(B, K)`` as mixup gives them. A sample
    with the label -100 is left out, and the mean is over the others; where none is left, it is NaN.
    Floor: 0 for integer labels (the labels' entropy for soft ones). Needs labels, soft ones allowed. A logit may be
    ``-inf`` where the label, smoothed, has no mass.

    Args:
        label_smoothing: share of the target spread evenly over all classes, in ``[0, 1)``.

    Raises:
        ValueError: label_smoothing is outside its range; the labels fit neither shape.

    Szegedy et al., Rethinking the Inception Architecture, 2016, section 7 (smoothing). arXiv:1512.00567

    >>> CrossEntropy()(torch.tensor([[0.0, 100.0]]), torch.tensor([1])).item()
    0.0
    """

    against = ("labels",)
    soft_labels = True
    floor = None

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = _smoothing(self, label_smoothing)

    @full_precision
    def forward(self, student: Tensor, labels: Tensor) -> Tensor:
        hard = labels.shape == student.shape[:1] and not labels.is_floating_point()
        soft = labels.shape == student.shape and labels.is_floating_point()
        if student.ndim != 2 or not (hard or soft):
            raise ValueError(
                f"CrossEntropy takes logits (B, K) with labels int64 (B,) or float (B, K), got logits "
                f"{tuple(student.shape)} with labels {tuple(labels.shape)} of {labels.dtype}"
                f"{f'; {DENSE}' if student.ndim > 2 else ''}"
            )
        if soft:
            wanted = labels * (1 - self.label_smoothing) + self.label_smoothing / student.shape[1]
            return -weighted(wanted, student.log_softmax(dim=-1)).sum() / len(student)
        return F.cross_entropy(student, labels.long(), label_smoothing=self.label_smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"


def _smoothing(loss: Loss, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{type(loss).__name__}: label_smoothing must be in [0, 1), got {value}")
    return value
