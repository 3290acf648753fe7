"""Does a step compile whole, and how long does that take?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from accelerate import Accelerator
from torch import Tensor

from ..distiller import Distiller
from ..teacher import Teacher
from ..training.compiling import compile_whole


@dataclass(frozen=True)
class Compiled:
    """What came of it."""

    backend: str
    seconds: float
    """Of the first step, compilation included."""
    error: str
    """Why not; empty if it did."""


def try_compile(
    distiller: Distiller,
    teacher: Teacher | None,
    batch: tuple[Tensor, Mapping[str, Tensor]],
    accelerator: Accelerator,
    backend: str,
) -> Compiled:
    """Compiles teacher and distiller, each as one graph, runs a step forward and backward, and takes it off again.

    ``aot_eager`` proves that both are one graph, forward and backward, in seconds; ``inductor`` makes the kernels too.
    """
    modules = [distiller] if teacher is None else [distiller, teacher]
    images, given = batch
    began, error = perf_counter(), ""
    try:
        for module in modules:
            module.compile(fullgraph=True, dynamic=False, backend=backend)
        with accelerator.autocast():
            out = distiller(images, {**given, **(teacher(images) if teacher is not None else {})})
        out.loss.backward()
    except Exception as raised:  # the compiler's errors have no common class
        cause = getattr(raised, "inner_exception", None) or raised
        error = next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:200]
    finally:
        compile_whole(modules, None)
        distiller.zero_grad(set_to_none=True)
        torch.compiler.reset()
    return Compiled(backend, perf_counter() - began, error)
