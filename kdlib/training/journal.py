"""The numbers of a run: left on the device batch by batch, read together, told line by line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import Loader
from ..files import METRICS
from . import checkpoint, faults, tracking
from .state import Place

TIMES = ("seconds", "images_per_second", "data_share", "gpu_gib")
"""Keys of a line that differ between two equal runs."""
LOSS, GRADIENT = ":loss", ":gradient"
"""The two numbers of a batch that are no term's; no term has a name like these."""
LONGEST = 1000
"""Batches after which the numbers are read even if nobody asks."""
Row = tuple[int, list[dict[str, float]]]
"""A batch's number in its epoch, and the values of each rank by name."""


class Journal:
    """Takes one small tensor a batch, and reads them in one transfer when a line or a checkpoint wants them.

    Args:
        look: is shown what was read, and may raise.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        data: Loader,
        accumulate: int,
        look: Callable[[Sequence[Row], int], None],
    ) -> None:
        self.file, self.accelerator, self.data, self.accumulate, self.look = (
            folder / METRICS,
            accelerator,
            data,
            accumulate,
            look,
        )
        self.trackers: list[Any] = []

    def start(self, at: Place, trackers: Sequence[str], config: Mapping[str, Any]) -> None:
        """Forgets what was told after ``at``, and begins a stretch of the run."""
        self.names: tuple[str, ...] = ()
        self.batches: list[int] = []
        self.rows: list[Tensor] = []
        self.clock = perf_counter()
        if self.accelerator.is_main_process:
            kept = self.file.read_text().splitlines(keepends=True)[: at.lines] if self.file.exists() else []
            with checkpoint.whole(self.file) as draft:
                draft.write_text("".join(kept))
            self.close()
            self.trackers = tracking.start(trackers, self.file.parent, at.step, config)

    def timed(self, at: Place, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, and how long each was waited for."""
        self.clock = perf_counter()
        while True:
            began = perf_counter()
            batch = next(batches, None)
            at.waited += perf_counter() - began
            if batch is None:
                return
            yield batch

    def add(self, at: Place, values: Mapping[str, Tensor]) -> Tensor:
        """Keeps the values of the batch at ``at``: 0-dimensional, of the same names all through an epoch.

        Returns:
            float32 (names,) on the device.
        """
        if len(self.rows) >= LONGEST:
            self.read(at)
        self.names = tuple(values)
        self.batches.append(at.batch)
        self.rows.append(torch.stack([value.detach().float() for value in values.values()]))
        return self.rows[-1]

    def read(self, at: Place) -> None:
        """Takes what was added since the last time, on all ranks, into the epoch's sums; waits for the device."""
        self.tick(at)
        if not self.rows:
            return
        found = self.accelerator.gather(torch.stack(self.rows)[None]).tolist()  # rank, batch, name
        rows = [
            (batch, [dict(zip(self.names, values, strict=True)) for values in ranks])
            for batch, ranks in zip(self.batches, zip(*found, strict=True), strict=True)
        ]
        self.batches, self.rows = [], []
        if self.accelerator.scaler is not None:  # it looks for gradients out of range, and skips them, by itself
            for _, ranks in rows:
                for values in ranks:
                    values[GRADIENT] = values[GRADIENT] if math.isfinite(values[GRADIENT]) else 0.0
        self.look(rows, at.epoch)
        for batch, ranks in rows:
            whole_step = (batch + 1) % self.accumulate == 0
            for name in self.names:
                value = sum(values[name] for values in ranks) / len(ranks)
                if math.isfinite(value) and (name != GRADIENT or whole_step):
                    at.totals[name] = at.totals.get(name, 0.0) + value
                    at.counts[name] = at.counts.get(name, 0) + 1

    def tick(self, at: Place) -> None:
        """Counts the seconds until now into the epoch's."""
        now = perf_counter()
        at.seconds, self.clock = at.seconds + now - self.clock, now

    def line(self, at: Place, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What there is to tell at ``at``: means over the epoch so far and over ranks."""
        self.read(at)
        means = {name: total / at.counts[name] for name, total in at.totals.items()}
        steps = len(self.data) // self.accumulate
        images = self.data.samples / len(self.data) * at.batch * self.accelerator.num_processes
        line = {
            "epoch": at.epoch + at.batch / (steps * self.accumulate),
            "step": at.step,
            "loss": means.pop(LOSS, None),
            "gradient": means.pop(GRADIENT, None),
            "terms": means,
            "lr": float(optimizer.param_groups[0]["lr"]),
            "images_per_second": images / at.seconds,
            "data_share": at.waited / at.seconds,
        }
        if self.accelerator.device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30
        return line

    def write(self, at: Place, line: Mapping[str, Any]) -> None:
        """Adds a line; the main process writes it, and tells the trackers."""
        at.lines += 1
        if self.accelerator.is_main_process:
            try:
                with self.file.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.file)) from None
            faults.reach("log")
            for tracker in self.trackers:
                tracker.log(tracking.flat(line), step=at.step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []
