"""The blocks objective of step.py as other libraries compute it, each by its own interface and as it comes.

A peer that cannot be imported raises ImportError, which step.py tells in its row. timm.task compares logits alone.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from work import BLOCK, STAGES, Step, Work, train

PEERS = ("torchdistill", "nvidia-modelopt", "timm")


def versions() -> dict[str, str | None]:
    """Of each peer, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PEERS)
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def by_timm(work: Work, mode: str | None) -> Step:
    """timm.task, logits only."""
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        work.make(work.student), work.make(work.twin), criterion=nn.CrossEntropyLoss(), verbose=False,
        device=work.images.device,
    )  # fmt: skip
    return train(work, task.trainable_module, lambda: task(work.images, work.labels)["loss"])


def by_modelopt(work: Work, mode: str | None) -> Step:
    """NVIDIA Model-Optimizer: its model, its hooks, its logit loss; the weights by a balancer of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.distill as mtd

    class Weighted(mtd.DistillationLossBalancer):
        """Its own balancer wants weights that sum to 1."""

        def forward(self, loss: dict[str, Tensor]) -> Tensor:
            return sum((value if "Logits" in name else BLOCK * value for name, value in loss.items()), torch.zeros(()))

    losses = {("", ""): mtd.LogitsDistillationLoss(reduction="batchmean")}
    losses |= {(stage, stage): nn.MSELoss() for stage in STAGES}
    config: dict[str, Any] = {
        "teacher_model": work.make(work.twin), "criterion": losses, "loss_balancer": Weighted()
    }  # fmt: skip
    net = mtd.convert(work.make(work.student), mode=[("kd_loss", config)])

    def loss_of() -> Tensor:
        net(work.images)
        return net.compute_kd_loss()

    return train(work, net, loss_of, [p for p in net.parameters() if p.requires_grad])


def by_torchdistill(work: Work, mode: str | None) -> Step:
    """torchdistill: its box, which holds hooks, criterion and optimizer, driven as its own training loop does."""
    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    from torchdistill.core.distillation import DistillationBox

    def pair(stage: str) -> dict[str, Any]:
        sides = {name: {"is_from_teacher": name == "target", "module_path": stage, "io": "output"}
                 for name in ("input", "target")}  # fmt: skip
        wrapper = {"key": "SimpleLossWrapper", "kwargs": sides}
        return {"criterion": {"key": "MSELoss", "kwargs": {}}, "criterion_wrapper": wrapper, "weight": BLOCK}

    logits = {f"{side}_module_{what}": value for side in ("student", "teacher")
              for what, value in (("path", "."), ("io", "output"))}  # fmt: skip
    soft = {"key": "KDLoss", "kwargs": {**logits, "temperature": 1.0, "alpha": 0.0, "reduction": "batchmean"}}
    model = {"forward_proc": "forward_batch_only", "forward_hook": {"input": [], "output": list(STAGES)}}
    config = {
        "num_epochs": 1,
        "teacher": model | {"requires_grad": False},
        "student": dict(model),
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-4, "fused": work.images.is_cuda}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"soft": {"criterion": soft, "weight": 1.0}, **{s: pair(s) for s in STAGES}}},
        },
    }
    device = work.images.device
    teacher, student = work.make(work.twin).eval(), work.make(work.student)
    ids = [device.index or 0] if device.type == "cuda" else []
    box = DistillationBox(teacher, student, {}, config, device, ids, distributed=False, lr_factor=1)

    def step() -> Tensor:
        with work.autocast():
            loss = box.forward_process(work.images, work.labels)
        box.post_forward_process(loss)
        return loss

    return step


def soft_loss(logits: Tensor, answer: Tensor) -> Tensor:
    """KL(teacher ‖ student) at temperature 1, summed over classes, mean over images."""
    target = F.log_softmax(answer.float(), -1)
    return F.kl_div(F.log_softmax(logits.float(), -1), target, reduction="batchmean", log_target=True)
