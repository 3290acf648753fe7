"""One training step: what distillation costs beside its own parts, by hand, by kdlib and by others.

    python benchmarks/step.py --out benchmarks/results/step.json      one GPU, 224 px, bf16
    python benchmarks/step.py --cpu                                   two cores, small models, eager

blocks    RIFormer-S12 from PoolFormer-S12: soft targets and the mean squared error of each stage's last block
whole     RIFormer's objective: GFNet-H-B and PoolFormer-S12 as teachers, four terms
small     the whole objective for the 64 px models, which are bound by kernel launches

floor is every teacher's forward and a step by labels alone: what any distillation must pay. The contestants of a work
take turns, round by round; ms is the median over rounds, MiB the peak that a contestant adds while it steps. Ratios are
within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kdlib as kd
from kdlib import compiling
from kdlib.losses import CrossEntropy, FeatureMSE, GramRelation, SoftTarget
from recipes.riformer import gfnet, model  # noqa: F401  registers the models

Step = Callable[[], Tensor]


@dataclass
class Work:
    """Models and data of one job."""

    student: str
    twin: str
    wide: str | None
    images: Tensor
    labels: Tensor
    classes: int

    def make(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        more = {} if self.images.shape[1] == 3 else {"in_chans": self.images.shape[1]}
        return timm.create_model(name, num_classes=self.classes, **more).to(self.images.device)

    def autocast(self) -> Any:
        on_gpu = self.images.is_cuda
        return torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()


def train(work: Work, module: nn.Module, loss_of: Callable[[], Tensor]) -> Step:
    """A whole step around a loss: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=work.images.is_cuda)

    def step() -> Tensor:
        with work.autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


class Frozen(nn.Module):
    """The answers of some teachers, or the answer and the stages of one."""

    def __init__(self, *teachers: nn.Module, stages: bool = False) -> None:
        super().__init__()
        self.teachers, self.stages = nn.ModuleList(teachers).eval().requires_grad_(False), stages

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        return staged(self.teachers[0], images) if self.stages else [net(images) for net in self.teachers]


def staged(net: Any, x: Tensor) -> list[Tensor]:
    """What each stage returns, then the logits."""
    x, seen = net.stem(x), []
    for stage in net.stages:
        x = stage(x)
        seen.append(x)
    return [*seen, net.forward_head(net.norm(x))]


class ByHand(nn.Module):
    """The blocks objective, its features collected by a forward that was written for it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor, targets: list[Tensor]) -> Tensor:
        *mine, logits = staged(self.student, images)
        *theirs, answer = targets
        target = F.log_softmax(answer.float(), -1)
        loss = F.kl_div(F.log_softmax(logits.float(), -1), target, reduction="batchmean", log_target=True)
        for ours, other in zip(mine, theirs, strict=True):
            loss = loss + 1e-4 * F.mse_loss(ours.float(), other.float())
        return loss


def floor(work: Work, mode: str | None) -> Step:
    teachers = Frozen(*(work.make(name) for name in (work.twin, work.wide) if name))
    student = work.make(work.student)
    compiling.compile_whole([teachers, student], mode)

    def loss_of() -> Tensor:
        compiling.begin_step(mode)
        teachers(work.images)
        return F.cross_entropy(student(work.images), work.labels)

    return train(work, student, loss_of)


def by_hand(work: Work, mode: str | None) -> Step:
    teacher, hand = Frozen(work.make(work.twin), stages=True), ByHand(work.make(work.student))
    compiling.compile_whole([teacher, hand], mode)
    return train(work, hand, lambda: hand(work.images, teacher(work.images)))


def by_kdlib(work: Work, mode: str | None) -> Step:
    student, last = work.make(work.student), "stages.*.blocks.-1"
    if work.wide is None:
        net: nn.Module = work.make(work.twin)
        terms = [
            kd.Term("soft", SoftTarget()),
            kd.Term("block", FeatureMSE(), 1e-4, pairs=kd.pair(student, net, last), reduce="sum"),
        ]
    else:
        net = kd.Panel({"wide": work.make(work.wide), "twin": work.make(work.twin)})
        pairs = {tap: kd.pair(student, net, tap, f"twin.{tap}") for tap in (last, f"{last}.token_mixer")}
        terms = [
            kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "wide")]),
            kd.Term("block", FeatureMSE(), 1e-4, pairs=pairs[last], reduce="sum"),
            kd.Term("mixer", FeatureMSE(), 1e-3, pairs=pairs[f"{last}.token_mixer"], reduce="sum"),
            kd.Term("relation", GramRelation(), 1.0, pairs=pairs[last], reduce="sum"),
        ]
    terms = list(kd.fit(terms, student, net, work.images[:2]).terms)
    teacher, distiller = kd.Teacher(net, terms), kd.Distiller(student, terms).to(work.images.device)
    compiling.compile_whole([teacher, distiller], mode)

    def loss_of() -> Tensor:
        compiling.begin_step(mode)
        return distiller(work.images, teacher(work.images)).loss

    return train(work, distiller, loss_of)


def labels_by_kdlib(work: Work, mode: str | None) -> Step:
    """No teacher at all: what the engine itself adds to a plain step."""
    distiller = kd.Distiller(work.make(work.student), [kd.Term("label", CrossEntropy(), pairs=[LABELS])])
    distiller.to(work.images.device)
    compiling.compile_whole([distiller], mode)
    return train(work, distiller, lambda: distiller(work.images, {"@labels": work.labels}).loss)


LABELS = kd.Pair("@output", "@labels")


def by_timm(work: Work, mode: str | None) -> Step:
    """timm.task, as it comes: logits only."""
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        work.make(work.student), work.make(work.twin), criterion=nn.CrossEntropyLoss(), verbose=False,
        device=work.images.device,
    )  # fmt: skip
    return train(work, task.trainable_module, lambda: task(work.images, work.labels)["loss"])


def contestants(work: str) -> dict[str, Callable[[Work, str | None], Step]]:
    if work == "blocks":
        return {"floor": floor, "by hand": by_hand, "kdlib": by_kdlib, "timm.task (logits only)": by_timm}
    return {"floor": floor, "kdlib": by_kdlib}


def modes(work: str, who: str, cpu: bool) -> list[str | None]:
    if cpu or "timm" in who:
        return [None]
    return [None, "default", "reduce-overhead"] if work == "small" else [None, "default"]


def works(cpu: bool, batch: int) -> dict[str, Work]:
    torch.manual_seed(0)
    device = torch.device("cpu" if cpu else "cuda")

    def data(channels: int, side: int, classes: int) -> tuple[Tensor, Tensor, int]:
        images = torch.randn(batch, channels, side, side, device=device)
        return images, torch.randint(classes, (batch,), device=device), classes

    small = ("riformer_micro", "metaformer_pool_micro", "gfnet_h_micro")
    if cpu:
        return {"blocks": Work(*small[:2], None, *data(3, 64, 10)), "whole": Work(*small, *data(3, 64, 10))}
    large = ("riformer_s12", "metaformer_pool_s12", "gfnet_h_b")
    return {
        "blocks": Work(*large[:2], None, *data(3, 224, 1000)),
        "whole": Work(*large, *data(3, 224, 1000)),
        "small": Work(*small, *data(3, 64, 10)),
    }


def measure(name: str, work: Work, cpu: bool, rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """All contestants of a work, warm; then turn by turn."""
    steps: list[tuple[dict[str, Any], Step]] = []
    for who, build in contestants(name).items():
        for mode in modes(name, who, cpu):
            row: dict[str, Any] = {"work": name, "who": who, "mode": mode or "eager"}
            try:
                steps.append((row, warm(build, work, mode, row)))
            except Exception as error:  # a peer that cannot be had, a mode that fails: told, and the rest goes on
                keep(row | {"failed": " ".join(str(error).split())[:300] or type(error).__name__})
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for times, (_, step) in zip(taken, steps, strict=True):
            times.append(milliseconds(step, 1 if cpu else 5))
    for times, (row, _) in zip(taken, steps, strict=True):
        keep(row | {"ms": round(statistics.median(times), 3), "least": round(min(times), 3)})


def warm(build: Callable[[Work, str | None], Step], work: Work, mode: str | None, row: dict[str, Any]) -> Step:
    cuda = work.images.is_cuda
    torch.compiler.reset()
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    step = build(work, mode)
    step()
    synchronize(cuda)
    row["first_step_s"] = round(time.perf_counter() - began, 2)
    for _ in range(4):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        row["MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    return step


def milliseconds(step: Step, repeats: int) -> float:
    cuda = step().is_cuda
    synchronize(cuda)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(cuda)
    return 1e3 * (time.perf_counter() - began) / repeats


def synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="WORK")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.cpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    else:
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.cache_size_limit = 64  # many models pass through one process
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        base = next((r["ms"] for r in rows if (r["work"], r["who"], r["mode"]) == (row["work"], "floor", row["mode"])
                     and "ms" in r), None)  # fmt: skip
        if base and "ms" in row:
            row["of_floor"] = round(row["ms"] / base, 3)
        print(json.dumps(row), flush=True)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")

    batch = given.batch or (32 if given.cpu else 128)
    device = f"CPU, {torch.get_num_threads()} threads" if given.cpu else torch.cuda.get_device_name()
    about = {
        "device": device,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "batch": batch,
        "precision": "float32" if given.cpu else "bf16 autocast",
        "rounds": given.rounds,
    }
    for name, work in works(given.cpu, batch).items():
        if not given.only or name in given.only:
            measure(name, work, given.cpu, given.rounds, keep)


if __name__ == "__main__":
    main()
