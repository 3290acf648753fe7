"""What is run on trial leaves no trace: buffers, gradients and random numbers are put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .randomness import random_state, set_random_state


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
