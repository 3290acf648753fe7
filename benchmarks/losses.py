"""Time and peak memory, forward and backward, of every loss against its plain definition.

    python benchmarks/losses.py --out benchmarks/results/losses.json
    python benchmarks/losses.py --cpu --only nst rkd_angle

Batches of 64 at ImageNet's shapes on a GPU, small ones with --cpu (one thread, no memory measured). Ratios are within
one run: plain over ours, so above 1 is faster or smaller. Peak memory is what is allocated beyond inputs, parameters
and buffers, the graph that forward leaves for backward included. What does not fit into --memory is said to, and the
rest goes on.
The plain definitions are those that the tests compare values with, tests/losses_plain.py.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from losses_plain import PLAIN

from kdlib import losses
from kdlib.losses import LOSSES

Shape = tuple[int, ...]
LEVELS = [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7)]
VIEWS: dict[str, list[Shape]] = {
    "logits": [(64, 1000)],
    "embedding": [(64, 2048)],
    "tokens": [(64, 196, 384)],
    "map": [(64, 512, 14, 14)],
    "raw": [(64, 512, 14, 14)],
}
SHAPES: dict[str, list[Shape]] = {
    "gram_relation": [(64, 3136, 64)],
    "ickd": [(64, 2048, 7, 7)],
    "rkd_distance": [(256, 2048)],
    "rkd_angle": [(256, 2048)],
    "fsp": [(64, 256, 28, 28), (64, 512, 14, 14)],
    "channel_wise": [(64, 64, 56, 56)],
    "attention_transfer": [(64, 256, 56, 56)],
}
"""Where a loss is used at another place than its view's usual one."""
SAMPLES = 1_281_167


def make(name: str, small: bool) -> nn.Module:
    special: dict[str, Callable[[], nn.Module]] = {
        "standardized": lambda: losses.Standardized(losses.SoftTarget(2.0)),
        "learnable_temperature": lambda: losses.LearnableTemperature(losses.SoftTarget()),
        "top_k": lambda: losses.TopK(losses.SoftTarget(), 3 if small else 100),
        "crd": lambda: losses.CRD(500, 16, 64) if small else losses.CRD(SAMPLES),
    }
    return special.get(name, LOSSES[name])()


def shrunk(shape: Shape) -> Shape:
    """A shape of the same kind that a CPU does in milliseconds."""
    return (4, *(max(2, n // 8) if n > 60 else max(2, n // 4) for n in shape[1:]))


def prepare(name: str, device: torch.device, small: bool) -> tuple[nn.Module, list[Any], list[Shape]]:
    torch.manual_seed(0)
    loss: Any = make(name, small)
    shapes = LEVELS if loss.lists and name not in SHAPES else SHAPES.get(name, VIEWS[loss.view])
    shapes = [shrunk(shape) for shape in shapes] if small else shapes
    student, teacher = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
    batch, last = shapes[0][0], shapes[-1]
    given = {
        "teacher": teacher if loss.lists else teacher[0],
        "labels": torch.arange(batch, device=device) % last[1],
        "indices": torch.arange(batch, device=device),
    }
    s = student if loss.lists else student[0]
    loss.fit(s, given["teacher"], head=nn.Linear(last[1], 1000).to(device))
    return loss.to(device), [s, *(given[need] for need in loss.against)], shapes


def measure(call: Callable[..., Tensor], loss: nn.Module, inputs: list[Any], seconds: float) -> dict[str, float | None]:
    device = (inputs[0][0] if isinstance(inputs[0], list) else inputs[0]).device
    clock, peak = (_Cuda(), True) if device.type == "cuda" else (_Cpu(), False)
    result: dict[str, float | None] = {"forward_ms": 0, "backward_ms": 0, "forward_mib": None, "backward_mib": None}
    forward, backward = [], []
    began = time.perf_counter()
    while len(forward) < 3 or (time.perf_counter() - began < seconds and len(forward) < 50):
        students = [x.detach().requires_grad_() for x in (inputs[0] if isinstance(inputs[0], list) else [inputs[0]])]
        student = students if isinstance(inputs[0], list) else students[0]
        loss.zero_grad(set_to_none=True)
        if peak:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        marks = [clock.mark()]
        value = call(student, *inputs[1:])
        marks.append(clock.mark())
        if peak:
            result["forward_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            torch.cuda.reset_peak_memory_stats()
        marks.append(clock.mark())
        value.backward()
        marks.append(clock.mark())
        if peak:
            result["backward_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        forward.append(clock.between(marks[0], marks[1]))
        backward.append(clock.between(marks[2], marks[3]))
        result["value"] = value.item()
    skip = 1 if len(forward) < 5 else 2
    return result | {"forward_ms": statistics.median(forward[skip:]), "backward_ms": statistics.median(backward[skip:])}


class _Cpu:
    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class _Cuda:
    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def bench(name: str, device: torch.device, small: bool, seconds: float) -> dict[str, Any]:
    loss, inputs, shapes = prepare(name, device, small)
    row: dict[str, Any] = {"loss": name, "shapes": [list(shape) for shape in shapes]}
    row["ours"] = attempt(loss, loss, inputs, seconds)
    plain_loss = copy.deepcopy(loss)
    row["plain"] = attempt(lambda *x: PLAIN[name](plain_loss, *x), plain_loss, inputs, seconds)
    return row


def attempt(call: Callable[..., Tensor], loss: nn.Module, inputs: list[Any], seconds: float) -> dict[str, Any]:
    """What ``measure`` gives, or ``{"failed": …}``; nothing that was allocated stays."""
    try:
        return measure(call, loss, inputs, seconds)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        loss.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def ratio(row: dict[str, Any], what: str) -> str:
    """Plain over ours, both passes together; memory: the larger peak of the two passes."""
    for who in ("ours", "plain"):
        if "failed" in row[who]:
            return str(row[who]["failed"])
    plain, ours = (_total(row[who], what) for who in ("plain", "ours"))
    return "-" if plain is None or ours is None else f"{plain / max(ours, 1e-9):.2f}"


def _total(measured: dict[str, float | None], what: str) -> float | None:
    parts = [measured[f"forward_{what}"], measured[f"backward_{what}"]]
    known = [part for part in parts if part is not None]
    return None if len(known) < 2 else sum(known) if what == "ms" else max(known)


def show(row: dict[str, Any]) -> str:
    def cell(who: str, key: str) -> str:
        number = row[who].get(key)
        return "-" if number is None else f"{number:.2f}"

    keys = ("forward_ms", "backward_ms", "forward_mib", "backward_mib")
    numbers = [cell(who, key) for who in ("ours", "plain") for key in keys]
    shape = "x".join(map(str, row["shapes"][-1])) + ("…" if len(row["shapes"]) > 1 else "")
    return f"{row['loss']:24}{shape:18}" + "".join(f" {n:>10}" for n in [*numbers, ratio(row, "ms"), ratio(row, "mib")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--only", nargs="+", choices=sorted(LOSSES), default=list(LOSSES), metavar="LOSS")
    parser.add_argument("--seconds", type=float, help="for each loss and each of its two forms (1; 0.05 with --cpu)")
    parser.add_argument("--memory", type=float, default=100, metavar="GIB", help="of the GPU, no more (100)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu else "cuda")
    if args.cpu:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("no GPU here: give --cpu")
    else:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 2**30 / whole))
    seconds = args.seconds or (0.05 if args.cpu else 1.0)
    heads = [f"{who} {what}" for who in ("our", "plain") for what in ("fwd ms", "bwd ms", "fwd MiB", "bwd MiB")]
    print(f"{'loss':24}{'shape':18}" + "".join(f"{h[:10]:>11}" for h in [*heads, "time x", "memory x"]))
    about = {
        "device": platform.processor() or "cpu" if args.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "memory_gib": None if args.cpu else args.memory,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
    }
    rows = []
    for name in args.only:
        rows.append(bench(name, device, args.cpu, seconds))
        print(show(rows[-1]), flush=True)
        if args.out:  # row by row: what was measured is kept if the rest is cut off
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
