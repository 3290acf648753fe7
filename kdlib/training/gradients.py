"""Whose gradient is how large: the objective's gradient, taken apart term by term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..distiller import Distiller
from . import sharding
from .unchanged import unchanged


def norm(accelerator: Accelerator, module: nn.Module, clip: float | None) -> Tensor:
    """The norm of a step's gradient before it is clipped to ``clip``, 0-dimensional, on the device.

    Zero before the step's last batch: the gradient is not whole, and not the same on all processes.
    """
    if not accelerator.sync_gradients:
        return torch.zeros((), device=accelerator.device)
    if clip is not None:
        found: Tensor = accelerator.clip_grad_norm_(module.parameters(), clip)
    else:
        accelerator.unscale_gradients()
        found = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return sharding.full(found)


def by_term(
    distiller: Distiller, images: Tensor, targets: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]
) -> dict[str, Tensor]:
    """The norm of each live term's gradient, its weight included, over ``parameters``.

    One forward pass and as many backward passes as there are live terms. Parameters keep their gradients; buffers and
    random numbers move on, as in any forward pass.

    Returns:
        term name to a 0-dimensional tensor on the device, in the order of the terms.
    """
    _, values = distiller.values(images, targets)
    weights, trained = distiller.weights_in_force(), [p for p in parameters if p.requires_grad]
    norms: dict[str, Tensor] = {}
    for name, value in values.items():
        # grad, not backward: the wrapper that sends gradients to other processes has no part in this
        found = torch.autograd.grad(weights[name] * value, trained, retain_graph=True, allow_unused=True)
        norms[name] = torch.nn.utils.get_total_norm([gradient for gradient in found if gradient is not None])
    return norms


def mean_by_term(
    accelerator: Accelerator, distiller: Distiller, images: Tensor, targets: Mapping[str, Tensor], of: nn.Module
) -> dict[str, float]:
    """``by_term`` over the parameters ``of`` a part of the distiller, mean over processes; nothing moves on by it."""
    alone = unchanged([distiller], accelerator.device, gradients=False)
    with alone, sharding.gathered(distiller), accelerator.autocast():
        norms = by_term(distiller, images, targets, list(of.parameters()))  # now, while they are whole
    mean = accelerator.reduce(torch.stack(list(norms.values())), reduction="mean").tolist()
    return dict(zip(norms, mean, strict=True))
