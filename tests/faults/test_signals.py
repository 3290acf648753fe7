"""SIGTERM and Ctrl-C: what is at hand is finished and saved, the exit code and the next command are told."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.faults.harness import FILES, RICH, check_as_if_nothing_had_been

ROWS = [
    (RICH, "batch:2:TERM", 143, "step-00000001"),
    (RICH, "step:3:INT", 130, "step-00000003"),
    (RICH, "step:6:TERM", 143, "step-00000006"),
    (RICH, "evaluate:1:TERM", 143, "step-00000006"),
    (RICH, "save.tensors:2:INT", 130, "step-00000003"),
    (RICH, "log:1:TERM", 143, "step-00000002"),
    (FILES, "batch:4:TERM", 143, "step-00000004"),
]
"""The recipe, the fault, the exit code, and the checkpoint that is then there."""


@pytest.mark.fault("signal")
@pytest.mark.parametrize(("recipe", "fault", "code", "newest"), ROWS, ids=[row[1] for row in ROWS])
def test_a_signal_saves_and_the_same_command_goes_on(
    recipe: dict[str, Any], fault: str, code: int, newest: str, run: Any
) -> None:
    one = run(recipe)
    said = one.go("seed=0", KDLIB_FAULT=fault, code=code)
    assert said.rstrip().endswith("stopped; everything is saved. To go on: accelerate launch run.py seed=0"), said
    assert one.checkpoints[-1].name == newest
    one.go("seed=0")
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("signal")
def test_before_the_first_step_there_is_nothing_to_save(run: Any) -> None:
    one = run(RICH)
    said = one.go(KDLIB_FAULT="start:1:TERM", code=143)
    assert "stopped; the last checkpoint is whole. To go on:" in said and "Traceback" not in said
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("signal")
def test_a_second_ctrl_c_ends_at_once(run: Any) -> None:
    one = run(RICH)
    process = one.start(KDLIB_BREAK="sleep:0.5")
    one.wait_for((one.folder / "asleep").exists)
    os.kill(process.pid, signal.SIGINT)
    one.wait_for(lambda: "Ctrl-C again ends at once" in one.said())
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    said = one.end(process, 130)
    assert "the last checkpoint is whole" in said and one.checkpoints[-1].name == "step-00000002"
    one.go()
    check_as_if_nothing_had_been(one)
