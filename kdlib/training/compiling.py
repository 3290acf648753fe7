"""torch.compile for a training step: teacher and distiller each as one graph or as it is, told in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import nn

from .unchanged import unchanged

MODES = ("auto", "off", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "graphs", "compiled-graphs")
RECORDED = {"graphs": None, "compiled-graphs": "default"}
"""Modes of which a step is recorded as one CUDA graph, and how it is compiled before."""

BACKWARD = {"backward_pass_autocast": "off"} if hasattr(functorch, "backward_pass_autocast") else {}
"""Backward passes without autocast, as they run when nothing is compiled: by default torch compiles them under that of
the forward pass, and the float32 inside of losses would go backward in half precision. Older releases have none."""


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

    Call it when all taps are set: a compiled module does not see hooks that come later. Backward passes are compiled as
    ``BACKWARD`` says, from now on or until ``set_up`` ends.
    """
    if mode is not None and BACKWARD:
        functorch.backward_pass_autocast = BACKWARD["backward_pass_autocast"]
    for module in modules:
        if mode is None:
            module._compiled_call_impl = None
        else:
            module.compile(fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)


def rehearse(
    step: Callable[[], object], modules: Mapping[str, nn.Module], mode: str, device: torch.device
) -> tuple[str | None, str]:
    """Compiles ``modules`` and runs ``step``, forward and backward, so that what cannot be compiled shows now.

    One after the other, so that it is known which of them cannot; that one runs as it is. Buffers, gradients and random
    numbers are afterwards as they were before: a run is the same with and without it.

    Args:
        step: one forward and backward of all of ``modules``.
        modules: by what a person calls them; those whose answers others are given first, as what they answer then is
            what they will answer.

    Returns:
        ``(mode in force, a line for people)``: None where no module can be compiled whole.

    Raises:
        Exception: whatever ``step`` raises when nothing is compiled.
    """
    started = perf_counter()
    compile_whole(list(modules.values()), None)  # what was compiled before would fail in the name of the first
    failed = try_each(step, modules, lambda module: compile_whole([module], mode), device)
    if failed:
        with unchanged(list(modules.values()), device), _as_they_are(modules.values()):
            step()  # what it raises is not the compiler's fault
    why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    if len(failed) == len(modules):
        return None, f"runs without torch.compile, which cannot take it whole ({why})"
    but = f", but for what cannot be taken whole ({why})" if failed else ""
    return mode, f"compiled ({mode}), first step {perf_counter() - started:.0f} s{but}"


@contextmanager
def _as_they_are(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Without what was compiled, which comes back afterwards."""
    compiled = [(module, module._compiled_call_impl) for module in modules]
    compile_whole([module for module, _ in compiled], None)
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


def runs(step: Callable[[], object], modules: Mapping[str, nn.Module], device: torch.device) -> bool:
    """Whether what is compiled runs ``step`` too, with other terms on; tried as ``rehearse`` does."""
    try:
        with unchanged(list(modules.values()), device):
            step()
    except Exception:  # as in try_each; what is not the compiler's fault comes again without it
        return False
    return True


def try_each(
    step: Callable[[], object],
    modules: Mapping[str, nn.Module],
    compile_one: Callable[[nn.Module], None],
    device: torch.device,
) -> dict[str, str]:
    """Compiles each module and runs ``step``; what fails is taken off again, and the rest stays.

    Returns:
        name to the reason, of those that cannot be compiled.
    """
    failed = {}
    for name, module in modules.items():
        try:
            compile_one(module)
            with unchanged(list(modules.values()), device):
                step()
        except Exception as error:  # the compiler's errors have no common class
            failed[name] = reason(error)
            compile_whole([module], None)
    return failed


@contextmanager
def set_up(mode: str | None, graphs: int) -> Iterator[None]:
    """Sets the compiler up for a run, and leaves it afterwards as it was, with nothing compiled.

    A function may be compiled ``graphs`` times more than torch allows, and backward passes are as ``BACKWARD``. All
    distillers of a process share one ``forward``, of which torch keeps eight graphs; the ninth ends the run. A run
    needs one for each set of terms that are on, and teachers, baseline and student train in one process.
    """
    if mode is None or RECORDED.get(mode, mode) is None:
        yield
        return
    from torch._dynamo import config  # heavy, and only what compiles needs it

    try:
        more = config.patch(cache_size_limit=config.cache_size_limit + graphs)
        with more, functorch.patch(BACKWARD):
            yield
    finally:
        torch.compiler.reset()


def begin_step(mode: str | None) -> None:
    """Tells the compiler's CUDA graphs that what the last step gave may be overwritten."""
    if mode == "reduce-overhead":
        torch.compiler.cudagraph_mark_step_begin()


def keep_gradients(module: nn.Module) -> None:
    """Moves gradients out of the compiler's CUDA graphs, so that the next batch adds to them instead of over them."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def reason(error: BaseException) -> str:
    """The compiler's own first sentence, or that of what made it stop, and the line of the model that it stopped at."""
    cause: Any = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    places = re.findall(r'File "([^"]+)", line (\d+)', str(error).partition("from user code:")[2])
    where = f", at {Path(places[-1][0]).name}:{places[-1][1]}" if places else ""
    return (lines[0] if lines else type(cause).__name__)[:200].rstrip(os.linesep + ".") + where
