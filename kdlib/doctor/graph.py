"""Does a step compile whole, and how long does that take?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

from accelerate import Accelerator
from torch import Tensor, nn

from ..distiller import Distiller
from ..teacher import Teacher
from ..training.compiling import compile_whole, set_up, try_each


@dataclass(frozen=True)
class Compiled:
    """What came of it."""

    backend: str
    seconds: float
    """Of the first step, compilation included."""
    error: str
    """What could not be compiled, and why; empty if all could."""


def try_compile(
    distiller: Distiller,
    teacher: Teacher | None,
    batch: tuple[Tensor, Mapping[str, Tensor]],
    accelerator: Accelerator,
    backend: str,
    compile_teacher: bool = True,
) -> Compiled:
    """Compiles teacher and distiller, each as one graph, runs a step forward and backward, and takes it off again.

    ``aot_eager`` proves that each is one graph, forward and backward, in seconds; ``inductor`` makes the kernels too.

    Args:
        compile_teacher: or it runs as it is.
    """
    modules: dict[str, nn.Module] = {} if teacher is None or not compile_teacher else {"teacher": teacher}
    modules["student"] = distiller
    images, given = batch

    def step() -> None:
        with accelerator.autocast():
            out = distiller(images, {**given, **(teacher(images) if teacher is not None else {})})
        out.loss.backward()

    def compile_one(module: nn.Module) -> None:
        module.compile(fullgraph=True, dynamic=False, backend=backend)

    with set_up("default", len(distiller.terms)):
        began = perf_counter()
        failed = try_each(step, modules, compile_one, accelerator.device)
        seconds = perf_counter() - began
    compile_whole(list(modules.values()), None)
    return Compiled(backend, seconds, "; ".join(f"{name}: {why}" for name, why in failed.items()))
