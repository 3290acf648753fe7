"""A batch forward and backward: as it is, compiled, or as a recorded CUDA graph; tried where terms begin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..distiller import Distilled, Distiller
from ..teacher import Teacher
from . import compiling
from .graphs import Graphs, try_graphs

Batch = tuple[Tensor, dict[str, Tensor]]


@dataclass
class Passes:
    """Forward and backward of a run's batches, the teacher's part included."""

    engine: nn.Module
    """The distiller, as accelerate prepared it."""
    distiller: Distiller
    teacher: Teacher | None
    accelerator: Accelerator
    mode: str | None
    """What ``compiling.resolve`` gives; then the mode in which something is compiled, or None."""
    compile_teacher: bool = True
    channels_last: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        self.records, self.mode = self.mode in compiling.RECORDED, compiling.RECORDED.get(self.mode or "", self.mode)
        self.modules: dict[str, nn.Module] = {} if self.teacher is None else {"teacher": self.teacher}
        self.modules["student"] = self.distiller
        self.graphs: Graphs | None = None
        self._tried: set[tuple[str, ...]] = set()
        self._idle: dict[tuple[str, ...], list[nn.Parameter]] = {}

    def try_out(self, batch: Callable[[], Batch]) -> list[str]:
        """Compiles and records for the terms that are on, unless they were on before; leaves no other trace.

        What cannot be compiled or recorded with them runs as it is from now on: the run does not end for it.

        Args:
            batch: gives one, where one is needed.

        Returns:
            what there is to tell people.

        Raises:
            Exception: whatever a step raises that is not compiled.
        """
        if (live := self.distiller.live()) not in self._idle:
            self._idle[live] = self.distiller.idle()
        if live in self._tried or (self.mode is None and not self.records):
            return []
        first, self._tried = not self._tried, self._tried | {live}
        if self.accelerator.is_fsdp2:
            self.mode, self.records = None, False
            return ["runs without torch.compile, whose whole graph FSDP2 cuts"]
        images, targets = batch()
        told = []
        if self.mode is not None:
            step = partial(self.backward, images, targets)
            chosen = {name: one for name, one in self.modules.items() if self.compile_teacher or name == "student"}
            if first or not compiling.runs(step, chosen, images.device):
                self.mode, line = compiling.rehearse(step, chosen, self.mode, images.device)
                told.append(line)
        if self.records:
            graphs = self.graphs or Graphs(
                self.backward, list(self.modules.values()), self.distiller.live, self.accumulate
            )
            self.graphs, line = try_graphs(graphs, images, targets)
            self.records = self.graphs is not None
            if not self.records:
                self.distiller.zero_grad()  # what is there belongs to a recording
            told += [line] if first or not self.records else []
        return told

    def forget(self) -> None:
        """The gradients that are there are no longer these."""
        if self.graphs is not None:
            self.graphs.forget()

    def __call__(self, images: Tensor, targets: dict[str, Tensor], adds: bool) -> Distilled:
        """Forward and backward.

        Args:
            adds: whether gradients are added to those that are there, as from the second of accumulated batches on.
        """
        out = self.backward(images, targets) if self.graphs is None else self.graphs(images, targets, adds)
        if self.mode == "reduce-overhead" and not self.accelerator.sync_gradients:
            compiling.keep_gradients(self.distiller)
        if self.accelerator.sync_gradients:
            for parameter in self._idle.get(self.distiller.live(), ()):
                parameter.grad = None  # zero, or of before: it would be decayed and averaged all the same
        return out

    def backward(self, images: Tensor, targets: dict[str, Tensor]) -> Distilled:
        """Forward and backward, launch by launch."""
        compiling.begin_step(self.mode)
        given, sharded = self.with_teacher(images, targets), self.accelerator.is_fsdp2
        with self.accelerator.autocast() if sharded else nullcontext():  # which accelerate wraps around DDP
            out: Distilled = self.engine(*given)
        self.accelerator.backward(out.loss)
        return out

    def with_teacher(self, images: Tensor, targets: dict[str, Tensor]) -> Batch:
        """The batch, with what the teacher says of it."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.teacher is not None:
            with self.accelerator.autocast():
                targets = targets | self.teacher(images)
        return images, targets
