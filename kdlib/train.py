"""The one loop: train, evaluate, save, resume, log; accelerate knows devices, processes and precision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from . import checkpoint, compiling
from .data import Data, with_targets
from .data import Loader as Batches
from .distiller import Distilled, Distiller, Teacher
from .graphs import Graphs, try_graphs
from .progress import Bar, bar, say


@dataclass
class Training:
    """Everything that one run trains with, and how long.

    ``start`` goes on from the newest checkpoint in ``folder``, epoch by epoch; a run that was stopped and started again
    with the same command repeats the epoch that it was stopped in.
    """

    distiller: Distiller
    teacher: Teacher | None
    """None where no term reads a teacher."""
    data: Data
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    accelerator: Accelerator
    folder: Path
    epochs: int
    title: str = "train"
    accumulate: int = 1
    clip_grad: float | None = None
    channels_last: bool = False
    compile: str = "auto"
    """A mode of ``compiling.MODES``."""
    log_every: int = 50
    eval_every: int = 1

    def run(self) -> dict[str, float]:
        """Trains to the end and returns the last evaluation: ``top1``, ``top5`` in percent and ``loss``."""
        main = self.accelerator.is_main_process
        self.accelerator.gradient_accumulation_steps = self.accumulate
        first, step, result = self._resume()
        self.engine, self.prepared = self.accelerator.prepare(self.distiller, self.optimizer)
        self.mode = compiling.resolve(self.compile, self.accelerator.device)
        self.graphs: Graphs | None = None
        self.adds = False
        if self.mode is not None and first < self.epochs:
            self._compile(first)
        steps = len(self.data.train)
        with bar(self.title, self.epochs * steps, first * steps, main) as progress:
            for epoch in range(first, self.epochs):
                started = perf_counter()
                self._set_epoch(epoch)
                means, step = self._epoch(epoch, step, progress)
                if (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs:
                    result = evaluate(self.distiller.student, self.data.test, self.accelerator, self.channels_last)
                    progress.say(f"top-1 {result['top1']:.2f} %")
                    means |= result
                seconds = perf_counter() - started
                rate = self.data.train.samples * self.accelerator.num_processes / seconds
                weights = self.distiller.weights_in_force()
                done = {"epoch": epoch + 1, "step": step, **means}
                self._log({**done, "weights": weights, "seconds": seconds, "images_per_second": rate})
                if main:
                    self._save(epoch + 1, step, result)
                self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return result

    def _compile(self, epoch: int) -> None:
        """Compiles for the terms of ``epoch``, trying it on its first batch."""
        assert self.mode is not None
        self._set_epoch(epoch)
        self.engine.train()
        images, targets = next(self._batches(epoch))
        modules = [self.distiller] if self.teacher is None else [self.distiller, self.teacher]
        if self.mode == "graphs":
            graphs = Graphs(self._backward, modules, self.distiller.live, self.accumulate)
            self.graphs, line = try_graphs(graphs, images, targets)
        else:
            backward = partial(self._backward, images, targets)
            self.mode, line = compiling.rehearse(backward, modules, self.mode, images.device)
        say(f"{self.title}: {line}", self.accelerator.is_main_process)

    def _set_epoch(self, epoch: int) -> None:
        self.distiller.set_epoch(epoch, self.epochs)
        if self.teacher is not None:
            self.teacher.set_epoch(epoch, self.epochs)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return with_targets(self.data.train, [key for term in self.distiller.terms for key in term.targets], epoch)

    def _epoch(self, epoch: int, step: int, progress: Bar) -> tuple[dict[str, Any], int]:
        """One pass over the training images. Sums stay on the device until a log line wants them."""
        self.engine.train()
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for i, (images, targets) in enumerate(self._batches(epoch), start=1):
            out = self._step(images, targets)
            for name, value in {"loss": out.loss.detach(), **out.terms}.items():
                sums[name] = sums[name] + value if name in sums else value.clone()
                counts[name] = counts.get(name, 0) + 1
            if self.accelerator.sync_gradients:
                step += 1
                self.scheduler.step_update(step)
            progress.advance()
            if i % self.log_every == 0:
                means = self._means(sums, counts)
                progress.say(f"loss {means['loss']:.4f}")
                self._log({"epoch": epoch + i / len(self.data.train), "step": step, **means, "lr": self._lr()})
        return {**self._means(sums, counts), "lr": self._lr()}, step

    def _step(self, images: Tensor, targets: dict[str, Tensor]) -> Distilled:
        with self.accelerator.accumulate(self.engine):
            out = self._backward(images, targets) if self.graphs is None else self.graphs(images, targets, self.adds)
            self.adds = not self.accelerator.sync_gradients
            if self.mode == "reduce-overhead" and self.adds:
                compiling.keep_gradients(self.distiller)
            if self.clip_grad is not None and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.clip_grad)
            self.prepared.step()
            if self.graphs is None:  # theirs live in recorded memory
                self.prepared.zero_grad()
        return out

    def _backward(self, images: Tensor, targets: dict[str, Tensor]) -> Distilled:
        compiling.begin_step(self.mode)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.teacher is not None:
            with self.accelerator.autocast():
                targets = targets | self.teacher(images)
        out: Distilled = self.engine(images, targets)
        self.accelerator.backward(out.loss)
        return out

    def _means(self, sums: dict[str, Tensor], counts: dict[str, int]) -> dict[str, Any]:
        stacked = torch.stack([total.float() / counts[name] for name, total in sums.items()])
        mean = self.accelerator.reduce(stacked, reduction="mean").tolist()
        values = dict(zip(sums, mean, strict=True))
        return {"loss": values.pop("loss"), "terms": values}

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _log(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _forget_after(self, step: int) -> None:
        """Takes the lines that the checkpoint of ``step`` does not know out of the metrics, a half-written one too."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        draft = file.with_name(".tmp-metrics.jsonl")
        draft.write_text("".join(f"{line}\n" for line in kept))
        draft.replace(file)

    def _save(self, epoch: int, step: int, result: dict[str, float]) -> None:
        state = {
            "epoch": epoch,
            "result": result,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": checkpoint.random_state(self.accelerator.device),
        }
        checkpoint.save(self.folder / "checkpoints", step, state)

    def _resume(self) -> tuple[int, int, dict[str, float]]:
        """(epochs done, steps done, last evaluation) of the newest whole checkpoint, its state put back."""
        found = checkpoint.load_latest(self.folder / "checkpoints")
        if found is None:
            return 0, 0, {}
        step, state, notes = found
        for note in notes:
            say(note, self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self._forget_after(step)
        self.distiller.load_state_dict(state["distiller"])
        optimizer = state["optimizer"]
        optimizer["state"] = {int(key): value for key, value in optimizer["state"].items()}  # JSON keys are text
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.step_update(step)
        checkpoint.set_random_state(state["random"], self.accelerator.device)
        say(f"{self.title}: goes on after epoch {state['epoch']} of {self.epochs}", self.accelerator.is_main_process)
        return state["epoch"], step, state["result"]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, accelerator: Accelerator, channels_last: bool = False
) -> dict[str, float]:
    """Top-1 and top-5 in percent over all ranks, every image counted once; the model's mode is restored."""
    training = model.training
    model.eval()
    sums = torch.zeros(4, device=accelerator.device)
    for images, labels in batches.epoch(0):
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            logits = model(images)
        ranked = logits.float().topk(min(5, logits.shape[-1])).indices == labels[:, None]
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        hits = ranked.float()
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.full_like(loss, len(labels))])
    model.train(training)
    top1, top5, loss, count = accelerator.reduce(sums, reduction="sum").tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "test_loss": loss / count}
