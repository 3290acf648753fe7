"""One run as the page shows it: every number computed, every chart drawn, what is missing said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config import one_line
from ..results import count_parameters
from ..training import runfolder
from ..yaml12 import dump
from . import figures, plots
from .answers import Answers, answers, set_aside
from .changes import changes
from .opened import Member, Opened, metrics
from .similarity import similarity
from .timing import Step, time_step

CLASSES = 30
"""So many are shown at most."""


@dataclass(frozen=True)
class Row:
    """One model of the outcome table; None where it is not known."""

    what: str
    model: str
    top1: float | None
    gain: figures.Gain | None
    """Against the baseline."""
    ece: float | None
    parameters: int | None
    speed: float | None
    note: str


@dataclass(frozen=True)
class ClassRow:
    """One class, everything in percent of its images."""

    name: str
    right: dict[str, float]
    """By ``Member.what``: answered rightly."""
    agree: dict[str, float]
    """By teacher: the student answers as it does."""
    change: float | None
    """Student minus baseline, in points."""


@dataclass
class View:
    """What the template needs of a run."""

    name: str
    opened: Opened
    classes: tuple[str, ...]
    images: int
    rows: list[Row]
    lines: list[plots.Line]
    """Test accuracy of student, baseline and teachers over epochs."""
    terms: str
    term_lines: list[plots.Line]
    answers: Answers
    """Of every model that is there, to the test images."""
    by_class: list[ClassRow] = field(default_factory=list)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    calibration: list[dict[str, Any]] = field(default_factory=list)
    alike: list[dict[str, Any]] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    step: Step | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """Section to what is missing in it, and why."""

    @property
    def config(self) -> str:
        return dump(runfolder.resolved(self.opened.recipe))

    @property
    def teachers(self) -> list[Member]:
        return list(self.opened.teachers.values())

    def row(self, what: str) -> Row:
        return next(row for row in self.rows if row.what == what)


def look(opened: Opened, number: int, alone: bool) -> View:
    """Measures a run. ``number`` is its place among the runs of the page, ``alone`` whether it is the only one."""
    given = answers(opened)
    set_aside(opened, given)
    term_lines = _term_lines(opened)
    view = View(
        opened.name,
        opened,
        opened.data.classes,
        len(given.labels),
        _rows(opened, given),
        _accuracy_lines(opened, number, alone),
        plots.curves(term_lines, "value before its weight", log=True) if term_lines else "",
        term_lines,
        given,
    )
    _say_missing(view)
    view.calibration = _calibration(opened, given, None if alone else number)
    if "student" in given.logits:
        view.by_class = _by_class(opened, given)
        view.agreement = _agreement(opened, given)
        if "baseline" in given.logits:
            view.changes = changes(opened, given)
    view.alike = _alike(view)
    try:
        view.step = time_step(opened)
    except (ValueError, RuntimeError) as error:
        view.notes["time"] = f"A step could not be timed: {one_line(error)}."
    return view


def _say_missing(view: View) -> None:
    """Why sections are empty, in sentences."""
    opened = view.opened
    if opened.student.net is None:
        gone = f"The student is missing: {opened.student.missing}."
        view.notes |= dict.fromkeys(("classes", "agreement", "calibration", "changes"), gone)
    if not opened.teachers:
        view.notes["agreement"] = view.notes["alike"] = "This run has no teacher."
    elif not any(member.what in view.answers.logits for member in opened.teachers.values()):
        view.notes.setdefault("agreement", "No teacher's answers can be compared with the student's; see the outcome.")
    if opened.baseline is None:
        view.notes["changes"] = "This run has no baseline, so there is nothing to compare the student with."
    elif opened.baseline.net is None:
        view.notes["changes"] = f"The baseline is missing: {opened.baseline.missing}."
    if not view.terms:
        view.notes["curves"] = "There is no metrics.jsonl in this folder, or no epoch in it yet."
    if not opened.summary:
        note = opened.student.note
        view.notes["run"] = f"This run is not finished: the student is {note}." if note else "This run is not finished."


def _rows(opened: Opened, given: Answers) -> list[Row]:
    recorded = {str(row["what"]): row for row in opened.summary.get("rows", [])}
    rows = []
    for member in opened.members:
        what, logits = member.what, given.logits.get(member.what)
        gain = figures.gain(given.right("baseline"), given.right(what)) if _both(given, what, "baseline") else None
        rows.append(
            Row(
                what,
                member.name,
                None if logits is None else figures.accuracy(logits, given.labels),
                gain,
                None if logits is None else figures.ece(figures.reliability(logits, given.labels)),
                None if member.net is None else count_parameters(member.net),
                recorded.get(what, {}).get("images_per_second"),
                member.missing or member.note,
            )
        )
    known = [row.what for row in rows]
    for what, row in recorded.items():  # what the recipe made of the student, e.g. fused
        if what not in known:
            rows.append(
                Row(
                    what,
                    row["model"],
                    row["top1"],
                    None,
                    None,
                    row["parameters"],
                    row["images_per_second"],
                    "as recorded",
                )
            )
    return rows


def _both(given: Answers, what: str, other: str) -> bool:
    return what == "student" and other in given.logits and what in given.logits


def _in_colour(opened: Opened) -> list[Member]:
    """Student, baseline, teachers: the order that gives each model one colour all over the page."""
    return [opened.student, *([opened.baseline] if opened.baseline else []), *opened.teachers.values()]


def _accuracy_lines(opened: Opened, number: int, alone: bool) -> list[plots.Line]:
    lines: list[plots.Line] = []
    for member in _in_colour(opened):
        points = [(m["epoch"], m["top1"]) for m in metrics(member.folder) if "top1" in m] if member.folder else []
        if points:
            dash = {"student": "solid", "baseline": "dashed"}.get(member.what, "dotted")
            label = member.what if alone else f"{opened.name}: {member.what}"
            lines.append(plots.Line(label, points, len(lines) if alone else number, dash, member.folder))
    return lines


def _term_lines(opened: Opened) -> list[plots.Line]:
    epochs = metrics(opened.folder)
    names = dict.fromkeys(name for line in epochs for name in line["terms"])
    return [
        plots.Line(name, [(m["epoch"], m["terms"][name]) for m in epochs if name in m["terms"]], i)
        for i, name in enumerate(names)
    ]


def _by_class(opened: Opened, given: Answers) -> list[ClassRow]:
    """A row a class; of very many classes those that changed most."""
    count = len(opened.data.classes)
    right = {what: figures.by_class(given.right(what), given.labels, count) for what in given.logits}
    agree = {
        member.what: figures.by_class(given.given(member.what) == given.given("student"), given.labels, count)
        for member in opened.teachers.values()
        if member.what in given.logits
    }
    rows = [
        ClassRow(
            name,
            {what: shares[i] for what, shares in right.items()},
            {what: shares[i] for what, shares in agree.items()},
            right["student"][i] - right["baseline"][i] if "baseline" in right else None,
        )
        for i, name in enumerate(opened.data.classes)
    ]
    if len(rows) > CLASSES:
        rows.sort(key=lambda row: -abs(row.change) if row.change is not None and row.change == row.change else 0)
    return rows[:CLASSES]


def _agreement(opened: Opened, given: Answers) -> list[dict[str, Any]]:
    return [
        {
            "teacher": member.what,
            "student": figures.percent(given.given("student") == given.given(member.what)),
            "baseline": (
                figures.percent(given.given("baseline") == given.given(member.what))
                if "baseline" in given.logits
                else None
            ),
            "cases": figures.together(given.given("student"), given.given(member.what), given.labels),
        }
        for member in opened.teachers.values()
        if member.what in given.logits
    ]


def _calibration(opened: Opened, given: Answers, run: int | None) -> list[dict[str, Any]]:
    """A diagram a model, in the colour of its curve: its own, or on a page of several runs its run's."""
    found = []
    for number, member in enumerate(_in_colour(opened)):
        if member.what in given.logits:
            logits = given.logits[member.what]
            bins = figures.reliability(logits, given.labels)
            found.append(
                {
                    "what": member.what,
                    "svg": plots.diagram(bins, number if run is None else run),
                    "ece": figures.ece(bins),
                    "nll": figures.nll(logits, given.labels),
                    "confidence": 100 * sum(b.share * b.confidence for b in bins),
                }
            )
    return found


def _alike(view: View) -> list[dict[str, Any]]:
    """Heat maps of the student before and after training against each teacher."""
    opened, found = view.opened, []
    for name, member in opened.teachers.items():
        if member.net is None:
            view.notes["alike"] = f"{member.what} is missing: {member.missing}."
            continue
        try:
            ours, theirs, values = similarity(opened, name)
        except (ValueError, RuntimeError) as error:
            view.notes["alike"] = f"The blocks of {member.what} cannot be compared: {one_line(error)}."
            continue
        for when, matrix in zip(("before", "after"), values, strict=True):
            if matrix is not None:
                rows, columns = ([_short(tap) for tap in taps] for taps in (ours, theirs))
                svg = plots.heat(matrix, rows, columns, "student's block", "teacher's block")
                found.append({"teacher": member.what, "when": when, "svg": svg, "values": matrix})
            else:
                why = "the initial student cannot be made again" if when == "before" else "the student is missing"
                view.notes["alike"] = f"Nothing to show {when} training: {why}."
    return found


def _short(tap: str) -> str:
    """``0.1`` of ``stages.0.blocks.1``: the parts that tell blocks apart."""
    return ".".join(part for part in tap.split(".") if not part.isalpha()) or tap
