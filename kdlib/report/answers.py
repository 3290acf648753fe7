"""What the models of a run answer on its test set, and the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..recipe.probe import judged
from .opened import Opened


@dataclass
class Answers:
    """What the models of a run answer on its test set."""

    labels: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)
    """By ``Member.what``, ``(N, K)`` float32 on the CPU."""

    def given(self, what: str) -> Tensor:
        """The class that a model answers, ``(N,)``."""
        return self.logits[what].argmax(1)

    def right(self, what: str) -> Tensor:
        return self.given(what) == self.labels


@torch.no_grad()
def answers(opened: Opened) -> Answers:
    """Runs every model that is there over the test images, all of them on each batch; they are sorted by number."""
    labels: list[Tensor] = []
    logits: dict[str, list[Tensor]] = {member.what: [] for member in opened.members if member.net is not None}
    for images, truth in opened.data.test.epoch(0):
        labels.append(truth.cpu())
        for member in opened.members:
            if member.net is not None:
                given = member.prepare(images) if member.prepare is not None else images
                logits[member.what].append(member.net(given).float().cpu())
    order = torch.cat(opened.data.test.batches.rows(0)).argsort()
    return Answers(torch.cat(labels)[order], {what: torch.cat(parts)[order] for what, parts in logits.items()})


def set_aside(opened: Opened, given: Answers) -> None:
    """Takes answers that are none out of all that follows: models with NaN, whose first, mostly class 0, would be their
    answer; and the answers of teachers of other classes, whose features are looked at all the same.
    """
    for member in opened.members:
        logits = given.logits.get(member.what)
        if logits is not None and (lost := int(logits.isnan().any(1).sum())):
            del given.logits[member.what]
            member.net, member.missing = None, f"it answers NaN to {lost:,} of {len(logits):,} test images"
    for name, member in opened.teachers.items():
        spec, logits = opened.recipe.teachers[name], given.logits.get(member.what)
        if member.net is None or logits is None or judged(spec, member.net, logits, len(opened.data.classes)):
            continue
        del given.logits[member.what]
        member.note = "its weights tell other classes apart than the data, so it has no accuracy"


def test_images(opened: Opened, places: Sequence[int]) -> dict[int, Tensor]:
    """Test images by number, uint8 ``(C, H, W)``, their normalisation undone."""
    wanted, found = set(places), dict[int, Tensor]()
    rows = opened.data.test.batches.rows(0)
    for (images, _), row in zip(opened.data.test.epoch(0), rows, strict=False) if wanted else ():
        for at, place in enumerate(row.tolist()):
            if place in wanted:
                found[place] = (opened.data.pixels(images[at].cpu()) * 255).round().clamp(0, 255).byte()
        if len(found) == len(wanted):
            break
    return found
