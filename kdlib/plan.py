"""What a dry run found: the terms with all that they train, and a table of their pairs for people."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size

from .terms import Term


@dataclass(frozen=True)
class Row:
    """One pair of the plan: what is compared with what."""

    term: str
    student: str
    teacher: str
    layouts: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """As the loss sees them, before the adapter, for the batch of the dry run."""
    adapter: str
    parameters: int
    """Trained numbers in the adapter."""


@dataclass(frozen=True)
class Plan:
    """What ``fit`` found: the terms, ready for ``Teacher`` and ``Distiller``, and one row a pair."""

    terms: tuple[Term, ...]
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("term", "student", "teacher", "layout", "shape", "adapter", "parameters")
        body = [
            (
                r.term,
                r.student,
                r.teacher,
                " | ".join(dict.fromkeys(r.layouts)),
                _arrow(*r.shapes),
                r.adapter,
                f"{r.parameters:,}",
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in [head, *body]
        )


def _arrow(student: Size | tuple[int, ...], teacher: Size | tuple[int, ...]) -> str:
    """Both shapes without the batch, or one where they agree."""
    mine, theirs = ("×".join(map(str, shape[1:])) for shape in (student, teacher))
    return mine if mine == theirs or not theirs else f"{mine} → {theirs}"
