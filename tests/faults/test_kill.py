"""kill -9 wherever it hurts; started again, the run ends as if nothing had been, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import FILES, MEMORY, RICH, SHARDS, check_as_if_nothing_had_been

KILLED = -9

SAVE, KILL = pytest.mark.fault("save"), pytest.mark.fault("kill")
WRITING = (
    # the checkpoint before the first step
    *("save.begin:1", "save.tensors:1", "save.tree:1", "save.manifest:1", "save.synced:1", "save.moved:1"),
    # later ones
    *("save.begin:3", "save.tensors:2", "save.tree:3", "save.manifest:2", "save.synced:4", "save.moved:3"),
    *("save.pruned:3", "save.pruned:4"),
    # files: the config is the first, then the best student's weights, …
    *("file.draft:1", "file.synced:2", "file.draft:3", "file.moved:3", "file.moved:4", "file.moved:5"),
)
ELSEWHERE: list[tuple[dict[str, Any], list[str]]] = [
    *((RICH, [point]) for point in (
        # before the first step
        "start:1", "batch:1",
        # in a step: between accumulated batches, between backward and update, after it, at an epoch's last
        "batch:2", "backward:4", "step:1", "step:3", "step:6", "step:12",
        # between a line and the checkpoint that knows it, within an epoch and at its end
        "log:2", "log:5",
        # around evaluation
        "evaluate:1", "evaluate:2", "best:1",
    )),
    (RICH, ["step:3", "resume:1"]),
    (RICH, ["step:4", "step:1", "save.manifest:1", "step:2", "evaluate:1"]),
    (RICH, ["evaluate:1:TERM", "log:1"]),
    (MEMORY, ["step:5", "batch:9"]),
    (MEMORY, ["step:17"]),
    (FILES, ["step:3"]),
    (FILES, ["batch:10"]),
    (SHARDS, ["step:3"]),
    (SHARDS, ["batch:10", "evaluate:1"]),
]  # fmt: skip
"""The recipe, and where each process in turn is killed."""
POINTS = [
    *(pytest.param(RICH, [point], marks=SAVE, id=point) for point in WRITING),
    *(pytest.param(recipe, points, marks=KILL, id="+".join(points)) for recipe, points in ELSEWHERE),
]


@pytest.mark.parametrize(("recipe", "points"), POINTS)
def test_killed_and_started_again(recipe: dict[str, Any], points: list[str], run: Any) -> None:
    one = run(recipe)
    for point in points:
        one.go(KDLIB_FAULT=point, code=143 if point.endswith("TERM") else KILLED)
        assert not (one.output / "summary.json").exists() or point.startswith("file.moved")
    one.go()
    check_as_if_nothing_had_been(one)
