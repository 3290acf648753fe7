"""One training step: what distillation costs beside its own parts, by hand, by kdlib and by others.

    python benchmarks/step.py --budget 540 --jobs 6 --out benchmarks/results/step.json     one GPU, 224 px, bf16
    python benchmarks/step.py --cpu --out benchmarks/results/step_cpu.json                 one core, small models, eager

blocks    RIFormer-S12 from PoolFormer-S12: soft targets and the mean squared error of each stage's last block
whole     RIFormer's objective: GFNet-H-B and PoolFormer-S12 as teachers, four terms
small     the whole objective for the 64 px models, which are bound by kernel launches

floor is every teacher's forward and a step by labels alone: what any distillation must pay. by hand is a loop of one's
own for the same objective. On a GPU these and kdlib run in channels_last, and kdlib tells and reads features in bf16,
as a run of a recipe does; pure bf16 has teachers that compute in it throughout (teacher_autocast: false). The peers run
as they come; timm.task has labels and soft targets alone, and kdlib (logits only) does the same. The contestants of a
work take turns, round by round, every second round backwards; ms is the median over rounds, MiB the peak that a
contestant adds while it steps, loss that of the first step. of_floor and of_hand are the quartiles over rounds of the
ratio to the floor, and to the loop by hand, of that round and mode; on a CPU they are ratios of processor time, which
other programs disturb less than the wall's clock.

Compiled contestants take a minute each to start. --jobs has others fill the compiler's cache first, side by side, and
--budget leaves out what would not be done in time: what there is is written after every round.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peers
from contestants import OURS, Build, contestants, modes
from work import Step, Work, about, busy, kernels_of, works

MODES = ("eager", "default", "reduce-overhead", "graphs", "compiled-graphs")
Row = dict[str, Any]


def main() -> None:
    given = arguments()
    began = time.perf_counter()
    left = lambda: given.budget - (time.perf_counter() - began)  # noqa: E731
    if given.cpu:
        torch.set_num_threads(1)
    else:
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.cache_size_limit = 64  # many models pass through one process
    batch = given.batch or (8 if given.cpu else 128)
    chosen = [name for name in works(given.cpu, 1) if not given.only or name in given.only]
    head = about(given.cpu, peers=peers.versions(), batch=batch, rounds=given.rounds, budget=given.budget,
                 precision="float32" if given.cpu else "bf16 autocast", busy_before=busy())  # fmt: skip
    rows: list[Row] = []

    def keep() -> None:
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            seconds = round(time.perf_counter() - began, 1)
            given.out.write_text(json.dumps(head | {"seconds": seconds, "busy": busy(), "rows": rows}, indent=1) + "\n")

    if given.jobs:
        head["filling_s"] = fill_cache(given, chosen, left)
    for name in chosen:
        work = works(given.cpu, batch)[name]
        jobs = [(who, build, mode) for who, build in contestants(name).items() for mode in modes(name, who, given.cpu)
                if who in (given.who or [who]) and (mode or "eager") in given.modes]  # fmt: skip
        measure(name, work, jobs, given, rows, left, keep)
    if given.rounds:
        print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small models on one core")
    parser.add_argument("--only", nargs="+", metavar="WORK", help="blocks, whole, small")
    parser.add_argument("--who", nargs="+", metavar="CONTESTANT", help="'by hand', kdlib, …")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, help="images (128; 8 on a CPU)")
    parser.add_argument("--budget", type=float, default=1e6, help="seconds")
    parser.add_argument("--kernels", action="store_true", help="what ran on the GPU in a step, by torch.profiler")
    parser.add_argument("--jobs", type=int, default=0, help="processes that fill the compiler's cache first")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def fill_cache(given: argparse.Namespace, chosen: list[str], left: Callable[[], float]) -> float:
    """Compiles every contestant once in a process of its own, some at a time, in at most half of the budget.

    Returns:
        Seconds that it took.
    """
    began, end = time.perf_counter(), left() / 2
    say = [sys.executable, __file__, "--rounds", "0", *(["--batch", str(given.batch)] if given.batch else [])]
    jobs = [(name, who, mode) for name in chosen for who in contestants(name) for mode in modes(name, who, given.cpu)
            if mode and mode in given.modes and who in (given.who or [who])]  # fmt: skip

    def one(job: tuple[str, str, str]) -> None:
        name, who, mode = job
        rest = end - (time.perf_counter() - began)
        if rest > 0:
            try:
                subprocess.run([*say, "--only", name, "--who", who, "--modes", mode], timeout=rest,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # fmt: skip
            except subprocess.TimeoutExpired:
                print(f"{name}, {who}, {mode}: did not fill the cache in time", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, jobs))
    return round(time.perf_counter() - began, 1)


def measure(
    name: str, work: Work, jobs: list[tuple[str, Build, str | None]], given: argparse.Namespace, rows: list[Row],
    left: Callable[[], float], keep: Callable[[], None],
) -> None:  # fmt: skip
    """All contestants of a work, warm; then turn by turn."""
    torch.compiler.reset()  # of the work before; not between contestants, which would compile again in the first round
    runners: list[tuple[Row, Step]] = []
    best = work if given.cpu else work.in_channels_last()
    longest = {True: 0.0, False: 0.0}  # by whether it is compiled
    for who, build, mode in jobs:
        row: Row = {"work": name, "who": who, "mode": mode or "eager"}
        rows.append(row)
        if left() <= longest[mode is not None]:
            row["failed"] = f"not begun: {max(left(), 0):.0f} s were left"
        else:
            began = time.perf_counter()
            try:
                runners.append((row, warm(build, best if who in OURS else work, mode, row)))
            except Exception as error:  # a peer that cannot be had, a mode that fails: told, and the rest goes on
                row["failed"] = " ".join(str(error).split())[:300] or type(error).__name__
            longest[mode is not None] = max(longest[mode is not None], time.perf_counter() - began)
        print(json.dumps(row), flush=True)
        keep()
    clock = partial(time_of, repeats=1 if given.cpu else 5, work=work)
    taken: list[list[tuple[float, float]]] = [[] for _ in runners]
    for turn in range(given.rounds if left() > 0 else 0):
        order = list(range(len(runners)))
        for i in order if turn % 2 == 0 else reversed(order):
            taken[i].append(clock(runners[i][1]))
        summarise([row for row, _ in runners], taken)
        keep()
        if left() <= 0:
            break
    for row, _ in runners:
        if "ms" not in row and given.rounds:
            row["failed"] = "warm, but the budget was spent before its first round"
    if given.kernels and not given.cpu:
        for row, step in runners:
            row["kernels"] = kernels_of(step)
        keep()


def summarise(rows: list[Row], taken: list[list[tuple[float, float]]]) -> None:
    """Writes times and ratios so far into the rows."""
    times = {(row["who"], row["mode"]): [pair[1] for pair in both] for row, both in zip(rows, taken, strict=True)}
    for row, both in zip(rows, taken, strict=True):
        wall, own = [pair[0] for pair in both], times[row["who"], row["mode"]]
        row |= {"ms": round(statistics.median(wall), 3), "least": round(min(wall), 3)}
        for key, other in (("of_floor", "floor"), ("of_hand", "by hand")):
            if base := times.get((other, row["mode"])):
                row[key] = quartiles([ours / theirs for ours, theirs in zip(own, base, strict=True)])


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(value, 4) for value in (low, middle, high)]


def warm(build: Build, work: Work, mode: str | None, row: Row) -> Step:
    """The contestant's step, compiled and warm; its memory and the time of its first step go into the row."""
    cuda = work.images.is_cuda
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    step = build(work, mode)
    row["loss"] = round(step().item(), 4)
    row["first_step_s"] = round(time.perf_counter() - began, 2)
    for _ in range(4):
        step()
    if cuda and mode in (None, "default"):  # what is recorded has memory of its own, which is not counted so
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        row["MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    return step


def time_of(step: Step, repeats: int, work: Work) -> tuple[float, float]:
    """Milliseconds of a step: on the wall, and of the processor; on a GPU twice those on the wall."""
    cuda = work.images.is_cuda
    if cuda:
        step()
        torch.cuda.synchronize()
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    if cuda:
        torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - began) / repeats
    return wall, wall if cuda else 1e3 * (time.process_time() - worked) / repeats


def table(rows: list[Row]) -> str:
    lines = [f"{'work':8}{'who':26}{'mode':16}{'ms':>9}{'MiB':>7}{'of floor':>10}{'of hand':>10}"]
    for row in rows:
        ratio = [f"{row[key][1]:.3f}" if key in row else "-" for key in ("of_floor", "of_hand")]
        end = (
            row.get("failed", "")[:60] or f"{row.get('ms', 0):9.2f}{row.get('MiB', '-'):>7}{ratio[0]:>10}{ratio[1]:>10}"
        )
        lines.append(f"{row['work']:8}{row['who']:26}{row['mode']:16}{end}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
