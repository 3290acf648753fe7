"""One dry run before training: layouts are told, adapters and learnable losses get their sizes, a plan is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from .adapters import build_adapter, find_layout
from .distiller import read
from .taps import Taps, in_eval
from .teacher import Panel, Teacher
from .terms import Term, check_terms


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


def fit(
    terms: Sequence[Term],
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    prepare: nn.Module | Mapping[str, nn.Module] | None = None,
) -> Plan:
    """Runs both models once on a few images and sizes everything that training needs.

    The layout of every tapped tensor is told (or asked for), each ``adapter`` is built where the shapes of a pair
    differ, and learnable losses learn their sizes. Nothing of either model changes, except that the teacher is frozen,
    and not even that where something is wrong.

    Args:
        terms: what the student learns from.
        student, teacher: the models; the teacher may be a ``Panel``.
        images: ``(B, C, H, W)``; two are enough.
        prepare: as for ``Teacher``.

    Raises:
        ValueError: a layout that cannot be told; a pair of different shapes in a term without an adapter; teacher and
            student with different numbers of classes; a tap that does not exist.
    """
    with _untouched_if_it_fails(teacher):
        return _fit(check_terms(terms), student, teacher, images, prepare)


@contextmanager
def _untouched_if_it_fails(model: nn.Module) -> Iterator[None]:
    """Puts modes and gradients of a model back where what is done ends in an error: the two may have been swapped."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except Exception:
        for module, mode in modes.items():
            module.training = mode
        for parameter, asked in trained.items():
            parameter.requires_grad_(asked)
        raise


def _fit(
    terms: Sequence[Term],
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    prepare: nn.Module | Mapping[str, nn.Module] | None,
) -> Plan:
    hooked = Teacher(teacher, terms, prepare=prepare)
    try:
        targets = hooked(images)
    finally:
        for taps in hooked.taps.values():
            taps.remove()
    seen = _look(student, terms, images)
    fitted, rows = [], []
    for term in terms:
        term = replace(term, layout=_layouts(term, seen, targets, images, (student, teacher)))
        adapters: dict[str, nn.Module] = dict(term.adapters)
        mine, theirs = [], []
        for pair in term.pairs:
            s = read(term, 0, seen[pair.student], images.shape)
            t = read(term, 1, targets[pair.teacher], images.shape) if pair.teacher in targets else None
            if t is not None and term.adapter is not None and pair.student not in adapters and s.shape != t.shape:
                _check_alone(term, pair.student)
                adapters[pair.student] = build_adapter(term.adapter, str(term.view), s.shape, t.shape, images.shape).to(
                    images.device
                )
            rows.append(_row(term, pair.student, pair.teacher, s, t, adapters.get(pair.student)))
            mine.append(adapters[pair.student](s) if pair.student in adapters else s)
            theirs.append(t)
        term = replace(term, adapters=adapters, adapter=term.adapter if adapters else None)  # where no shapes differ
        if all(t is not None for t in theirs):
            _try(term, mine, theirs, teacher)
        fitted.append(term)
    return Plan(tuple(fitted), tuple(rows))


def _check_alone(term: Term, tap: str) -> None:
    """Raises where a student's tap that needs an adapter, which is the tap's, is compared with several teacher's taps.

    Raises:
        ValueError: it is.
    """
    if len(others := [pair.teacher for pair in term.pairs if pair.student == tap]) > 1:
        raise ValueError(
            f"term {term.name!r}: {tap!r} is compared with {', '.join(others)} through one adapter; give each of these "
            "pairs a term, and so an adapter, of its own"
        )


@torch.no_grad()
def _look(student: nn.Module, terms: Sequence[Term], images: Tensor) -> dict[str, Tensor]:
    """What the student's taps see, in eval mode; its mode is restored."""
    taps = Taps(student, [tap for term in terms for tap in term.student_taps if tap != "@output"])
    try:
        with in_eval(student):
            answer, seen = taps.watch(student, images)
    finally:
        taps.remove()
    return seen | {"@output": answer}


def _layouts(
    term: Term,
    seen: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    images: Tensor,
    models: tuple[nn.Module, nn.Module],
) -> tuple[str | None, str | None]:
    """The term's layouts of student and teacher: as stated, else as all its pairs agree, else found anew for each."""
    stated = term.layouts()
    if term.view == "raw":
        return stated
    told: list[str | None] = []
    for side, tensors in enumerate(
        ([seen[p.student] for p in term.pairs], [targets[p.teacher] for p in term.pairs if p.teacher in targets])
    ):
        owner = models[side]
        if isinstance(owner, Panel):
            owner = owner[term.pairs[0].teacher.partition(".")[0]] if tensors else owner
        prefix = getattr(owner, "num_prefix_tokens", None)
        try:
            found = {stated[side] or find_layout(x.shape, images.shape, prefix) for x in tensors}
        except ValueError as error:
            raise ValueError(f"term {term.name!r}, {('student', 'teacher')[side]}: {error}") from None
        told.append(found.pop() if len(found) == 1 else None)
    return told[0], told[1]


def _row(term: Term, student: str, teacher: str, s: Tensor, t: Tensor | None, adapter: nn.Module | None) -> Row:
    count = sum(p.numel() for p in adapter.parameters() if p.requires_grad) if adapter else 0
    layouts = tuple(layout or "-" for layout in term.layouts())
    shapes = (tuple(s.shape), tuple(t.shape) if t is not None else ())
    return Row(
        term.name, student, teacher, (layouts[0], layouts[1]), shapes, type(adapter).__name__ if adapter else "-", count
    )


def _try(term: Term, mine: list[Tensor], theirs: list[Any], teacher: nn.Module) -> None:
    """Sizes a learnable loss, and calls a loss of two tensors once, so that a misfit shows before training."""
    loss = term.loss
    if hasattr(loss, "fit"):
        extra = {"head": _head(term, teacher)} if getattr(loss, "wants_head", False) else {}
        try:
            for s, t in [(mine, theirs)] if term.lists else zip(mine, theirs, strict=True):
                loss.fit(s, t, **extra)
        except ValueError as error:
            raise ValueError(f"term {term.name!r}: {error}") from None
    if term.against != ("teacher",):
        return
    training = getattr(loss, "training", False)
    try:
        if isinstance(loss, nn.Module):
            loss.eval()  # no batch statistics move, no mask is drawn
        with torch.no_grad():
            if term.lists:
                loss(mine, theirs)
            for s, t in [] if term.lists else zip(mine, theirs, strict=True):
                loss(s, t)
    except ValueError as error:
        if term.view == "logits" and mine[0].shape != theirs[0].shape:
            raise ValueError(
                f"term {term.name!r}: the student answers {mine[0].shape[-1]} classes, the teacher "
                f"{theirs[0].shape[-1]}; "
                "both must tell the same classes apart (num_classes)"
            ) from None
        hint = "" if term.adapter else "; adapter='linear' on the term brings channels and grid together"
        raise ValueError(
            f"term {term.name!r}, {term.pairs[0].student} against {term.pairs[0].teacher}: {error}{hint}"
        ) from None
    finally:
        if isinstance(loss, nn.Module):
            loss.train(training)


def _head(term: Term, teacher: nn.Module) -> nn.Module:
    model: Any = teacher
    if isinstance(teacher, Panel):
        model = teacher[term.pairs[0].teacher.partition(".")[0]]
    if not hasattr(model, "get_classifier"):
        raise ValueError(
            f"term {term.name!r} needs the teacher's classifier, and {type(model).__name__} has no get_classifier(); "
            "give the loss head=…"
        )
    return model.get_classifier()


def _arrow(student: Size | tuple[int, ...], teacher: Size | tuple[int, ...]) -> str:
    """Both shapes without the batch, or one where they agree."""
    mine, theirs = ("×".join(map(str, shape[1:])) for shape in (student, teacher))
    return mine if mine == theirs or not theirs else f"{mine} → {theirs}"
