"""FSDP2: each process keeps a piece of every parameter, gradient and optimizer state; whole is only what is looked at.

accelerate reads how it was launched, and counts, clips and steps; here the pieces are made and put together again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import broadcast
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..distiller import Distilled, Distiller

OPTIMIZERS = ("Adam", "AdamW", "Lamb", "Lion", "NAdamW", "SGD")
"""Those that were seen to do with pieces what they do with whole tensors (tests/test_sharding.py)."""
FUSED = ("Adam", "AdamW")
"""Those whose fused kernel takes pieces."""


def begin(accelerator: Accelerator) -> None:
    """Makes accelerate shard on CPUs too, where it takes DDP in silence when FSDP is asked for.

    Raises:
        ValueError: an option of FSDP that is not taken, in words that say what to do.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the environment
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin, grid = accelerator.state.fsdp_plugin, accelerator.parallelism_config
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP of version 1 is not taken; launch with --fsdp_version 2 (FSDP_VERSION=2)")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"FSDP2 takes precision none or bf16 (got {accelerator.mixed_precision}); or launch DDP")
    if plugin.activation_checkpointing:
        raise ValueError("FSDP2 is taken without activation checkpointing; launch without that option")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("FSDP2 is taken without parameters on the CPU; launch with --fsdp_offload_params false")
    if grid is not None and grid.total_size not in (1, grid.dp_shard_size):
        raise ValueError("FSDP2 is taken over all processes alike; launch without a parallelism config")


def shard(
    accelerator: Accelerator, distiller: Distiller, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None = None
) -> None:
    """Shards the distiller in place; blocks of the student that the launch's wrap policy names are gathered singly.

    All begin as the main process. The optimizer, which has no state yet, gets the pieces in place of the whole. The
    moving average is sharded at the same places. Parameters are gathered in float32: precision is autocast's, as under
    DDP.
    """
    parts, blocks = [distiller] + ([] if ema is None else [ema.module]), _blocks(accelerator, distiller.student)
    with torch.no_grad():
        for part in parts:
            for tensor in [*part.parameters(), *part.buffers()]:
                tensor.data = broadcast(tensor.data.contiguous())  # channels_last is not taken; images stay so
    names = {parameter: name for name, parameter in distiller.named_parameters()}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    again = accelerator.state.fsdp_plugin.reshard_after_forward
    _split(distiller, [f"student.{name}" for name in blocks], mesh, again)
    distiller.sharded = True
    sharded = dict(distiller.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        if type(optimizer).__name__ not in FUSED and "fused" in group:
            group["fused"] = False
    if ema is not None:
        _split(ema.module, blocks, mesh, again)
        ema.foreach = False  # its fused update wants a list of one kind, and buffers are whole


def check(distiller: Distiller, optimizer: torch.optim.Optimizer) -> None:
    """Whether they can be sharded; asks no other process.

    Raises:
        ValueError: a parameter without dimensions, which FSDP2 cannot shard, or an optimizer that was not tried.
    """
    for name, parameter in distiller.named_parameters():
        if parameter.ndim == 0:
            part, _, inside = name.partition(".")
            whose = (
                f"term {inside.partition('.')[0].rstrip('/')!r}" if part in ("losses", "adapters") else "the student"
            )
            raise ValueError(
                f"launch: FSDP2 cannot shard {name} of {whose}, a parameter without dimensions; give it the shape "
                "(1,), or launch DDP"
            )
    if type(optimizer).__name__ not in OPTIMIZERS:
        raise ValueError(
            f"launch: FSDP2 was not tried with the optimizer {type(optimizer).__name__}; take one of "
            f"{', '.join(OPTIMIZERS)}, or launch DDP"
        )


def _blocks(accelerator: Accelerator, student: nn.Module) -> list[str]:
    """The student's submodules that accelerate's wrap policy names, inner ones first.

    accelerate itself would look at the whole distiller, and fail on its lists of losses and adapters.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.set_auto_wrap_policy(student)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, student)
    inner = [(name, module) for name, module in student.named_modules() if name and policy is not None]
    callable_ = [(name, module) for name, module in inner if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
    return [name for name, module in reversed(callable_) if any(True for _ in module.parameters()) and policy(module)]


def _split(module: nn.Module, blocks: list[str], mesh: DeviceMesh, again: bool) -> None:
    for name in blocks:
        fully_shard(module.get_submodule(name), mesh=mesh, reshard_after_forward=again)
    fully_shard(module, mesh=mesh)


class Answers(nn.Module):
    """The student of a sharded distiller for evaluation: a pass through the distiller, which gathers and lets go."""

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def forward(self, images: Tensor) -> Tensor:
        out: Distilled = self.distiller(images, None)
        return out.logits


def release(module: nn.Module) -> None:
    """Lets go of what was gathered; does nothing where nothing is sharded."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every parameter is whole on every process, and backward passes reduce nothing; for ``autograd.grad``."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield
        return
    for part in parts:
        part.unshard()
    try:
        for part in parts:
            part.set_reshard_after_backward(False, recurse=False)
            part.set_requires_gradient_sync(False, recurse=False)
        yield
    finally:
        for part in parts:
            part.set_reshard_after_backward(True, recurse=False)
            part.set_requires_gradient_sync(True, recurse=False)
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's piece, which shares its memory with ``tensor``, or the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process, which all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tree: Any, keep: bool = True) -> Any:
    """A tree of mappings and lists with the pieces in it put together, on the CPU; every process takes part.

    torch's own ``get_optimizer_state_dict`` is not used: it takes a step with an optimizer that has no state yet.

    Args:
        keep: whether this process wants them; None stands in their place if not.
    """
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value, keep) for value in tree]
    if isinstance(tree, DTensor):
        tensor = full(tree)
        return tensor.cpu() if keep else None
    return tree


def pieces(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as ``like`` is; the main process's is what counts, and every process takes part."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors."""
    like = module.state_dict()
    module.load_state_dict(
        {name: pieces(value, like[name]) if name in like else value for name, value in state.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``load_state_dict`` of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = {
        i: {k: _beside(v, parameters[i]) if isinstance(v, Tensor) else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": held})


def _beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """An optimizer's tensor, sharded as its parameter is, or in the parameter's order of memory.

    A file has lost that order, and a fused optimizer refuses what is in another one than its parameter.
    """
    if isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return pieces(tensor, parameter)
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def fill(copy: nn.Module, sharded: nn.Module) -> nn.Module:
    """A copy that was made before sharding, with the whole weights of ``sharded``; every process takes part."""
    copy.load_state_dict(whole(sharded.state_dict()))
    return copy
