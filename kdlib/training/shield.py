"""A step that may turn out bad, undone on the device without waiting for its numbers."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .sharding import local

ONES = ("mu_product",)
"""State that an optimizer begins with one; all other begins with zero."""


class Shield:
    """Undoes an optimizer step on the device where it was bad, without the host knowing whether it was.

    ``remember`` before the first batch of a step copies all that the step may change, ``see`` takes the numbers of each
    of its batches, ``disarm`` comes before the optimizer's step and ``settle`` after it. What is put back: parameters,
    buffers (batch statistics, memories) and the optimizer's state, as far as it lives on the device; state that a
    parameter's first step made is as new again. It costs one more copy of all that. Where it is not ``on``, nothing of
    this happens.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, on: bool = True
    ) -> None:
        self.module, self.optimizer, self.accelerator, self.on = module, optimizer, accelerator, on

    @torch.no_grad()
    def remember(self) -> None:
        if not self.on:
            return
        state = [value for held in self.optimizer.state.values() for value in held.values()]
        tensors = [*self.module.parameters(), *self.module.buffers(), *state]
        parts = [local(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
        self.kept = [(part, part.clone()) for part in parts]
        self.begun = {parameter for parameter, held in self.optimizer.state.items() if held}
        self.bad = torch.zeros((), device=self.accelerator.device)

    def see(self, row: Tensor) -> None:
        if self.on:
            self.bad = self.bad + (~row.isfinite()).any()

    @torch.no_grad()
    def disarm(self) -> None:
        """Makes the gradients zero where the step is bad on any process, so that no state learns of them."""
        if not self.on:
            return
        self.good = self.accelerator.reduce(self.bad, reduction="sum") == 0
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                gradient = local(parameter.grad)
                gradient.copy_(torch.where(self.good, gradient, 0.0))

    @torch.no_grad()
    def settle(self) -> None:
        if not self.on:
            return
        for tensor, before in self.kept:
            if tensor.device == self.good.device:
                tensor.copy_(torch.where(self.good, tensor, before))
        for parameter, held in self.optimizer.state.items():
            for name, value in held.items() if parameter not in self.begun else ():
                if isinstance(value, Tensor) and (part := local(value)).device == self.good.device:
                    part.copy_(torch.where(self.good, part, 1.0 if name in ONES else 0.0))
        self.kept = []
