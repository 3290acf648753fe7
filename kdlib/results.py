"""What a finished run shows: the outcome table, the curves, and how fast a model is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from .files import METRICS
from .taps import in_eval


@dataclass(frozen=True)
class Row:
    """One model of the outcome table."""

    what: str
    model: str
    top1: float
    """Percent of the test images; NaN where it tells other classes apart than theirs."""
    parameters: int
    images_per_second: float
    """Inference, whole batches, on the device of the run."""


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for a terminal."""
    built = Table(title=title, title_justify="left", title_style="bold")
    for name, justify in (
        ("", "left"),
        ("model", "left"),
        ("top-1 %", "right"),
        ("parameters", "right"),
        ("images/s", "right"),
    ):
        built.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        top1 = "–" if math.isnan(row.top1) else f"{row.top1:.2f}"
        built.add_row(row.what, row.model, top1, f"{row.parameters:,}", f"{row.images_per_second:,.0f}")
    return built


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def throughput(models: Sequence[nn.Module], images: Tensor, rounds: int = 5) -> list[float]:
    """Images per second of each model in eval mode: median over rounds, after one warm-up.

    The models take turns within a round, so that a machine that slows down slows all of them. They are left in the
    modes that their modules were in.
    """
    times: list[list[float]] = [[] for _ in models]
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(in_eval(model))
        for number in range(rounds + 1):
            for model, taken in zip(models, times, strict=True):
                _wait(images)
                started = time.perf_counter()
                model(images)
                _wait(images)
                if number:
                    taken.append(time.perf_counter() - started)
    return [len(images) / sorted(taken)[len(taken) // 2] for taken in times]


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def curves(folders: Mapping[str, Path], path: Path) -> None:
    """Draws test accuracy over epochs of some runs, and the terms of the last one, as a PNG.

    Args:
        folders: label to run folder; each holds ``metrics.jsonl``.
    """
    from matplotlib.figure import Figure  # here, since importing it takes long; no pyplot, whose backend is global

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs: list[dict[str, Any]] = []
    for label, folder in folders.items():
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        tested = [line for line in lines if "top1" in line]
        left.plot([line["epoch"] for line in tested], [line["top1"] for line in tested], marker=".", label=label)
        epochs = [line for line in lines if "weights" in line]  # one a whole epoch, tested or not
    left.set(xlabel="epoch", ylabel="test top-1 (%)", title="accuracy")
    left.legend(frameon=False)
    names = list(dict.fromkeys(name for line in epochs for name in line["terms"]))
    for name in names:
        points = [(line["epoch"], line["terms"][name]) for line in epochs if name in line["terms"]]
        right.plot(*zip(*points, strict=True), marker=".", label=name)
    right.set(xlabel="epoch", ylabel="value before its weight", yscale="log", title=f"terms of {list(folders)[-1]}")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
