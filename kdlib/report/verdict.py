"""What a run came to, in one sentence that stands at the head of the page; and beside another run."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import Gain, gain
from .view import Row, View

CHANCE = 0.05
"""A gain is called one where models equally good would differ as much more seldom, by McNemar's exact test."""


def verdict(rows: Sequence[Row], images: int) -> str:
    """The student against the baseline and the best teacher; nothing where the student is not there.

    Args:
        rows: of the outcome table.
        images: of the test set.
    """
    known = {row.what: row for row in rows if row.top1 is not None}
    if "student" not in known:
        return ""
    student = known["student"]
    assert student.top1 is not None
    parts = [f"The student is right on {student.top1:.2f} % of {images:,} test images"]
    if student.gain is not None:
        parts.append(_against(student.gain, "the baseline"))
    teachers = {what: row.top1 for what, row in known.items() if what.startswith("teacher ") and row.top1 is not None}
    if teachers:
        best = max(teachers, key=lambda what: teachers[what])
        gap = student.top1 - teachers[best]
        parts.append(f"{abs(gap):.2f} points {'above' if gap >= 0 else 'below'} {best}")
    return ", ".join(parts) + "."


def beside(first: View, other: View) -> str:
    """The student of another run against the first run's, over the same images; nothing where they are not the same."""
    mine, theirs = other.answers, first.answers
    if not {"student"} <= mine.logits.keys() & theirs.logits.keys() or not mine.labels.equal(theirs.labels):
        return ""
    return f"{_against(gain(theirs.right('student'), mine.right('student')), f'the student of {first.name}')}."


def _against(found: Gain, whom: str) -> str:
    chance = "" if found.chance < CHANCE else " (no more than chance among these images)"
    side = "above" if found.points >= 0 else "below"
    return f"{abs(found.points):.2f} ± {found.error:.2f} points {side} {whom}{chance}"
