"""What each term weighs: its value, how hard it pulls at the student, and whether it pulls the way the labels do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ..distiller import Distiller
from ..teacher import Teacher

Batch = tuple[Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Weighed:
    """One term, means over the batches."""

    name: str
    weight: float
    """As the recipe says it, whatever the schedule does."""
    value: float
    """Before the weight."""
    gradient: float
    """Norm of its gradient with respect to the student's parameters, before the weight."""
    share: float
    """Its part of the sum of all weighted gradient norms."""
    cosine: float
    """Of its gradient with that of the cross-entropy against the labels: 1 pulls the same way, below 0 against it."""
    proposal: float | None
    """The weight with which it pulls as hard as the first term on the student's answer (else the first term) that pulls
    at all; None where there is no such term, or no weight makes this one pull."""


def weigh(
    distiller: Distiller, teacher: Teacher | None, batches: Sequence[Batch], accelerator: Accelerator
) -> list[Weighed]:
    """Measures every term of the objective, alone, in training mode; nothing is trained.

    Source of the idea that gradient norms are what weights should balance: GradNorm, Chen et al., ICML 2018,
    arXiv 1711.02257 (there during training; here once, as a proposal).
    """
    names = [term.name for term in distiller.terms]
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    distiller.train()
    for images, given in batches:
        with torch.no_grad(), accelerator.autocast():
            targets = {**given, **(teacher(images) if teacher is not None else {})}
        task = None
        for name in names:
            with _alone(distiller, name), torch.random.fork_rng():
                torch.manual_seed(0)  # the same dropout for every term
                with accelerator.autocast():
                    out = distiller(images, targets)
                    wanted = F.cross_entropy(out.logits.float(), targets["@labels"])
                if task is None:
                    task = _gradient(wanted, parameters, retain=True)
                own = _gradient(out.loss, parameters)
            cosine = torch.dot(own, task) / (own.norm() * task.norm()).clamp_min(1e-30)
            sums[name] += torch.stack([out.terms[name].double(), own.norm(), cosine]).cpu()
    means: dict[str, list[float]] = {name: (total / len(batches)).tolist() for name, total in sums.items()}
    weights = {term.name: term.weight for term in distiller.terms}
    pull = {name: weights[name] * means[name][1] for name in names}
    pulling = [term for term in distiller.terms if pull[term.name] > 0]
    answering = [term for term in pulling if "@output" in term.student_taps]
    goal = pull[(answering or pulling)[0].name] if pulling else None
    whole = sum(pull.values()) or 1.0
    return [
        Weighed(
            name, weights[name], means[name][0], means[name][1], pull[name] / whole, means[name][2],
            None if goal is None or means[name][1] == 0 else _round(goal / means[name][1]),
        )
        for name in names
    ]  # fmt: skip


@contextmanager
def _alone(distiller: Distiller, name: str) -> Any:
    """This term with weight 1, all others off."""
    before = distiller.weights_in_force()
    distiller.set_weights({other: float(other == name) for other in before})
    try:
        yield
    finally:
        distiller.set_weights(before)


def _gradient(loss: Tensor, parameters: Sequence[Tensor], retain: bool = False) -> Tensor:
    """The whole gradient as one vector, float64; zeros where the loss does not reach."""
    found = torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in zip(found, parameters, strict=True)]
    )


def _round(value: float) -> float:
    """Two significant digits; a proposal has no more."""
    return float(f"{value:.2g}")
