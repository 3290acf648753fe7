"""The one loop: train, evaluate, save, resume, log; accelerate knows devices, processes and precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data import Data, with_targets
from ..distiller import Distiller
from ..files import BEST
from ..progress import bar, say
from ..signals import Stopped, listen
from ..teacher import Teacher
from . import checkpoint, compiling, faults, gradients, sharding
from .evaluation import evaluate_all, with_best
from .guard import Guard, NotFinite
from .journal import GRADIENT, LOSS, Journal
from .passes import Batch, Passes
from .place import left_as_found
from .ranks import losses_told, on_main
from .shield import Shield
from .state import Place, State


@dataclass
class Training:
    """Everything that one run trains with, and how long.

    ``run`` goes on from the newest checkpoint in ``folder``; a run that was stopped anywhere and started again ends as
    one that never was, bit for bit.
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
    """Batches per optimizer step; those at an epoch's end that do not fill a step are left out."""
    clip_grad: float | None = None
    channels_last: bool = False
    compile: str = "auto"
    """A mode of ``compiling.MODES``."""
    compile_teacher: bool = True
    ema: ModelEmaV3 | None = None
    """Moving average of the student, made before the distiller was."""
    log_every: int = 50
    log_gradients: bool = False
    eval_every: int = 1
    save_every: int = 0
    """Steps between two checkpoints. An epoch of no fewer steps, or any where this is 0, ends with one besides."""
    metric: str = "top1"
    """What tells the best student."""
    patience: int = 0
    """Evaluations without a better ``metric`` after which the run ends; 0 is never."""
    on_nonfinite: str = "stop"
    """One of ``guard.POLICIES``."""
    trackers: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """What trackers are told about the run."""

    def run(self) -> dict[str, float]:
        """Trains to the end; gives the last evaluation (``top1``, ``top5`` in percent, ``test_loss``) and the best.

        Raises:
            Stopped: SIGTERM or Ctrl-C; everything is saved.
            FloatingPointError: a loss or gradient that is not finite, where the policy is to stop.
            OSError: a disk, a worker or another process failed; the last checkpoint is whole.
        """
        self.batches = len(self.data.train) // self.accumulate * self.accumulate
        self.main, self.sharded = self.accelerator.is_main_process, self.accelerator.is_fsdp2
        if self.sharded:
            sharding.check(self.distiller, self.optimizer)
        train, accelerator = self.data.train, self.accelerator
        images = train.batches.images
        self.state = State(self.folder, accelerator, self.distiller, self.optimizer, images, self.ema)
        self.guard = Guard(self.on_nonfinite, self.folder, self.title, train, self.accumulate, accelerator)
        self.journal = Journal(self.folder, accelerator, train, self.accumulate, self.guard.look)
        self.shield = Shield(self.distiller, self.optimizer, self.accelerator, on=self.on_nonfinite == "skip")
        mode = compiling.resolve(self.compile, accelerator.device)
        compiler = compiling.set_up(mode, len(self.distiller.terms))
        with losses_told(), listen() as self.asked, compiler, left_as_found(self.accelerator):
            try:
                self._begin(mode)
                done = self.at.epoch * self.batches + self.at.batch
                with bar(self.title, self.epochs * self.batches, done, self.main) as self.bar:
                    while not self._ended():
                        try:
                            self._epoch()
                            self._conclude()
                        except NotFinite as bad:
                            self._answer(bad)
            finally:
                self.journal.close()
        return self.at.result

    def _begin(self, mode: str | None) -> None:
        """Puts the run where it goes on, and everything into its place for the first step."""
        if self.sharded:
            sharding.shard(self.accelerator, self.distiller, self.optimizer, self.ema)
        self.engine, self.prepared = self.accelerator.prepare(self.distiller, self.optimizer)
        self.passes = Passes(
            self.engine,
            self.distiller,
            self.teacher,
            self.accelerator,
            mode,
            self.compile_teacher,
            self.channels_last,
            self.accumulate,
        )
        place = self.state.load()
        if place is not None and place.step:
            after = f"after epoch {place.epoch} of {self.epochs}" + (f", batch {place.batch}" if place.batch else "")
            say(f"{self.title}: goes on {after}", self.main)
        self.at = place or Place()
        if place is None:
            self.state.save(self.at)  # a disk that cannot hold it says so now, and there is a point to go back to
        self._set_out()

    def _set_out(self) -> None:
        """What follows from where the run is."""
        self.accelerator.gradient_accumulation_steps, self.accelerator.step = self.accumulate, 0
        self.optimizer.zero_grad()
        self.passes.forget()
        self.scheduler.step_update(self.at.step)
        self.journal.start(self.at, self.trackers, self.config)

    def _ended(self) -> bool:
        return self.at.epoch >= self.epochs or 0 < self.patience <= self.at.stale

    # one epoch

    def _epoch(self) -> None:
        """What is left of an epoch's batches. Numbers stay on the device until a line or a checkpoint wants them."""
        self._set_epoch()
        for line in self.passes.try_out(lambda: next(self._batches(0))):
            say(f"{self.title}: {line}", self.main)
        at, left = self.at, islice(self._batches(self.at.batch), self.batches - self.at.batch)
        for images, targets in self.journal.timed(at, left):
            faults.reach("batch")
            self._step(images, targets)
            at.batch += 1
            self.bar.advance()
            if ended := at.batch % self.accumulate == 0:
                at.step += 1
                self.scheduler.step_update(at.step)
                if self.ema is not None:
                    self.ema.update(self.distiller.student, at.step)
                faults.reach("step")
            if at.batch % self.log_every == 0:
                self._tell(images, targets)
            if ended:
                self._save_if_due()
        self.journal.read(at)

    def _set_epoch(self) -> None:
        self.distiller.set_epoch(self.at.epoch, self.epochs)
        if self.teacher is not None:
            self.teacher.set_epoch(self.at.epoch, self.epochs)
        self.engine.train()

    def _batches(self, start: int) -> Iterator[Batch]:
        reads = [key for term in self.distiller.terms for key in term.targets]
        return with_targets(self.data.train, reads, self.at.epoch, start)

    def _step(self, images: Tensor, targets: dict[str, Tensor]) -> None:
        begins = self.at.batch % self.accumulate == 0
        place = (self.at.epoch, self.at.batch - self.at.batch % self.accumulate)
        left_out = list(place) in self.at.skipped
        if place == self.guard.suspect and not left_out:
            batch = self.passes.with_teacher(images, targets)
            norms = gradients.mean_by_term(self.accelerator, self.distiller, *batch, self.distiller)
            self.guard.accuse(self.at.epoch, self.at.batch, norms)
        with self.accelerator.accumulate(self.engine):
            if left_out:
                return  # it counts as a step, and nothing is learned from it
            if begins:
                self.shield.remember()
            out = self.passes(images, targets, adds=not begins)
            faults.reach("backward")
            gradient = gradients.norm(self.accelerator, self.distiller, self.clip_grad)
            self.shield.see(self.journal.add(self.at, {LOSS: out.loss, GRADIENT: gradient, **out.terms}))
            if self.accelerator.sync_gradients:
                self.shield.disarm()
            self.prepared.step()
            if self.passes.graphs is None:  # theirs live in recorded memory
                self.prepared.zero_grad()
            if self.accelerator.sync_gradients:
                self.shield.settle()

    # between steps

    def _tell(self, images: Tensor, targets: dict[str, Tensor]) -> None:
        """A line within an epoch."""
        line = self.journal.line(self.at, self.optimizer)
        if self.log_gradients:
            batch, student = self.passes.with_teacher(images, targets), self.distiller.student
            norms = gradients.mean_by_term(self.accelerator, self.distiller, *batch, student)
            line["gradient_shares"] = {name: norm / (sum(norms.values()) or 1.0) for name, norm in norms.items()}
        self.bar.say(f"loss {line['loss'] or 0:.4f}")
        self.journal.write(self.at, line)

    def _save_if_due(self) -> None:
        asked = self.asked.agreed(self.at.step)
        if asked or (self.save_every and self.at.step % self.save_every == 0 and self.at.batch < self.batches):
            self.journal.read(self.at)
            self.state.save(self.at)
        if asked:
            raise Stopped(asked, saved=True)

    def _conclude(self) -> None:
        """The end of an epoch."""
        at, line, better = self.at, self.journal.line(self.at, self.optimizer), False
        if (at.epoch + 1) % self.eval_every == 0 or at.epoch + 1 == self.epochs:
            better = self._evaluate()
            line |= at.result
            self.bar.say(f"top-1 {at.result['top1']:.2f} %")
        self.journal.tick(at)
        self.journal.write(at, {**line, "weights": self.distiller.weights_in_force(), "seconds": at.seconds})
        at.begin_epoch(at.epoch + 1)
        seldom = self.save_every > self.batches // self.accumulate
        kept = better and self.on_nonfinite == "rollback"  # or a run that goes back would not know whose weights it has
        if due := not seldom or kept or at.step % self.save_every == 0 or self._ended():
            self.state.save(at)
        if asked := self.asked.agreed():
            if not due:
                self.state.save(at)
            raise Stopped(asked, saved=True)

    def _evaluate(self) -> bool:
        """Measures the student and its average; keeps the weights of the best evaluation, and says if this is it."""
        faults.reach("evaluate")
        student, average = self.distiller.student, {} if self.ema is None else {"ema_": self.ema.module}
        models: dict[str, nn.Module] = {"": sharding.Answers(self.distiller) if self.sharded else student, **average}
        found = evaluate_all(models, self.data.test, self.accelerator, self.channels_last)
        self.at.result, better = with_best(found, self.at.result, self.metric, self.at.epoch + 1)
        self.at.stale = 0 if better else self.at.stale + 1
        if better:
            best = average["ema_"] if self.metric.startswith("ema_") else student
            weights = sharding.whole(best.state_dict(), keep=self.main)
            on_main(self.accelerator, lambda: checkpoint.save_weights(weights, self.folder / BEST))
            faults.reach("best")
        return better

    # numbers that go wrong

    def _answer(self, bad: NotFinite) -> None:
        """Goes back to the last checkpoint.

        Raises:
            FloatingPointError: the run stops for it.
        """
        left_out = self.guard.answer(bad, self.at.skipped)
        place = self.state.load()
        assert place is not None
        self.at = place
        self.at.skipped = left_out
        self._set_out()
        self.bar.go_back(self.at.epoch * self.batches + self.at.batch)
        say(f"{self.title}: {bad} was not finite; back at step {self.at.step}", self.main)
