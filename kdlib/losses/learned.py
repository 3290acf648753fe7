"""What losses with parameters share: sizes, precision, and the teacher's head that they may hold."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .base import Loss


class Learned(Loss):
    """A loss with parameters. They exist once sizes are known: from the constructor, or from examples by ``fit``.

    Subclasses implement ``measure`` (sizes of two examples) and ``build`` (the modules of those sizes).
    """

    of_one_pair = True
    """Published code has one of these for each pair of features: what one learns fits no other."""
    sizes: tuple[Any, ...] | None = None
    """What ``build`` was given: the student's and the teacher's channels; None before that."""

    def measure(self, student: Any, teacher: Any) -> tuple[Any, ...]:
        """Sizes of the examples: channels, the axis after the batch's."""
        return student.shape[1], teacher.shape[1]

    def build(self, *sizes: Any) -> None:
        """Makes the parameters."""
        raise NotImplementedError

    def size(self, *sizes: Any) -> None:
        """Builds from the constructor's sizes; does nothing while none is given.

        Raises:
            ValueError: some sizes are given and some are not.
        """
        if all(size is None for size in sizes):
            return
        if any(size is None for size in sizes):
            raise ValueError(f"{type(self).__name__}: give all of its sizes or none (then fit finds them), got {sizes}")
        self.build(*sizes)
        self.sizes = tuple(tuple(size) if isinstance(size, list) else size for size in sizes)

    def fit(self, student: Any, teacher: Any, head: nn.Module | None = None) -> None:
        """Sizes and builds from one example of each input.

        Raises:
            ValueError: the loss has been built already, for other sizes.
        """
        found = self.measure(student, teacher)
        if self.sizes is None:
            self.size(*found)
            self.to((student[0] if isinstance(student, (list, tuple)) else student).device)
        elif self.sizes != found:
            raise ValueError(
                f"{type(self).__name__} was built for sizes {self.sizes} and is given features of {found}; "
                "give features of each size a loss, and so a term, of their own"
            )

    def require_fit(self) -> None:
        """Raises ValueError before the parameters exist."""
        if self.sizes is None:
            raise ValueError(
                f"{type(self).__name__} has no parameters yet: give its sizes to the constructor, or call "
                "fit(student, teacher) with one example of each before the optimizer is made"
            )


def run(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` in the precision of ``x``, whatever the precision of the module's parameters is."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # torch 2.6 cannot compile dict | dict
    if all(v.dtype == x.dtype for v in state.values() if v.is_floating_point()):
        return module(x)
    lifted = {name: v.to(x.dtype) if v.is_floating_point() else v for name, v in state.items()}
    y: Tensor = torch.func.functional_call(module, lifted, (x,))
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(lifted[name])
    return y


class HoldsHead(Learned):
    """A loss that runs features through a frozen copy of the teacher's classifier.

    The copy is kept outside the module's registry: it moves with the loss and is copied and pickled with it, but is in
    neither ``parameters()`` nor ``state_dict()``, so no optimizer trains it and no checkpoint holds it.
    """

    wants_head = True
    held: tuple[nn.Module, ...] = ()

    def hold(self, head: nn.Module | None) -> None:
        if head is not None:
            self.held = (deepcopy(head).requires_grad_(False).eval(),)

    def fit(self, student: Any, teacher: Any, head: nn.Module | None = None) -> None:
        super().fit(student, teacher)
        if not self.held:
            self.hold(head)

    def classify(self, pooled: Tensor) -> Tensor:
        """The teacher's classifier on pooled features ``(B, C)``.

        Raises:
            ValueError: no head was given.
        """
        if not self.held:
            raise ValueError(
                f"{type(self).__name__} needs the teacher's classifier: pass head= to the constructor or to fit"
            )
        return run(self.held[0], pooled)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        for head in self.held:
            head._apply(fn)
        return super()._apply(fn, recurse)
