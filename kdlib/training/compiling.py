"""torch.compile for a training step: teacher and distiller each as one graph, or as they are, told in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import nn

from .randomness import random_state, set_random_state

MODES = ("auto", "off", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "graphs", "compiled-graphs")
RECORDED = {"graphs": None, "compiled-graphs": "default"}
"""Modes of which a step is recorded as one CUDA graph, and how it is compiled before."""


def resolve(mode: str, device: torch.device) -> str | None:
    """What ``compile.mode`` means on ``device``: a mode of ``torch.compile``, or None for not at all.

    ``auto`` is ``default`` on a GPU and nothing elsewhere: a CPU gains less than compiling costs.
    """
    assert mode in MODES, mode
    if mode == "auto":
        return "default" if device.type == "cuda" else None
    return None if mode == "off" else mode


def compile_whole(modules: Sequence[nn.Module], mode: str | None) -> None:
    """Compiles each module in place as one graph (``fullgraph``), or with mode None takes compilation off again.

    Call it when all taps are set: a compiled module does not see hooks that come later. Backward passes are from now on
    compiled without autocast, as they run when nothing is compiled; by default torch compiles them under the autocast
    of the forward pass, and the float32 inside of losses would go backward in half precision.
    """
    if mode is not None and hasattr(functorch, "backward_pass_autocast"):  # older releases have no such choice
        functorch.backward_pass_autocast = "off"
    for module in modules:
        if mode is None:
            module._compiled_call_impl = None
        else:
            module.compile(fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)


def rehearse(
    step: Callable[[], object], modules: Sequence[nn.Module], mode: str, device: torch.device
) -> tuple[str | None, str]:
    """Compiles ``modules`` and runs ``step`` once, forward and backward, so that what cannot be compiled shows now.

    Buffers, gradients and random numbers are afterwards as they were before: a run is the same with and without it.

    Args:
        step: one forward and backward of all of ``modules``.

    Returns:
        ``(mode in force, a line for people)``: if a module cannot be compiled whole, compilation is taken off and the
        mode is None.

    Raises:
        Exception: whatever ``step`` raises when nothing is compiled.
    """
    started = perf_counter()
    compile_whole(modules, mode)
    try:
        with unchanged(modules, device):
            step()
        return mode, f"compiled ({mode}), first step {perf_counter() - started:.0f} s"
    except Exception as error:  # the compiler's errors have no common class
        why = reason(error)
    compile_whole(modules, None)
    with unchanged(modules, device):
        step()
    return None, f"runs without torch.compile, which cannot take it whole: {why}"


def begin_step(mode: str | None) -> None:
    """Tells the compiler's CUDA graphs that what the last step gave may be overwritten."""
    if mode == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()


def keep_gradients(module: nn.Module) -> None:
    """Moves gradients out of the compiler's CUDA graphs, so that the next batch adds to them instead of over them."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


@contextmanager
def unchanged(modules: Sequence[nn.Module], device: torch.device, gradients: bool = True) -> Iterator[None]:
    """Afterwards buffers and random numbers are as they were, and where ``gradients`` says so there are none."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    draws = random_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module in modules if gradients else ():
            module.zero_grad(set_to_none=True)
        set_random_state(draws, device)


def reason(error: BaseException) -> str:
    """The compiler's own first sentence, or that of what made it stop."""
    cause: Any = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if lines else type(cause).__name__)[:200].rstrip(os.linesep + ".")
