"""Losses that look at the student through the teacher's own classifier: SimKD and SRRL."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import pooled, same_grid
from .base import full_precision
from .checks import check_maps, check_positive
from .learned import HoldsHead, run


class SimKD(HoldsHead):
    r"""``(projector(student) − teacher)²``, mean over elements; the student then borrows the teacher's classifier.

    The projector is 1×1, 3×3 and 1×1 convolutions without bias, each followed by batch norm and ReLU, with
    ``C' / factor`` channels within. At inference the student keeps it: ``predict`` gives the logits, through the
    projector and a frozen copy of the teacher's head, and what is exported must contain both.

    The paper writes the squared norm, a sum over elements.

    Shapes: last maps before pooling, student ``(B, C, H, W)``, teacher ``(B, C', H', W')``; of two grids the larger is
    averaged down. Learns the projector; its batch norms use the batch's statistics while training. Floor: 0. No labels.

    Args:
        student_channels, teacher_channels: left out, ``fit`` finds them.
        factor: how much narrower the projector is than the teacher.
        head: the teacher's classifier, from pooled features to logits; needed by ``predict`` only. A frozen copy is
            held, outside ``parameters()`` and ``state_dict()``.

    Raises:
        ValueError: not maps of one batch; called before its sizes are known; ``predict`` without a head.

    Chen et al., Knowledge Distillation with the Reused Teacher Classifier, 2022, section 3. arXiv:2203.14001

    >>> loss = SimKD(student_channels=3, teacher_channels=6, head=torch.nn.Linear(6, 10))
    >>> loss(torch.rand(2, 3, 4, 4), torch.rand(2, 6, 4, 4)).shape
    torch.Size([])
    >>> loss.predict(torch.rand(2, 3, 4, 4)).shape
    torch.Size([2, 10])
    """

    view = "map"

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        factor: int = 2,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, factor=factor)
        self.factor = factor
        self.hold(head)
        self.size(student_channels, teacher_channels)

    def build(self, c_s: int, c_t: int) -> None:
        hidden = max(1, c_t // self.factor)
        layers: list[nn.Module] = []
        for c_in, c_out, kernel in ((c_s, hidden, 1), (hidden, hidden, 3), (hidden, c_t, 1)):
            layers += [
                nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]
        self.project = nn.Sequential(*layers)

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        self.require_fit()
        student, teacher = same_grid(student, teacher)
        return F.mse_loss(run(self.project, student), teacher)

    @full_precision
    def predict(self, student: Tensor) -> Tensor:
        """Logits ``(B, K)`` of the student's last map, through the projector and the teacher's classifier."""
        self.require_fit()
        return self.classify(pooled(run(self.project, student)))

    def extra_repr(self) -> str:
        return f"factor={self.factor}, sizes={self.sizes}, head={bool(self.held)}"


class SRRL(HoldsHead):
    r"""``alpha · (mean s − mean t)² + beta · (head(mean s) − head(mean t))²``: features and the head's view of them.

    ``s`` is the student through a learned 1×1 convolution without bias, batch norm and ReLU; ``mean`` is over
    positions, ``head`` the teacher's classifier, frozen. Mean over samples and over channels or classes.

    Shapes: last maps before pooling, student ``(B, C, H, W)``, teacher ``(B, C', H', W')``. Floor: 0. No labels.

    Args:
        alpha: weight of the statistics part (``ChannelMean``).
        beta: weight of the part behind the head.
        project: False: the student comes in the teacher's channels already, nothing is learned.
        student_channels, teacher_channels: left out, ``fit`` finds them.
        head: the teacher's classifier, from pooled features to logits, here or in ``fit``. A frozen copy is held,
            outside ``parameters()`` and ``state_dict()``.

    Raises:
        ValueError: not maps of one batch; called before its sizes or head are known.

    Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021 (no arXiv version).

    >>> loss = SRRL(student_channels=3, teacher_channels=6, head=torch.nn.Linear(6, 10))
    >>> loss(torch.rand(2, 3, 4, 4), torch.rand(2, 6, 4, 4)).shape
    torch.Size([])
    """

    view = "map"

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        project: bool = True,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.project = alpha, beta, project
        self.hold(head)
        self.size(student_channels, teacher_channels)

    def build(self, c_s: int, c_t: int) -> None:
        if not self.project and c_s != c_t:
            raise ValueError(f"SRRL(project=False) needs equal channels, got student {c_s} and teacher {c_t}")
        layers = [nn.Conv2d(c_s, c_t, 1, bias=False), nn.BatchNorm2d(c_t), nn.ReLU()] if self.project else []
        self.connect = nn.Sequential(*layers)

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(self, student, teacher)
        self.require_fit()
        s, t = pooled(run(self.connect, student)), pooled(teacher)
        features = F.mse_loss(s, t)
        return self.alpha * features + self.beta * F.mse_loss(self.classify(s), self.classify(t))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, sizes={self.sizes}, head={bool(self.held)}"
