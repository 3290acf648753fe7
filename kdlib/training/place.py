"""Where a run takes place: the launch is checked, accelerate started, threads, precision of products and layout set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

from ..config import ConfigError, one_line
from ..recipe import Recipe
from . import sharding

FOREIGN = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
"""What accelerate launches and kdlib does not take: by its variable, and by name."""
LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


def start(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, its threads set.

    Raises:
        ConfigError: the launcher started several processes that do not know of each other, or a precision that this
            device does not have.
    """
    for kind, name in FOREIGN.items():
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ConfigError(
                [f"launch: {name} is not taken; launch with --use_fsdp --fsdp_version 2, which shards too"]
            )
    try:
        precision = "no" if recipe.precision == "none" else recipe.precision
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # keeps no second copy of the gradients
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[ddp])
    except ValueError as error:
        what = "launch" if recipe.precision == "none" else f"precision: {recipe.precision} cannot be had here"
        raise ConfigError([f"{what}: {one_line(error)}"]) from None
    except torch.distributed.DistError as error:
        raise ConnectionError(f"launch: the processes cannot meet ({one_line(error, 200)})") from None
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":  # where autocast passes it over in silence
        raise ConfigError(["precision: fp16 needs a GPU, and there is none; say bf16 or none"])
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise ConfigError(
            [
                f"launch: {world} processes were started, but each runs alone (no GPU, and ACCELERATE_USE_CPU is not "
                "set); on CPUs start with ACCELERATE_USE_CPU=true torchrun --nproc-per-node …"
            ]
        )
    if accelerator.distributed_type not in LAUNCHES:
        kind = accelerator.distributed_type.value
        raise ConfigError([f"launch: {kind} is not taken; launch DDP or FSDP2 (docs/distributed.md)"])
    try:
        sharding.begin(accelerator)
    except ValueError as error:
        raise ConfigError([f"launch: {error}"]) from None
    torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    if recipe.threads or (accelerator.device.type == "cpu" and world == 1):
        torch.set_num_threads(recipe.threads or cores())  # accelerate launch leaves one thread on a CPU
    return accelerator


@contextmanager
def left_as_found(accelerator: Accelerator) -> Iterator[None]:
    """Afterwards the accelerator holds nothing of a run, and the loss scale of fp16 is as before.

    A run begins alike whether others were made in this process before or not.
    """
    scaler = accelerator.scaler
    scale = None if scaler is None else scaler.state_dict()
    try:
        yield
    finally:
        accelerator.free_memory()
        if scale is not None:
            scaler.load_state_dict(scale)


def channels_last(asked: bool | Literal["auto"], student: torch.nn.Module, accelerator: Accelerator) -> bool:
    """What the key of a recipe means here."""
    if asked != "auto":
        return asked
    convolutions = [module for module in student.modules() if isinstance(module, torch.nn.Conv2d)]
    return accelerator.device.type == "cuda" and not accelerator.is_fsdp2 and len(convolutions) > 1


def cores() -> int:
    """Cores that this process may use; a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
