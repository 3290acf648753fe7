"""Losses between class scores ``(B, K)`` that treat the labelled class apart from the others."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import kl, over, weighted
from .base import Loss, full_precision
from .checks import check_alike, check_labels, check_positive


class DKD(Loss):
    r"""``T² · (alpha · KL(b_t ‖ b_s) + beta · KL(n_t ‖ n_s))``, mean over samples: target and non-target parts apart.

    With ``p = softmax(logits / T)`` and label ``y``: ``b = (p_y, 1 − p_y)``, and ``n`` is ``p`` over the classes other
    than ``y``, scaled to sum to one. ``log(1 − p_y)`` is a logsumexp over those classes, and they are told apart by
    ``-inf``, so the value is finite and exact for any gap between logits. Other classes may be masked by ``-inf``, but
    for the label and one more.

    Shapes: student and teacher logits ``(B, K)``, labels int64 ``(B,)``. Floor: 0, where the two distributions are
    equal. Needs labels; soft labels (mixup) are not allowed, for the definition has one target class.

    Args:
        alpha: weight of the target part.
        beta: weight of the non-target part; the paper uses 8 on CIFAR-100 with ``T = 4``, 0.5 to 2 on ImageNet with 1.
        temperature: ``T > 0``, of both parts.

    Raises:
        ValueError: the temperature is not positive; the shapes differ; labels are soft or, on a CPU, no
            class; fewer than two classes.

    Zhao et al., Decoupled Knowledge Distillation, 2022, section 3. arXiv:2203.08679. The published training script also
    warms the weight up over 20 epochs; that is a term's schedule here.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> DKD(alpha=1.0, beta=8.0, temperature=4.0)(logits, logits, torch.tensor([0])).item()
    0.0
    """

    against = ("teacher", "labels")

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        check_labels(self, student, labels)
        target = target_mask(student, labels)
        parts = []
        for logits in (student, teacher):
            logits = over(logits, self.temperature)
            rest = logits.masked_fill(target, -torch.inf)
            pair = torch.cat([logits.gather(1, labels.long()[:, None]), rest.logsumexp(-1, keepdim=True)], dim=-1)
            parts += [pair.log_softmax(-1), rest.log_softmax(-1)]
        pair_q, log_q, pair_p, log_p = parts
        binary, others = kl(pair_q, pair_p).sum(), kl(log_q, log_p).sum()
        scale = self.temperature**2 / len(student)
        return self.alpha * scale * binary + self.beta * scale * others

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"


class NKD(Loss):
    r"""``−mean(t_y log s_y) − gamma · T² · mean(Σ_{k≠y} n_t log n_s)``: a soft target for the label, KD for the rest.

    ``s_y``, ``t_y`` are the label's probabilities at temperature 1; ``n`` is the softmax of ``logits / T`` over the
    classes other than the label, sum over classes, mean over samples. The temperature does not touch the first part.
    It is a cross-entropy: the teacher's entropy is not taken off, and the usual loss with the labels is added outside.
    Classes may be masked by ``-inf``, but for the label and one more.

    Shapes: student and teacher logits ``(B, K)``, labels int64 ``(B,)``. Floor: ``gamma · T²`` times the mean entropy
    of ``n_t``, approached as ``s_y`` goes to 1. Needs labels; soft labels (mixup) are not allowed.

    Args:
        gamma: weight of the non-target part.
        temperature: ``T > 0`` of the non-target part.

    Raises:
        ValueError: the temperature is not positive; the shapes differ; labels are soft or, on a CPU, no
            class; fewer than two classes.

    Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, 2023, section 3. arXiv:2303.13005

    >>> logits = torch.tensor([[50.0, 0.0]])
    >>> abs(NKD()(logits, logits, torch.tensor([0])).item()) < 1e-6
    True
    """

    against = ("teacher", "labels")
    floor = None

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(self, temperature=temperature)
        self.gamma, self.temperature = gamma, temperature

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        check_alike(self, student, teacher, "B K")
        check_labels(self, student, labels)
        target = target_mask(student, labels)
        p_target = teacher.softmax(dim=-1).gather(1, labels.long()[:, None])
        log_q_target = student.log_softmax(dim=-1).gather(1, labels.long()[:, None])
        log_q, log_p = (_others(over(x, self.temperature), target) for x in (student, teacher))
        others = weighted(log_p.exp(), log_q).sum()
        return -(weighted(p_target, log_q_target).sum() + self.gamma * self.temperature**2 * others) / len(student)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}"


def target_mask(logits: Tensor, labels: Tensor) -> Tensor:
    """``(B, K)``: True at each sample's label.

    Raises:
        ValueError: a label that is no class. Only on a CPU, which finds it without being asked; a GPU ends by itself.
    """
    nowhere = torch.zeros_like(logits, dtype=torch.bool)
    try:
        return nowhere.scatter_(1, labels.long()[:, None], True)
    except RuntimeError as error:
        wanted = f"DKD, NKD and OFA need a label from 0 to {logits.shape[1] - 1} for every sample"
        raise ValueError(f"{wanted}, got another ({error}); leave such samples out, those of -100 too") from None


def _others(logits: Tensor, target: Tensor) -> Tensor:
    """Log of the softmax over the classes that are not the target; ``-inf`` at the target."""
    return logits.masked_fill(target, -torch.inf).log_softmax(dim=-1)
