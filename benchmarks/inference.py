"""Inference of RIFormer in its three forms beside PoolFormer: milliseconds a batch, and ratios within this run.

python benchmarks/inference.py --out benchmarks/results/inference.json     one GPU, 224 px
python benchmarks/inference.py --cpu                                        two cores, the micro models at 64 px
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.riformer import gfnet, model  # noqa: F401  registers the models


def forms(size: str) -> dict[str, nn.Module]:
    """Every contestant of one size, parameters random: fresh ones would make some forms equal by accident."""
    torch.manual_seed(0)
    train = timm.create_model(f"riformer_{size}").eval()
    with torch.no_grad():
        for parameter in train.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pool = f"metaformer_pool_{size}" if size in ("nano", "micro") else f"poolformer_{size}"
    return {
        f"riformer_{size} train form": train,
        f"riformer_{size} fused, norm": model.fuse(train, "norm"),
        f"riformer_{size} fused, full": model.fuse(train, "full"),
        pool: timm.create_model(pool).eval(),
    }


@torch.inference_mode()
def milliseconds(net: nn.Module, images: Tensor, repeats: int) -> float:
    """Median of one forward pass, after warm-up."""
    for _ in range(3):
        net(images)
    taken = []
    for _ in range(repeats):
        if images.is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            net(images)
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            net(images)
            taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--sizes", nargs="+", default=None, help="default: s12 m36, or micro with --cpu")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device("cpu" if given.cpu else "cuda")
    sizes = given.sizes or (["micro"] if given.cpu else ["s12", "m36"])
    batch, side = given.batch or (32 if given.cpu else 128), 64 if given.cpu else 224
    settings = [("fp32", torch.float32)] if given.cpu else [("bf16", torch.bfloat16), ("fp32", torch.float32)]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows, base = [], float("nan")  # the train form comes first
    for size in sizes:
        for name, dtype in settings:
            images = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
            images = images.contiguous(memory_format=torch.channels_last)
            for label, net in forms(size).items():
                net = net.to(device, dtype).to(memory_format=torch.channels_last)
                if not given.cpu:
                    torch._dynamo.reset()
                    net = torch.compile(net, fullgraph=True)
                taken = milliseconds(net, images, 5 if given.cpu else 30)
                base = taken if "train form" in label else base
                row = {"model": label, "precision": name, "ms": taken, "images_per_second": 1e3 * batch / taken}
                rows.append(row)
                print(f"{label:28} {name} {taken:8.2f} ms   {base / taken:5.2f} × the train form", flush=True)
    if given.out:
        about = {
            "device": "CPU" if given.cpu else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "batch": batch,
            "side": side,
            "compiled": not given.cpu,
            "layout": "channels_last",
        }
        given.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
