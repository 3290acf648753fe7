"""One dry run before training: layouts are told, adapters and learnable losses get their sizes, misfits are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import build_adapter, find_layout, fitting_layouts
from .distiller import check_number, read
from .plan import Plan, Row
from .taps import Taps, in_eval, logits_of
from .teacher import Panel, Teacher
from .terms import Term, check_terms


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
    differ, and learnable losses learn their sizes. Nothing is trained and nothing of either model changes, except that
    the teacher is frozen, and not even that where something is wrong. Adapters are made anew by every call; a loss that
    learns goes along with its term, so a second student needs terms of its own.

    Args:
        terms: what the student learns from.
        student, teacher: the models; the teacher may be a ``Panel``.
        images: ``(B, C, H, W)``; two are enough.
        prepare: as for ``Teacher``.

    Raises:
        ValueError: a layout that cannot be told; a pair of different shapes in a term without an adapter; teacher and
            student with different numbers of classes; a tap that does not exist; a loss that fails on its pair, or
            gives no single number; one model as both.
        RuntimeError: a tap that ``Taps`` refuses; a model that answers with something else than one tensor.
    """
    if any(part is student for part in teacher.modules()):
        raise ValueError(
            "the student is the teacher, or a part of it, and teachers are frozen; give the teacher a copy, "
            "copy.deepcopy(student)"
        )
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
    for taps in hooked.taps.values():
        taps.run_on = True
    try:
        targets = hooked(images)
    finally:
        hooked.remove()
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
                built = build_adapter(term.adapter, str(term.view), s.shape, t.shape, images.shape)
                adapters[pair.student] = built.to(s.device, _dtype(student))
            rows.append(_row(term, pair.student, pair.teacher, s, t, adapters.get(pair.student)))
            mine.append(read(term, 0, seen[pair.student], images.shape, adapters.get(pair.student)))
            theirs.append(t)
        term = replace(term, adapters=adapters, adapter=term.adapter if adapters else None)  # where no shapes differ
        if "teacher" not in term.against or all(t is not None for t in theirs):
            _size(term, mine, theirs, teacher)
        if term.against == ("teacher",) and all(t is not None for t in theirs):
            _rehearse(term, mine, theirs)
        fitted.append(term)
    return Plan(tuple(fitted), tuple(rows))


def _dtype(model: nn.Module) -> torch.dtype:
    """Of its weights; under autocast its features tell another, in which an optimizer's small steps would be lost."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


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
    return seen | {"@output": logits_of(answer, "student")}


def _layouts(
    term: Term,
    seen: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    images: Tensor,
    models: tuple[nn.Module, nn.Module],
) -> tuple[str | None, str | None]:
    """The term's layouts of student and teacher: as stated, else the one that fits all its pairs, else found anew for
    each."""
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
        fits = [fitting_layouts(x.shape, images.shape, prefix) for x in tensors]
        shared = set(fits[0]).intersection(*fits) if fits else set()
        told.append(stated[side] or (shared.pop() if len(shared) == 1 else None))
        if told[side] is None:
            for x in tensors:
                try:
                    find_layout(x.shape, images.shape, prefix)
                except ValueError as error:
                    raise ValueError(f"term {term.name!r}, {('student', 'teacher')[side]}: {error}") from None
    return told[0], told[1]


def _row(term: Term, student: str, teacher: str, s: Tensor, t: Tensor | None, adapter: nn.Module | None) -> Row:
    count = sum(p.numel() for p in adapter.parameters() if p.requires_grad) if adapter else 0
    layouts = tuple(layout or "-" for layout in term.layouts())
    shapes = (tuple(s.shape), tuple(t.shape) if t is not None else ())
    return Row(
        term.name, student, teacher, (layouts[0], layouts[1]), shapes, type(adapter).__name__ if adapter else "-", count
    )


def _size(term: Term, mine: list[Tensor], theirs: list[Any], teacher: nn.Module) -> None:
    """Sizes a loss that learns; the teacher's side is None for one against labels only."""
    if not hasattr(term.loss, "fit"):
        return
    extra = {"head": _head(term, teacher)} if getattr(term.loss, "wants_head", False) else {}
    for where, s, t in _calls(term, mine, theirs):
        try:
            term.loss.fit(s, t, **extra)
        except ValueError as error:
            raise ValueError(f"term {term.name!r}, {where}: {error}") from None


@torch.no_grad()
def _rehearse(term: Term, mine: list[Tensor], theirs: list[Any]) -> None:
    """Calls a loss of two tensors once for each pair, so that a misfit shows before training."""
    loss = term.loss
    with in_eval(loss) if isinstance(loss, nn.Module) else nullcontext():  # no statistics move, no mask is drawn
        for where, s, t in _calls(term, mine, theirs):
            try:
                value = loss(s, t)
            except Exception as error:  # a loss of one's own fails in its own way
                raise ValueError(_misfit(term, where, s, t, error)) from error
            check_number(term, value)


def _calls(term: Term, mine: list[Tensor], theirs: list[Any]) -> list[tuple[str, Any, Any]]:
    """(pairs in words, student's side, teacher's side) of each call of the loss."""
    words = [f"{pair.student} against {pair.teacher}" for pair in term.pairs]
    return [(", ".join(words), mine, theirs)] if term.lists else list(zip(words, mine, theirs, strict=True))


def _misfit(term: Term, where: str, s: Any, t: Any, error: Exception) -> str:
    differ = not term.lists and s.shape != t.shape
    if term.view == "logits" and differ:
        return (
            f"term {term.name!r}: the student answers {s.shape[-1]} classes, the teacher {t.shape[-1]}; both must tell "
            "the same classes apart (num_classes)"
        )
    view = ", with view='tokens' or 'map'," if term.view == "raw" else " on the term"
    hint = f"; adapter='linear'{view} brings channels and grid together" if differ and not term.adapter else ""
    return f"term {term.name!r}, {where}: {error}{hint}"


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
