"""CUDA graphs of a training step as it is: recorded once, then replayed by one launch instead of a thousand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor, nn

from ..distiller import Distilled
from .compiling import reason
from .unchanged import unchanged

Backward = Callable[[Tensor, dict[str, Tensor]], Distilled]
"""(images, targets) to what a step gives, its backward pass done."""


class Graphs:
    """Forward and backward of a step, replayed: the very kernels that would run without it, in the same order.

    For models that wait longer for launches than they compute: nothing is compiled, so it starts within seconds and the
    numbers are those of the plain step. It is recorded anew where a term begins or ends, or shapes change. Gradients
    stay in memory of the recording: never set them to None between steps; a replay overwrites or adds to them.

    Args:
        step: forward and backward; draws random numbers from the device's default generator only, reads no value back.
        modules: all that the step runs; their buffers are put back after recording.
        live: names what the step computes at present; another answer is another recording.
        accumulate: batches per optimizer step.
    """

    def __init__(
        self, step: Backward, modules: Sequence[nn.Module], live: Callable[[], Hashable], accumulate: int = 1
    ) -> None:
        self.step, self.modules, self.live, self.accumulate = step, modules, live, accumulate
        self._key: Hashable = None
        self._recorded: list[tuple[torch.cuda.CUDAGraph, Distilled]] = []

    def __call__(self, images: Tensor, targets: Mapping[str, Tensor], adds: bool) -> Distilled:
        """One step; what it gives is overwritten by the next.

        Args:
            adds: whether gradients are added to those that are there, as from the second of accumulated batches on.
        """
        if self._told(images, targets) != self._key:
            self.record(images, targets)
        self._images.copy_(images, non_blocking=True)
        for name, value in targets.items():
            self._targets[name].copy_(value, non_blocking=True)
        graph, out = self._recorded[adds]
        graph.replay()
        return out

    def _told(self, images: Tensor, targets: Mapping[str, Tensor]) -> Hashable:
        """What a recording is for."""
        shapes = {name: (value.shape, value.dtype) for name, value in {"": images, **targets}.items()}
        return self.live(), tuple(shapes.items())

    def forget(self) -> None:
        """The gradients that it recorded are gone: the next step is recorded anew."""
        self._key = None

    def record(self, images: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Records the step for such images and targets, and a second one that adds its gradients if any will.

        Raises:
            Exception: whatever the step or CUDA says of a step that cannot be recorded, one that waits for the device.
        """
        self._recorded, self._key = [], None
        parameters = [parameter for module in self.modules for parameter in module.parameters()]
        sums = [None if p.grad is None else p.grad.clone() for p in parameters]  # of batches that were added up so far
        self._images, self._targets = images.clone(), {name: value.clone() for name, value in targets.items()}
        with unchanged(self.modules, images.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose their kernels and take their memory before recording
                for _ in range(2):
                    self.step(self._images, self._targets)
            torch.cuda.current_stream().wait_stream(aside)
        pool = torch.cuda.graph_pool_handle()
        recorded = []
        with unchanged(self.modules, images.device, gradients=False):
            for _ in range(min(self.accumulate, 2)):  # the first makes the gradients, the second finds them there
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    out = self.step(self._images, self._targets)
                    out = Distilled(out.loss.detach(), out.logits.detach(), out.terms)
                recorded.append((graph, out))
        for parameter, total in zip(parameters, sums, strict=True):
            if parameter.grad is not None and total is not None:
                parameter.grad.copy_(total)
        self._recorded, self._key = recorded, self._told(images, targets)


def try_graphs(graphs: Graphs, images: Tensor, targets: Mapping[str, Tensor]) -> tuple[Graphs | None, str]:
    """The graphs, recorded for what is live, or None where that cannot be; and a line for people."""
    if not images.is_cuda or torch.distributed.is_initialized():
        return None, "runs without CUDA graphs, which need a GPU and one process"
    started = perf_counter()
    try:
        graphs.record(images, targets)
    except Exception as error:  # what cannot be recorded fails in many ways
        _stop_counting(images.device)
        return None, f"runs without CUDA graphs, which cannot take its step: {reason(error)}"
    return graphs, f"recorded as a CUDA graph in {perf_counter() - started:.1f} s"


def _stop_counting(device: torch.device) -> None:
    """Gives the device's generator a state of its own again.

    One whose recording broke off goes on counting for it, and refuses to draw anything outside of it.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    generator.graphsafe_set_state(generator.clone_state())
