"""Weak scaling: the whole objective on 1, 2, … processes, each with the same number of images; times only.

    python benchmarks/scaling.py --processes 1 2 --out benchmarks/results/scaling.json     two GPUs of one machine
    python benchmarks/scaling.py --processes 1 2 --cpu                                     two gloo processes

Teacher and distiller compile whole on a GPU, as in a run; DistributedDataParallel holds the distiller. A step is
everything but the data: both teachers, the student forward and backward, the reduction of gradients, AdamW.

One process runs without any reduction, on each card in turn (cards_ms) while the others wait; its row is the slowest
card's. apart_ms is the slowest of n processes at the same time without any reduction, ranks_ms each of them: what they
are above one process's comes from the host that they share, and what n take above apart_ms is the reduction's.
Efficiency is the time of one process over that of n; its quartiles are over rounds. Rows are written one by one; on
GPUs with what ran on the first one in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contestants import kdlib_parts
from work import Step, about, busy, kernels_of, train, works

from kdlib.training import compiling

Rounds = list[list[float]]
"""Milliseconds of a step, round by round, of each process."""


def times(given: argparse.Namespace, processes: int) -> tuple[Rounds, Rounds, dict[str, Any] | None]:
    """A step without and with the reduction; and its kernels."""
    work = works(given.cpu, given.batch)["whole"]
    work = work if given.cpu else work.in_channels_last()
    teacher, distiller = kdlib_parts(work)
    compiling.compile_whole([teacher, distiller], None if given.cpu or given.eager else "default")

    def step_of(engine: Any) -> Step:
        return train(work, distiller, lambda: engine(work.images, teacher(work.images)).loss)

    step = step_of(distiller)
    apart = together = rounds(given, step, processes)
    if processes > 1:
        devices = None if given.cpu else [torch.cuda.current_device()]
        step = step_of(DistributedDataParallel(distiller, device_ids=devices, gradient_as_bucket_view=True))  # as a run
        together = rounds(given, step, processes)
    return apart, together, None if given.cpu else kernels_of(step)


def rounds(given: argparse.Namespace, step: Step, processes: int) -> Rounds:
    began = time.perf_counter()
    step()
    synchronize(given.cpu)
    print(f"{processes} processes: first step {time.perf_counter() - began:.0f} s", flush=True)
    for _ in range(0 if given.cpu else 4):
        step()
    found = []
    for _ in range(given.rounds):
        if processes > 1:
            dist.barrier()
        synchronize(given.cpu)
        began = time.perf_counter()
        for _ in range(given.repeats):
            step()
        synchronize(given.cpu)
        taken = [1e3 * (time.perf_counter() - began) / given.repeats]
        if processes > 1:
            everyone: list[Any] = [None] * processes
            dist.all_gather_object(everyone, taken[0])
            taken = everyone
        found.append(taken)
    return found


def slowest(rounds: Rounds) -> list[float]:
    return [max(each) for each in rounds]


def medians(rounds: Rounds) -> list[float]:
    """Of each process, over the rounds."""
    return [round(statistics.median(each), 3) for each in zip(*rounds, strict=True)]


def synchronize(cpu: bool) -> None:
    if not cpu:
        torch.cuda.synchronize()


def worker(rank: int, given: argparse.Namespace, processes: int, first: int, answer: Any) -> None:
    torch.set_num_threads(1)
    if not given.cpu:
        torch.cuda.set_device(first + rank)
        torch.set_float32_matmul_precision("high")
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(given.port), "RANK": str(rank),
                       "WORLD_SIZE": str(processes)}  # fmt: skip
        dist.init_process_group("gloo" if given.cpu else "nccl")
    found = times(given, processes)
    if rank == 0:
        answer.put(found)
    if processes > 1:
        dist.destroy_process_group()


def spawned(given: argparse.Namespace, processes: int, first: int) -> tuple[Rounds, Rounds, Any]:
    """``times`` of new processes, the first one on card ``first``."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (given, processes, first, queue), nprocs=processes)
    answer: tuple[Rounds, Rounds, Any] = queue.get()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--batch", type=int, help="images a process (128; 4 on a CPU)")
    parser.add_argument("--rounds", type=int, help="(20; 3 on a CPU)")
    parser.add_argument("--port", type=int, default=29561)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.batch = given.batch or (4 if given.cpu else 128)
    given.rounds = given.rounds or (3 if given.cpu else 20)
    given.repeats = 1 if given.cpu else 5
    if given.rounds < 2:
        parser.error("--rounds: at least 2, for their quartiles")
    if not given.cpu and torch.cuda.device_count() < max(given.processes):
        parser.error(
            f"{torch.cuda.device_count()} GPUs here, {max(given.processes)} are asked for; --cpu works anywhere"
        )
    if given.cpu:
        torch.set_num_threads(1)  # for what is said about the device
    head = about(given.cpu, precision="float32" if given.cpu else "bf16 autocast", rounds=given.rounds, busy=busy(),
                 mode="eager" if given.cpu or given.eager else "compiled")  # fmt: skip
    rows: list[dict[str, Any]] = []
    base: list[float] = []
    for processes in given.processes:
        cards = range(1 if given.cpu or processes > 1 else max(given.processes))
        tried = [spawned(given, processes, card) for card in cards]
        apart, together, kernels = max(tried, key=lambda each: statistics.median(slowest(each[1])))
        found = slowest(together)
        base = base or found
        low, middle, high = statistics.quantiles([statistics.median(base) / each for each in found], n=4)
        rows.append({
            "work": "whole", "processes": processes, "images": processes * given.batch,
            "ms": round(statistics.median(found), 3), "least": round(min(found), 3),
            "cards_ms": [ms for _, each, _ in tried for ms in medians(each)],
            "apart_ms": round(statistics.median(slowest(apart)), 3), "ranks_ms": medians(apart),
            "efficiency": [round(x, 4) for x in (low, middle, high)],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
        if kernels is not None:
            rows[-1]["kernels"] = kernels
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
