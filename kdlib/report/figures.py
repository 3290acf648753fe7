"""The numbers of a report: plain functions of logits ``(N, K)`` and labels ``(N,)``."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 15
"""Of the reliability diagram and the ECE, of equal width."""


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent; NaN is no answer, and wrong."""
    return percent((logits.argmax(1) == labels) & ~logits.isnan().any(1))


def percent(hits: Tensor) -> float:
    """Share of true entries, in percent; NaN of none."""
    return 100 * hits.double().mean().item()


def by_class(hits: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Of the images of each class, the percentage that ``hits`` marks; NaN for a class without images."""
    totals = torch.bincount(labels, minlength=classes).double()
    return (100 * torch.bincount(labels[hits], minlength=classes).double() / totals).tolist()


class Gain(NamedTuple):
    """One model's share of right answers minus another's, over the same images."""

    points: float
    error: float
    """Standard error of ``points``; infinite for one image."""
    chance: float
    """Probability that models equally good differ by as much: ``mcnemar``."""


def gain(before: Tensor, after: Tensor) -> Gain:
    """The difference of two models over the same images, right or not ``(N,)``.

    The pairs are what counts: images that both have right or both have wrong tell nothing about the difference.
    """
    difference, count = after.double() - before.double(), len(after)
    error = 100 * (difference.var() / count).sqrt().item() if count > 1 else math.inf
    return Gain(
        100 * difference.mean().item(), error, mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    )


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact test: a fair coin, thrown for each image that one model alone has right, falls as unevenly.

    McNemar, Psychometrika 12, 1947; by the binomial distribution, two-sided: ``min(1, 2 P[X ≤ min(won, lost)])``.
    """
    throws, way, ways = won + lost, 1, 1
    for fewer in range(min(won, lost)):
        way = way * (throws - fewer) // (fewer + 1)
        ways += way
    return min(1.0, 2 * ways / 2**throws)


@dataclass(frozen=True)
class Bin:
    """Answers of nearly equal confidence."""

    confidence: float
    """Mean, 0 to 1."""
    accuracy: float
    """Share that is right, 0 to 1."""
    share: float
    """Of all answers, 0 to 1."""
    count: int


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """The bins that hold answers. Confidence: the largest softmax probability; bin ``i``: ``(i/bins, (i+1)/bins]``.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599, section 2.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
    right = (answer == labels).double()
    found = []
    for i in range(bins):
        inside = place == i
        if inside.any():
            share = inside.double().mean().item()
            found.append(Bin(confidence[inside].mean().item(), right[inside].mean().item(), share, int(inside.sum())))
    return found


def ece(bins: list[Bin]) -> float:
    """Expected calibration error in percent: ``Σ share · |accuracy − confidence|`` over bins (eq. 3 there)."""
    return 100 * sum(b.share * abs(b.accuracy - b.confidence) for b in bins)


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, nats."""
    return torch.nn.functional.cross_entropy(logits.double(), labels).item()


def together(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """How two models' answers fall, in percent of the images; the five cases are all there are."""
    mine, theirs = student == labels, teacher == labels
    return {
        "both right": percent(mine & theirs),
        "only the student right": percent(mine & ~theirs),
        "only the teacher right": percent(~mine & theirs),
        "the same mistake": percent(~mine & (student == teacher)),
        "different mistakes": percent(~mine & ~theirs & (student != teacher)),
    }


@dataclass(frozen=True)
class Confusion:
    """A mistake of one kind, and how often it is made before and after."""

    label: int
    answer: int
    before: int
    after: int


def confusions(before: Tensor, after: Tensor, labels: Tensor, most: int = 8) -> list[Confusion]:
    """The kinds of mistakes whose number changed most, answers ``(N,)`` of two models."""
    counts = [Counter(zip(labels.tolist(), answers.tolist(), strict=True)) for answers in (before, after)]
    kinds = sorted({(label, answer) for count in counts for label, answer in count if label != answer})
    kinds.sort(key=lambda kind: -abs(counts[1][kind] - counts[0][kind]))
    changed = [Confusion(*kind, counts[0][kind], counts[1][kind]) for kind in kinds[:most]]
    return [one for one in changed if one.before != one.after]


def surest(logits: Tensor, chosen: Tensor, most: int) -> list[int]:
    """Of the images that ``chosen`` marks, the places of those that the model is surest of."""
    confidence = logits.double().softmax(1).amax(1).masked_fill(~chosen, -1)
    return confidence.argsort(descending=True, stable=True)[: min(most, int(chosen.sum()))].tolist()
