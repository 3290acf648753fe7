"""What several processes must do as one: act on the main one, and agree on what buffers hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from ..config import ConfigError, one_line

Given = TypeVar("Given")
LOST_WORKER, LOST_PEER = "DataLoader worker", ("gloo", "Connection closed by peer", "Connection reset by peer")


def on_main(accelerator: Accelerator, action: Callable[[], Given]) -> Given:
    """What ``action`` gives on the main process, on each of them; it waits for all.

    Raises:
        ConfigError, OSError, ValueError, FloatingPointError: what it raises on the main process, on every one.
    """
    if accelerator.num_processes == 1:
        return action()
    told: list[object] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = action()
        except (ConfigError, OSError, ValueError, FloatingPointError) as error:
            told[1] = error
    broadcast_object_list(told)
    if isinstance(told[1], Exception):
        raise told[1]
    return told[0]  # type: ignore[return-value]


def share_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Gives every process the main one's buffers: batch statistics differ between them until the next forward."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            buffer.copy_(broadcast(buffer))


@contextmanager
def losses_told() -> Iterator[None]:
    """Puts the loss of a worker or of another process of the job into one line.

    Raises:
        ChildProcessError: a worker that reads images ended.
        ConnectionError: another process of the job ended.
    """
    try:
        yield
    except RuntimeError as error:
        reason = one_line(error, 160)
        if LOST_WORKER in reason:
            raise ChildProcessError(
                f"a worker process that reads images was lost ({reason}); often for want of memory: lower data.workers "
                "or data.batch_size, and start again"
            ) from error
        if dist.is_available() and dist.is_initialized() and any(word in reason for word in LOST_PEER):
            raise ConnectionError(f"another process of this job ended ({reason}); start the job again") from error
        raise
