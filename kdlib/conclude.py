"""What a recipe does once its run is made: the curves, the summary, the table."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from typing import Any

from torch import nn

from . import results, runs
from .files import SUMMARY
from .progress import console
from .recipe import Recipe
from .training import checkpoint, runfolder


def conclude(
    outcome: runs.Outcome,
    derived: Mapping[str, tuple[nn.Module, float]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[results.Row]:
    """Draws ``curves.png``, adds to ``summary.json``, prints the outcome table and returns its rows; on one process.

    Args:
        outcome: a finished run.
        derived: what was made of the student, ``{"fused": (model, top-1 in percent)}``: further rows of the table.
        facts: further entries of the summary.
    """
    parts = {f"teacher {name}": teacher for name, teacher in outcome.teachers.items()}
    parts |= {"baseline": outcome.baseline} if outcome.baseline else {}
    parts |= {"student": outcome}
    shown = [(what, o.name, o.net, o.result["top1"]) for what, o in parts.items()]
    shown += [(what, outcome.name, net, top1) for what, (net, top1) in (derived or {}).items()]
    speeds = results.throughput([net for _, _, net, _ in shown], next(outcome.data.test.epoch(0))[0])
    rows = [
        results.Row(what, name, top1, results.count_parameters(net), speed)
        for (what, name, net, top1), speed in zip(shown, speeds, strict=True)
    ]
    trained = {what: o.folder for what, o in parts.items() if what == "student" or o.folder != outcome.folder}
    results.curves(trained, outcome.folder / "curves.png")
    top1 = {row.what: None if isnan(row.top1) else row.top1 for row in rows}
    summary = (runfolder.summary(outcome.folder) or {}) | {
        "teacher_top1": top1[rows[0].what] if outcome.teachers else None,
        "baseline_top1": top1.get("baseline"),
        "student_top1": top1["student"],
        **(facts or {}),
        "rows": [vars(row) | {"top1": top1[row.what]} for row in rows],
    }
    checkpoint.write_json(outcome.folder / SUMMARY, summary)
    console.print(results.table(rows, f"{outcome.data.name}, {outcome.seconds:.0f} s"))
    return rows


def make(recipe: Recipe) -> None:
    """A whole recipe, from teachers to table; what ``launch.main`` is given where the student stays as it is."""
    outcome = runs.run(recipe)
    if outcome.accelerator.is_main_process:
        conclude(outcome)
