"""Everything of a run that a checkpoint holds: taken, written, read, put back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3

from ..distiller import Distiller
from ..files import CHECKPOINTS
from ..progress import say
from . import checkpoint, faults, sharding
from .randomness import random_state, set_random_state
from .ranks import on_main, share_buffers


@dataclass
class Place:
    """How far a run is, and what it counted on the way."""

    epoch: int = 0
    batch: int = 0
    """Of the epoch: so many lie behind."""
    step: int = 0
    lines: int = 0
    """Of metrics.jsonl."""
    seconds: float = 0.0
    """Spent on the epoch."""
    waited: float = 0.0
    """Of those, for data."""
    totals: dict[str, float] = field(default_factory=dict)
    """Of each number of the epoch's batches, and below how many they are; what is not finite does not count."""
    counts: dict[str, int] = field(default_factory=dict)
    result: dict[str, float] = field(default_factory=dict)
    """The last evaluation, with the best one's ``best_…``."""
    stale: int = 0
    """Evaluations since the best one."""
    skipped: list[list[int]] = field(default_factory=list)
    """``[epoch, first batch]`` of the steps that a rollback leaves out."""

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.batch, self.seconds, self.waited = epoch, 0, 0.0, 0.0
        self.totals, self.counts = {}, {}


@dataclass
class State:
    """The parts of a run that change while it trains."""

    folder: Path
    accelerator: Accelerator
    distiller: Distiller
    optimizer: torch.optim.Optimizer
    images: int
    """To train on; with another number of them the place in an epoch means other images."""
    ema: ModelEmaV3 | None = None

    def save(self, place: Place) -> None:
        """Writes a checkpoint; every process takes part, the main one writes.

        Raises:
            OSError: as ``checkpoint.save``.
            FloatingPointError: a parameter is not finite; nothing is written.
        """
        randoms = gather_object([random_state(self.accelerator.device)])
        if self.accelerator.is_fsdp2:  # DDP keeps them alike by itself
            share_buffers(self.accelerator, self.distiller)
        parts = {
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
        }
        parts = sharding.whole(parts, keep=self.accelerator.is_main_process)
        on_main(self.accelerator, lambda: self._write(place, randoms, parts))

    def _write(self, place: Place, randoms: list[dict[str, Any]], parts: dict[str, Any]) -> None:
        for name, _ in self.distiller.named_parameters():
            if not parts["distiller"][name].isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after step {place.step}, so nothing was saved; lower optimizer.lr or set "
                    "optimizer.clip_grad, and start again from the checkpoint before"
                )
        scaler = self.accelerator.scaler
        state = {
            "place": asdict(place),
            **parts,
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": randoms,
            "images": self.images,
        }
        checkpoint.save(self.folder / CHECKPOINTS, place.step, state)

    def load(self) -> Place | None:
        """Puts the newest whole checkpoint's state back, on every process; None where there is none.

        Raises:
            ValueError: every checkpoint is damaged, was of other processes or images, or is not on this machine.
        """
        found: dict[str, Any] | None = None

        def newest() -> int | None:
            nonlocal found
            loaded = checkpoint.load_latest(self.folder / CHECKPOINTS)
            if loaded is None:
                return None
            step, found, notes = loaded
            for note in notes:
                say(note)
            return step

        step = on_main(self.accelerator, newest)
        if step is None:
            return None
        if found is None:
            try:
                found = checkpoint.load(self.folder / CHECKPOINTS, step)
            except Exception as error:  # as in checkpoint.load_latest
                raise ValueError(
                    f"process {self.accelerator.process_index} cannot read the checkpoint of step {step} ({error}); "
                    "the output folder must be on a file system that all machines share"
                ) from None
        faults.reach("resume")
        return self._put_back(found)

    def _put_back(self, state: dict[str, Any]) -> Place:
        randoms, device = state["random"], self.accelerator.device
        if len(randoms) != self.accelerator.num_processes:
            raise ValueError(
                f"{self.folder}: this run was begun on {len(randoms)} processes, here are "
                f"{self.accelerator.num_processes}; start as many as then, or choose another output=…"
            )
        if state["images"] != self.images:
            raise ValueError(
                f"{self.folder}: this run was begun on {state['images']} training images, here are {self.images}; "
                "put the data back as they were, or choose another output=…"
            )
        sharding.load_module(self.distiller, state["distiller"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        if self.ema is not None:
            sharding.load_module(self.ema.module, state["ema"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        set_random_state(randoms[self.accelerator.process_index], device)
        return Place(**state["place"])
