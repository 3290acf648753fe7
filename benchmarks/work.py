"""What the contestants of step.py train: models, data, and a whole step around a loss."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import timm
import torch
from torch import Tensor, nn

from recipes.riformer import gfnet, model  # noqa: F401  registers the models

Step = Callable[[], Tensor]
STAGES = tuple(f"stages.{i}" for i in range(4))
BLOCK, MIXER = 1e-4, 1e-3
"""The paper's weights on what the last block of a stage, and its token mixer, return."""


@dataclass
class Work:
    """Models and data of one job."""

    student: str
    twin: str
    wide: str | None
    images: Tensor
    labels: Tensor
    classes: int
    layout: torch.memory_format = torch.contiguous_format

    def make(self, name: str) -> nn.Module:
        """A model, the same weights each time, on the images' device."""
        torch.manual_seed(0)
        more = {} if self.images.shape[1] == 3 else {"in_chans": self.images.shape[1]}
        return timm.create_model(name, num_classes=self.classes, **more).to(
            self.images.device, memory_format=self.layout
        )

    def in_channels_last(self) -> Work:
        """The same work, images and models in that layout of memory."""
        layout = torch.channels_last
        return replace(self, images=self.images.contiguous(memory_format=layout), layout=layout)

    def autocast(self) -> Any:
        on_gpu = self.images.is_cuda
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()


def works(cpu: bool, batch: int) -> dict[str, Work]:
    """By name, the most important first."""
    torch.manual_seed(0)
    device = torch.device("cpu" if cpu else "cuda")

    def data(side: int, classes: int) -> tuple[Tensor, Tensor, int]:
        images = torch.randn(batch, 3, side, side, device=device)
        return images, torch.randint(classes, (batch,), device=device), classes

    small = ("riformer_micro", "metaformer_pool_micro", "gfnet_h_micro")
    if cpu:
        return {"blocks": Work(*small[:2], None, *data(64, 10)), "whole": Work(*small, *data(64, 10))}
    large = ("riformer_s12", "metaformer_pool_s12", "gfnet_h_b")
    return {
        "blocks": Work(*large[:2], None, *data(224, 1000)),
        "whole": Work(*large, *data(224, 1000)),
        "small": Work(*small, *data(64, 10)),
    }


def train(
    work: Work, module: nn.Module, loss_of: Callable[[], Tensor], parameters: Iterable[nn.Parameter] | None = None
) -> Step:
    """A whole step around a loss: forward, backward, AdamW."""
    trained = module.parameters() if parameters is None else parameters
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=work.images.is_cuda)

    def step() -> Tensor:
        with work.autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def kernels_of(step: Step, steps: int = 3, longest: int = 40) -> dict[str, Any]:
    """What ran on the GPU in a step: how many kernels, their milliseconds, and those that took most of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    taken: dict[str, list[float]] = {}
    for event in seen.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            taken.setdefault(event.name, []).append(event.device_time / 1e3)
    named = sorted(((sum(each) / steps, len(each) / steps, name) for name, each in taken.items()), reverse=True)
    return {
        "ms": round(sum(ms for ms, _, _ in named), 3),
        "count": round(sum(times for _, times, _ in named)),
        "longest": [f"{ms:.3f} ms, {times:g} x {name[:120]}" for ms, times, name in named[:longest]],
    }


def about(cpu: bool, **more: Any) -> dict[str, Any]:
    """What a reader must know to judge a time."""
    threads = torch.get_num_threads()
    device = f"CPU, {threads} thread{'s' * (threads > 1)}" if cpu else torch.cuda.get_device_name()
    return {
        "device": device,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    } | more


def busy() -> float | None:
    """Load of this machine per core over the last minute; about 1 where other work shares it with one process."""
    average = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return round(average, 2) if math.isfinite(average) else None
