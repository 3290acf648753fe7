"""The fused RIFormer-M36 by kernels: whether it is right, how long each stage takes in which way, and the whole.

    python benchmarks/fused_blocks.py --budget 200 --out benchmarks/results/fused_blocks.json     one GPU, bf16
    python benchmarks/fused_blocks.py --cpu                               the same on small shapes, interpreted

error     ‖a - b‖ / ‖b‖ of the whole model's logits in bf16, with and without kernels, b in float32; random weights
stage     ms of a stage's blocks: compiled as they are, and by kernels with the hidden layer on chip or in two products,
          under several tile sizes
model     ms of the whole model: PoolFormer's and the fused one compiled, and by kernels with the best tiles (with and
          without a CUDA graph)

Medians over rounds in which all take turns. What is known is written after every row, and nothing is begun that would
not end within the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import timm
import torch
from torch import nn
from work import about

from recipes.riformer import model
from recipes.riformer.fast import FastBlocks, Tile, with_kernels

SIDES = (56, 28, 14, 7)
ON_CHIP = {
    96: [Tile(M=m, N=n, num_warps=w, num_stages=s) for m, n, w, s in
         ((128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3), (64, 32, 4, 3), (128, 128, 8, 2))],
    192: [Tile(M=m, N=n, num_warps=w, num_stages=s) for m, n, w, s in
          ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 1))],
    384: [Tile(M=64, N=32, num_warps=8, num_stages=2)],
}  # fmt: skip
PRODUCTS = [Tile(M=m, N=n, K=k, G=8, num_warps=w, num_stages=s) for m, n, k, w, s in
            ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (64, 128, 64, 4, 3),
             (128, 128, 32, 4, 4))]  # fmt: skip
INTERPRETED = {True: Tile(M=16, N=32), False: Tile(M=32, N=32, K=32, G=2)}
"""By whether the hidden layer stays on chip."""


def randomise(net: nn.Module) -> nn.Module:
    """Parameters of the size that trained ones have, none at its first value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("scale"):
                parameter.normal_(0, 0.1)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            elif "affine" in name:
                parameter.normal_(0.5, 0.5)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return net.eval()


def choices(stage: int, cpu: bool) -> list[tuple[bool, Tile]]:
    """Ways to run the blocks of a stage: (on chip, tile)."""
    dim = (96, 192, 384, 768)[stage]
    if cpu:
        return list(INTERPRETED.items()) if dim == 96 else []
    return [(True, tile) for tile in ON_CHIP.get(dim, [])] + [(False, tile) for tile in PRODUCTS if dim > 96]


def timed(run: Callable[[], Any], cpu: bool, repeats: int = 5) -> float:
    """ms of a call."""
    if not cpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(1 if cpu else repeats):
        run()
    if not cpu:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / (1 if cpu else repeats)


def turns(runs: dict[str, Callable[[], Any]], cpu: bool, rounds: int) -> dict[str, list[float]]:
    for run in runs.values():
        timed(run, cpu)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(1 if cpu else rounds):
        names = list(runs) if turn % 2 == 0 else list(reversed(runs))
        for name in names:
            found[name].append(timed(runs[name], cpu))
    return found


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as one launch."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def poolformer() -> nn.Module:
    return timm.create_model("poolformer_m36").to("cuda", torch.bfloat16).eval()


def compiled(net: nn.Module) -> Callable[..., Any]:
    return torch.compile(net.to(memory_format=torch.channels_last), fullgraph=True)


class Bench:
    """What is measured, the budget, and what is known so far."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.cpu, self.began = given, given.cpu, time.perf_counter()
        self.device = torch.device("cpu" if given.cpu else "cuda")
        self.dtype = torch.float32 if given.cpu else torch.bfloat16
        self.batch, self.pixels = (2, 32) if given.cpu else (128, 224)
        self.found = about(given.cpu, batch=self.batch, pixels=self.pixels, rows=[])
        more = {"depths": (1, 1, 1, 1)} if given.cpu else {}
        self.net = randomise(timm.create_model("riformer_m36", **more)).to(self.device)
        self.full = model.fuse(self.net, "full").eval().to(self.dtype)
        self.images = torch.randn(self.batch, 3, self.pixels, self.pixels, device=self.device)
        self.best: dict[int, tuple[bool, Tile]] = {}

    def left(self) -> float:
        return self.given.budget - (time.perf_counter() - self.began)

    def keep(self, **row: Any) -> None:
        self.found["rows"].append(row)
        self.found["seconds"] = round(time.perf_counter() - self.began, 1)
        print(json.dumps(row), flush=True)
        if self.given.out:
            self.given.out.parent.mkdir(parents=True, exist_ok=True)
            self.given.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def attempt(self, what: str, do: Callable[[], None]) -> None:
        if self.left() <= 0:
            self.keep(what=what, failed="the budget was used up")
            return
        try:
            do()
        except Exception as error:  # each way may fail in its own, and the others are worth their time
            self.keep(what=what, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def fast(self) -> nn.Module:
        fast = with_kernels(self.full)
        for i, stage in enumerate(fast.stages):
            on_chip, tile = self.best.get(i, (None, None))
            if self.cpu:
                on_chip, tile = i < 2, INTERPRETED[i < 2]
            stage.blocks = FastBlocks(stage.blocks.blocks, on_chip, tile)
            if self.cpu:
                stage.blocks.forward = stage.blocks.run
        return fast

    def error(self) -> None:
        with torch.inference_mode():
            few = self.images[:16]
            exact = self.net.float()(few)
            for name, net in (("plain", self.full), ("kernels", self.fast())):
                answer = net(few.to(self.dtype)).float()
                self.keep(what="error", who=name, relative=float((answer - exact).norm() / exact.norm()))

    def stage(self, i: int) -> None:
        blocks: Any = self.full.stages[i].blocks
        side = SIDES[i] // (14 if self.cpu else 1) or 1
        x = torch.randn(self.batch, side, side, (96, 192, 384, 768)[i], device=self.device, dtype=self.dtype)
        runs: dict[str, Callable[[], Any]] = {}
        if not self.cpu:
            plain = torch.compile(nn.Sequential(*blocks), fullgraph=True)
            runs["compiled"] = lambda: plain(x)
        with torch.inference_mode():
            expected = blocks.float()(x.float())
            blocks.to(self.dtype)
            for on_chip, tile in choices(i, self.cpu):
                name = f"{'on chip' if on_chip else 'two products'} {tile}"
                try:
                    fast = FastBlocks(blocks, on_chip, tile)
                    run = fast.run if self.cpu else fast
                    wrong = float((run(x).float() - expected).norm() / expected.norm())
                    if not wrong < 0.02:
                        self.keep(what="stage", stage=i + 1, who=name, failed=f"is off by {wrong:.3g}")
                        continue
                    runs[name] = lambda run=run: run(x)
                except Exception as error:
                    self.keep(what="stage", stage=i + 1, who=name, failed=" ".join(str(error).split())[:200])
            for name, ms in turns(runs, self.cpu, 8).items():
                self.keep(what="stage", stage=i + 1, blocks=len(blocks), who=name, ms=round(statistics.median(ms), 3))
        mine = {row["who"]: row["ms"] for row in self.found["rows"] if row.get("stage") == i + 1 and "ms" in row}
        names = {f"{'on chip' if on else 'two products'} {tile}": (on, tile) for on, tile in choices(i, self.cpu)}
        best = min((name for name in mine if name in names), key=mine.__getitem__, default=None)
        if best:
            self.best[i] = names[best]

    def models(self) -> None:
        images = self.images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        fast, runs = self.fast(), {}
        with torch.inference_mode():
            if not self.cpu:
                runs["kernels"] = graphed(lambda: fast(images))
                runs["kernels, no graph"] = lambda: fast(images)
            else:
                runs["kernels"] = lambda: fast(images)
            rivals = {"fused, compiled": lambda: self.full, "poolformer_m36, compiled": poolformer}
            for name, make in () if self.cpu else rivals.items():
                if self.left() < 40:
                    self.keep(what="model", who=name, failed="the budget was used up")
                    continue
                rival = compiled(make())
                rival(images)
                runs[name] = lambda rival=rival: rival(images)
            times = turns(runs, self.cpu, 15)
        for name, ms in times.items():
            low, middle, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
            self.keep(what="model", who=name, ms=round(middle, 3), quartiles=[round(low, 3), round(high, 3)],
                      images_per_second=round(1e3 * self.batch / middle))  # fmt: skip


def fill(given: argparse.Namespace) -> None:
    """Other processes compile side by side what the measurement will want from the caches."""

    def one(name: str) -> None:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, __file__, "--fill", name], timeout=given.budget / 2, check=False,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, ("poolformer", "fused", "0", "1", "2", "3")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--budget", type=float, default=200, help="seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        parser.error("no GPU is here; --cpu runs the same on small shapes, interpreted")
    if given.fill:
        bench = Bench(given)
        images = bench.images.to(bench.dtype).contiguous(memory_format=torch.channels_last)
        if given.fill.isdigit():
            bench.attempt("fill", lambda: bench.stage(int(given.fill)))
        else:
            with torch.inference_mode():
                compiled(bench.full if given.fill == "fused" else poolformer())(images)
        return
    bench = Bench(given)
    if not given.cpu:
        fill(given)
        bench.found["filling_s"] = round(time.perf_counter() - bench.began, 1)
    bench.attempt("error", bench.error)
    for i in range(4):
        bench.attempt(f"stage {i + 1}", lambda i=i: bench.stage(i))
    bench.attempt("error", bench.error)
    bench.attempt("models", bench.models)


if __name__ == "__main__":
    main()
