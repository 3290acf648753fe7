"""What runs in the processes that faults happen to: a tiny model, a loss that breaks on demand, kdlib's command line.

A process is forked from one that has imported everything already, so that it starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

from kdlib import launch, losses, runs
from kdlib.losses import base
from kdlib.training import faults, train


class Toy(nn.Module):
    """Two convolutions with batch statistics and dropout: all that a resumed run could get wrong."""

    def __init__(self, in_chans: int = 3, num_classes: int = 10, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, width, 4, 4)
        self.norm = nn.BatchNorm2d(width)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.norm(self.stem(x))))
        return self.head(self.drop(x.mean((2, 3))))


@register_model
def fault_toy(pretrained: bool = False, **arguments: Any) -> nn.Module:
    known = ("in_chans", "num_classes", "width")
    return Toy(**{name: value for name, value in arguments.items() if name in known})


class _Break(torch.autograd.Function):
    """Passes a number on; its gradient is NaN where asked."""

    @staticmethod
    def forward(context: Any, x: Tensor, broken: bool) -> Tensor:
        context.broken = broken
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * (float("nan") if context.broken else 1.0), None


class Brittle(nn.Module):
    """Cross-entropy that goes wrong at the batches named by KDLIB_BREAK, ``what:epoch.batch[,epoch.batch…]``.

    ``what`` is nan, inf, gradient, or sleep, which keeps the process busy for as long as it lives.
    """

    view, against, floor, soft_labels = "logits", ("labels",), 0.0, True
    place = ""

    @base.full_precision
    def forward(self, student: Tensor, labels: Tensor) -> Tensor:
        what, _, places = os.environ["KDLIB_BREAK"].partition(":")
        here = os.environ.get("RANK", "0") in os.environ.get("KDLIB_BREAK_RANKS", "0,1").split(",")
        now = self.training and here and Brittle.place in places.split(",")
        if now and what == "sleep":
            Path("asleep").touch()
            time.sleep(300)
        value = nn.functional.cross_entropy(_Break.apply(student, now and what == "gradient"), labels)
        return value + {"nan": float("nan"), "inf": float("inf")}.get(what if now else "", 0.0)


def _placed(step: Any) -> Any:
    """Training._step, which tells the loss where it is."""

    def place_and_step(self: Any, *batch: Any) -> None:
        Brittle.place = f"{self.at.epoch}.{self.at.batch}"
        step(self, *batch)

    return place_and_step


def main(arguments: list[str], folder: str, environment: dict[str, str], limit: int, said: str) -> None:
    """A run with ``arguments`` in ``folder``; what it says goes into the file ``said``."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # data workers as in a process that nobody forked
    os.environ.update({"KDLIB_FAULT": "", "KDLIB_BREAK": ""} | environment)
    losses.register(Brittle)  # here and not at import: the process that starts this one imports it too
    train.Training._step = _placed(train.Training._step)  # type: ignore[method-assign]
    faults.arm(os.environ["KDLIB_FAULT"])
    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["run.py"]
    arguments = arguments + [argument for argument in [os.environ.get("KDLIB_ARGUMENT")] if argument]
    code = launch.main(lambda recipe: (runs.run(recipe), None)[1], Path("recipe.yaml"), arguments)
    sys.stdout.flush()
    sys.exit(code)


timm.create_model("fault_toy")
Image.init()
