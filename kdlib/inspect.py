"""The modules of a model: what may be tapped, what it returns, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Size, Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .adapters import find_layout
from .pairing import find
from .taps import in_eval


@dataclass(frozen=True)
class Node:
    """One submodule."""

    tap: str
    """Its name, which taps what it returns; with ``:input`` behind it, what it is given."""
    kind: str
    """The name of its class."""
    shape: tuple[int, ...]
    """Of what it returns, without the batch; empty where that is no tensor."""
    layout: str
    """``NCHW``, ``NLC+1``, …; empty where shapes do not tell."""
    parameters: int
    """Numbers in it and below."""
    flops: int
    """Of it and below for one image: products, convolutions and attention; a multiply-add is two."""
    note: str
    """Why it cannot be tapped; empty where it can."""


@torch.no_grad()
def inspect(model: nn.Module, images: Tensor, depth: int | None = None, pattern: str | None = None) -> list[Node]:
    """Runs the model once, in eval mode, and tells what each of its submodules is; its mode is restored.

    Args:
        images: ``(B, C, H, W)``; one is enough.
        depth: only so many levels; 1 is the model's direct children.
        pattern: only what it finds, see ``pair``.

    Raises:
        ValueError: a pattern that finds nothing.
    """
    wanted = None if pattern is None else {tap.partition(":")[0] for tap in find(model, pattern)}
    answers: dict[str, list[object]] = {}
    modules = {name: module for name, module in model.named_modules() if name}
    handles = [
        module.register_forward_hook(partial(_note, answers.setdefault(name, []))) for name, module in modules.items()
    ]
    try:
        with in_eval(model), FlopCounterMode(display=False) as counter:
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    flops = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    root, prefix = type(model).__name__, getattr(model, "num_prefix_tokens", None)
    return [
        _node(name, module, answers[name], flops.get(f"{root}.{name}", 0), images.shape, prefix)
        for name, module in modules.items()
        if (depth is None or name.count(".") < depth) and (wanted is None or name in wanted)
    ]


def _note(sink: list[object], module: nn.Module, args: object, output: object) -> None:
    sink.append(output.shape if isinstance(output, Tensor) else type(output).__name__)


def _node(
    name: str, module: nn.Module, answers: Sequence[object], flops: int, images: Size, prefix: int | None
) -> Node:
    shape, layout, note = Size(), "", ""
    if not answers:
        note = "not called"
    elif len(answers) > 1:
        note = f"called {len(answers)} times; tap its parent"
    elif not isinstance(answers[0], Size):
        note = f"returns {answers[0]}; tap a submodule of it"
    else:
        shape = answers[0]
        try:
            layout = find_layout(shape, images, prefix)
        except ValueError:
            layout = ""
    parameters = sum(p.numel() for p in module.parameters())
    return Node(name, type(module).__name__, tuple(shape[1:]), layout, parameters, flops // images[0], note)
