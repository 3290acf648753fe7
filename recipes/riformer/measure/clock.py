"""Devices, precisions, and how long a forward pass takes."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import timm
import torch
from torch import Tensor

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Name to dtype of weights and images. fp32 multiplies in float32, tf32 in TensorFloat-32 in matrix products and
convolutions alike: PyTorch's own default allows it to convolutions alone, which would favour them."""
WARM_UP = 3
"""Passes before those that count; the first one compiles."""


def get_device(name: str | None) -> torch.device:
    """The device that ``name`` says, "cpu" or "cuda[:n]"; None is for the GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:NUMBER")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs; --device cpu works")
    return device


def set_precision(name: str) -> torch.dtype:
    """The dtype of a precision; allows or forbids TensorFloat-32 for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return PRECISIONS[name]


def about(device: torch.device, **more: Any) -> dict[str, Any]:
    """What a reader must know to judge a time: the device, versions, the day, and ``more``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    } | more


@torch.inference_mode()
def mean_milliseconds(net: Callable[[Tensor], Any], images: Tensor, runs: int) -> float:
    """Mean time of ``runs`` forward passes: CUDA events on a GPU, the wall clock on a CPU."""
    if not images.is_cuda:
        began = time.perf_counter()
        for _ in range(runs):
            net(images)
        return 1e3 * (time.perf_counter() - began) / runs
    with torch.cuda.device(images.device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            net(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / runs
