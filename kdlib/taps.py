"""Listen to tensors inside a model, by name.

A *tap* names one tensor of a forward pass:

    "stages.0.blocks.1.token_mixer"         what that submodule returns
    "stages.0.blocks.1.token_mixer:input"   what it is given (its first argument, by place or by name)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class EarlyStop(Exception):
    """Ends a forward pass whose taps have all fired; ``Taps`` catches it."""


class FiredTwice(RuntimeError):
    """A tap saw a second tensor in one forward pass."""


class Taps:
    """Hooks on ``names`` of ``model``. As a context it gives a dict that one forward pass fills.

    Outside the context the hooks do nothing, so activation checkpointing, which runs a forward again during backward,
    leaves what was captured alone. Hooks are bound partials: a deepcopy of the model gets silent hooks of its own, and
    pickle works. Register (construct) first, compile afterwards: a compiled model ignores hooks that come later.

    Args:
        model: where the submodules are looked up.
        names: taps, see the module's docstring. Duplicates are one.

    Raises:
        ValueError: a name is no submodule (the nearest names are given).
        RuntimeError: on leaving the context, a tap never fired or its tensor was changed in place since; inside it, a
            tap fired twice or gave something that is no tensor.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.live = self.names
        """The taps that listen; a subset of ``names``."""
        self._sink: dict[str, Tensor] | None = None
        self._versions: dict[str, int] = {}
        self._stop_early = False
        self.run_on = False
        """Run a pass that may stop early to its end, as ``fit`` does once, to see whether a tap fires again there."""
        modules = dict(model.named_modules(remove_duplicate=False))  # a tied module has several names
        for name in self.names:
            _check(name, modules, type(model).__name__)
        self._handles = [self._listen(modules[name.partition(":")[0]], name) for name in self.names]

    def watch(self, model: nn.Module, images: Tensor, stop_early: bool = False) -> tuple[Any, dict[str, Tensor]]:
        """``(answer, seen)`` of one forward pass; traceable by ``torch.compile`` as one graph.

        Args:
            stop_early: end the pass once every live tap has fired; the answer is then None, and a tap that would fire
                again is not noticed. A compiled pass runs on: the compiler removes what nobody uses.
        """
        if torch.compiler.is_compiling():  # Dynamo before torch 2.12 enters no context manager but its own
            self._sink = {}
            answer, seen, self._sink = model(images), self._sink, None
            self._check_all(seen)
            return answer, seen
        self._stop_early, answer = stop_early, None
        with self as seen:
            answer = model(images)
        return answer, seen

    def _listen(self, module: nn.Module, name: str) -> RemovableHandle:
        if name.endswith(":input"):
            return module.register_forward_pre_hook(partial(self._store_input, name), with_kwargs=True)
        return module.register_forward_hook(partial(self._store_output, name))

    def _store_input(self, name: str, module: nn.Module, args: tuple[object, ...], named: dict[str, object]) -> None:
        given = [*args, *named.values()]
        self._store(name, given[0] if given else None)

    def _store_output(self, name: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self._store(name, output)

    def _store(self, name: str, value: object) -> None:
        if self._sink is None or name not in self.live:
            return
        if not isinstance(value, Tensor):
            raise RuntimeError(f"tap {name!r} gave {type(value).__name__}, not a tensor; tap a submodule of it instead")
        if value.is_nested:
            raise RuntimeError(
                f"tap {name!r} gave a nested tensor, as nn.TransformerEncoder makes them of padded sequences in eval "
                "mode; build it with enable_nested_tensor=False"
            )
        if name in self._sink:
            raise FiredTwice(f"tap {name!r} fired twice in one forward (a shared module?); tap its parent instead")
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            # a frozen model may write into the tensor later in the pass, and no version tells here: the compiler keeps
            # a copy where that is so, and drops the clone where it is not. A student that does so is refused by fit.
            value = value.clone()
        self._sink[name] = value
        if not torch.compiler.is_compiling():
            if not value.is_inference():
                self._versions[name] = value._version
            if self._stop_early and len(self._sink) == len(self.live):
                self._check_all(self._sink)
                if not self.run_on:
                    raise EarlyStop
                self._versions = {}  # behind the stop the model may change what it likes

    def __enter__(self) -> dict[str, Tensor]:
        self._sink, self._versions = {}, {}
        return self._sink

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        sink, early, self._sink, self._stop_early = self._sink or {}, self._stop_early, None, False
        if kind is None:
            self._check_all(sink)
        self._versions = {}  # a compiled pass, which may follow, would look at them
        if kind is None or issubclass(kind, FiredTwice):
            return False
        behind = early and self.run_on and len(sink) == len(self.live)  # where no other pass comes to
        return issubclass(kind, EarlyStop) or (behind and issubclass(kind, Exception))

    def _check_all(self, sink: dict[str, Tensor]) -> None:
        if silent := [name for name in self.live if name not in sink]:
            raise RuntimeError(
                f"taps never fired in this forward: {silent}; the model did not call these modules, or it was compiled "
                "before the taps were set (set taps first, compile afterwards)"
            )
        if stale := [name for name, version in self._versions.items() if sink[name]._version != version]:
            raise RuntimeError(
                f"tensors were changed in place after their tap: {stale}; tap the module that changes them (often an "
                "in-place activation), or build the model with inplace=False"
            )

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()


def _check(name: str, modules: dict[str, nn.Module], model: str) -> None:
    path, _, side = name.partition(":")
    if side not in ("", "input"):
        raise ValueError(f"no tap {name!r}: after the colon only 'input' may stand, got {side!r}")
    for wrapper in ("module", "_orig_mod"):
        if path not in modules and f"{wrapper}.{path}" in modules:
            raise ValueError(
                f"no tap {name!r} in {model}, which wraps the model that has it; give that model, and wrap or compile "
                "afterwards"
            )
    if path not in modules or not path:
        near = get_close_matches(path, modules, n=3, cutoff=0.4)
        raise ValueError(f"no tap {name!r} in {model}; did you mean {' or '.join(map(repr, near)) or 'a submodule'}?")


@contextmanager
def in_eval(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(answer: object, whose: str) -> Tensor:
    """A model's answer, which must be one tensor; ``whose`` it is, for the error.

    Raises:
        RuntimeError: it is something else.
    """
    if not isinstance(answer, Tensor):
        raise RuntimeError(
            f"the {whose} answers with {type(answer).__name__}, not one tensor; wrap it so that it returns logits"
        )
    return answer
