"""Numbers that go wrong: who is to blame, what is written down, and where the run goes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator

from ..data import Loader
from ..data.samplers import Batches
from ..progress import say
from . import checkpoint
from .journal import GRADIENT, LOSS, Row
from .ranks import on_main

POLICIES = ("stop", "skip", "rollback")
LIMIT = 50
"""So many steps in a row, or rollbacks in a run, are no accident: the run stops whatever the policy."""
REPORT = "nonfinite.json"


@dataclass
class NotFinite(Exception):
    """A batch at which something was NaN or infinite. ``epoch`` and ``batch`` are counted from 0."""

    epoch: int
    batch: int
    what: Literal["term", "loss", "gradient"]
    """The earliest of these: a term, the sum of terms that are finite, the gradient of a sum that is."""
    names: tuple[str, ...]
    """The terms, where that is known."""
    ranks: tuple[int, ...]
    """Whose batch it was; for a gradient that nobody is known to have caused, all."""

    def __str__(self) -> str:
        terms = f"term {', '.join(map(repr, self.names))}"
        whole = {"term": terms, "loss": "the sum of the terms", "gradient": "the gradient"}[self.what]
        return f"{whole} of {terms}" if self.what == "gradient" and self.names else whole


def find(rows: Iterable[Row], epoch: int) -> list[NotFinite]:
    """The batches that are not finite, oldest first."""
    found = []
    for batch, ranks in rows:
        bad: dict[str, set[int]] = {}
        for rank, values in enumerate(ranks):
            for name, value in values.items():
                if not math.isfinite(value):
                    bad.setdefault(name, set()).add(rank)
        gradient, loss = bad.pop(GRADIENT, set()), bad.pop(LOSS, set())
        if bad:
            found.append(NotFinite(epoch, batch, "term", tuple(bad), tuple(sorted(set().union(*bad.values())))))
        elif loss:
            found.append(NotFinite(epoch, batch, "loss", (), tuple(sorted(loss))))
        elif gradient:
            found.append(NotFinite(epoch, batch, "gradient", (), tuple(range(len(ranks)))))
    return found


def images(bad: NotFinite, batches: Batches, accumulate: int) -> list[int]:
    """Numbers of the images that were looked at: the batch's, or the whole step's where only its gradient is known."""
    first = bad.batch - bad.batch % accumulate
    step = bad.what == "gradient" and not bad.names
    return [
        image
        for rank in bad.ranks
        for number in (range(first, first + accumulate) if step else [bad.batch])
        for image in batches.rows(bad.epoch, rank)[number].tolist()
    ]


class Guard:
    """Looks at the numbers of a run and applies its policy to those that are not finite.

    ``stop`` ends the run; ``skip`` wants a ``Shield`` around each step, and only writes down here what that undid;
    ``rollback`` goes back to the last checkpoint and leaves the step out. A gradient that is not finite, though every
    term is, is first met again from the last checkpoint on, to see whose it is.
    """

    def __init__(
        self, policy: str, folder: Path, title: str, data: Loader, accumulate: int, accelerator: Accelerator
    ) -> None:
        assert policy in POLICIES, policy
        self.policy, self.folder, self.title, self.accelerator = policy, folder, title, accelerator
        self.data, self.accumulate = data, accumulate
        self.suspect: tuple[int, int] | None = None
        """Epoch and first batch of the step at which each term's gradient is looked at by itself."""
        self.in_a_row = 0
        """Steps that were not finite since the last one that was; a read of the numbers may end within a step."""
        self._last: tuple[int, int] | None = None

    def look(self, rows: Sequence[Row], epoch: int) -> None:
        """Raises on the first of ``rows`` that is not finite, or tells of all of them.

        Raises:
            NotFinite: the run must go back or stop.
            FloatingPointError: nothing is left but skipping.
        """
        found = find(rows, epoch)
        if found and self.policy != "skip":
            raise found[0]
        for bad in found:
            self.report(bad)
        self._count({bad.batch: bad for bad in found}, rows, epoch)

    def _count(self, found: Mapping[int, NotFinite], rows: Sequence[Row], epoch: int) -> None:
        for batch, _ in rows:
            step = self.begins(epoch, batch)
            if batch in found and step != self._last:
                self.in_a_row, self._last = self.in_a_row + 1, step
            elif (batch + 1) % self.accumulate == 0 and step != self._last:
                self.in_a_row = 0
            if self.in_a_row >= LIMIT:
                raise FloatingPointError(
                    f"{self.title}: {self.in_a_row} steps in a row were not finite, the last by {found[batch]}; its "
                    f"images: {self.folder / REPORT}"
                )

    def begins(self, epoch: int, batch: int) -> tuple[int, int]:
        """Epoch and first batch of the step to which the batch belongs."""
        return epoch, batch - batch % self.accumulate

    def answer(self, bad: NotFinite, skipped: list[list[int]]) -> list[list[int]]:
        """What is left out from the last checkpoint on, where the run must go: ``skipped``, and the step of ``bad``
        unless it is met again first, to see whose gradient it is.

        Raises:
            FloatingPointError: the run stops for it.
        """
        step = self.begins(bad.epoch, bad.batch)
        known = bad.names or bad.what != "gradient" or self.suspect == step
        self.suspect = step
        if not known:
            return skipped
        on_main(self.accelerator, lambda: self.report(bad))
        if self.policy == "stop" or len(skipped) >= LIMIT:
            raise self.end(bad)
        return [*skipped, list(step)]

    def accuse(self, epoch: int, batch: int, norms: Mapping[str, float]) -> None:
        """Raises on the terms whose gradient over a batch is not finite, on any process.

        Args:
            norms: of each term's gradient, mean over processes.

        Raises:
            NotFinite: there are some.
        """
        if guilty := tuple(name for name, norm in norms.items() if not math.isfinite(norm)):
            raise NotFinite(epoch, batch, "gradient", guilty, tuple(range(self.accelerator.num_processes)))

    def report(self, bad: NotFinite) -> None:
        """Says it, and adds it to ``nonfinite.json``, once; on the main process."""
        if not self.accelerator.is_main_process:
            return
        step = self.step(bad)
        entry = {
            "step": step,
            "epoch": bad.epoch,
            "batch": bad.batch,
            "what": bad.what,
            "terms": list(bad.names),
            "policy": self.policy,
            "images": images(bad, self.data.batches, self.accumulate),
        }
        file = self.folder / REPORT
        known = json.loads(file.read_text()) if file.exists() else []
        if entry not in known:
            say(f"{self.title}: {bad} was not finite at step {step}; {self.policy}, images in {file}")
            checkpoint.write_json(file, [*known, entry])

    def step(self, bad: NotFinite) -> int:
        """The optimizer step, counted from 1, to which the batch belongs."""
        return bad.epoch * (len(self.data) // self.accumulate) + bad.batch // self.accumulate + 1

    def end(self, bad: NotFinite) -> FloatingPointError:
        """What to raise where the run stops for it."""
        return FloatingPointError(
            f"{self.title}: {bad} was not finite at step {self.step(bad)} (epoch {bad.epoch + 1}, batch "
            f"{bad.batch + 1}; its images: {self.folder / REPORT}); the checkpoint before it is whole; lower "
            "optimizer.lr, set optimizer.clip_grad, or say on_nonfinite=skip or rollback"
        )
