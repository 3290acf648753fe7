"""Whose gradient is how large: the objective's gradient, taken apart term by term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .distiller import Distiller


def norm(accelerator: Accelerator, module: nn.Module, clip: float | None) -> Tensor:
    """The norm of the whole gradient before it is clipped to ``clip``, 0-dimensional, on the device."""
    if clip is not None:
        found: Tensor = accelerator.clip_grad_norm_(module.parameters(), clip)
        return found
    accelerator.unscale_gradients()
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def by_term(
    distiller: Distiller, images: Tensor, targets: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Tensor]:
    """The norm of each live term's gradient, its weight included, over ``parameters``.

    One forward pass and as many backward passes as there are live terms. Parameters keep their gradients; buffers and
    random numbers move on, as in any forward pass.

    Returns:
        term name to a 0-dimensional tensor on the device, in the order of the terms.
    """
    weights = distiller.weights.requires_grad_(True)
    try:
        # .forward: neither a compiled graph nor the wrapper that sends gradients has a part in this
        out = distiller.forward(images, targets)
        # the loss is linear in the weights: its derivative by a weight is that term's value, its graph attached
        (values,) = torch.autograd.grad(out.loss, weights, create_graph=True)
    finally:
        weights.requires_grad_(False)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    names = list(distiller.weights_in_force())
    norms: dict[str, Tensor] = {}
    for name in out.terms:
        i = names.index(name)
        found = torch.autograd.grad(values[i] * weights.detach()[i], trained, retain_graph=True, allow_unused=True)
        norms[name] = torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])
    return norms
