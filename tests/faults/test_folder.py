"""One run a folder, and a launch that starts copies which do not know of each other is refused."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from tests.faults.harness import FILES, RICH, check_as_if_nothing_had_been


@pytest.mark.fault("launch")
def test_a_second_run_is_refused_while_the_first_goes_on(run: Any) -> None:
    one = run(RICH)
    first = one.start(KDLIB_BREAK="sleep:0.5")
    one.wait_for((one.folder / "asleep").exists)
    said = one.go(said="second", code=2)
    assert f"output: runs/r is in use by process {first.pid} on " in one.said("second"), said
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("launch")
def test_workers_that_outlive_the_run_do_not_hold_its_folder(run: Any) -> None:
    one = run(FILES)
    first = one.start(KDLIB_BREAK="sleep:1.1")
    one.wait_for((one.folder / "asleep").exists)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("launch")
def test_copies_that_do_not_know_of_each_other_are_refused(run: Any) -> None:
    one = run(RICH)
    said = one.go(code=2, WORLD_SIZE="2")
    assert "launch: 2 processes were started, but each runs alone" in said and not one.output.exists()


@pytest.mark.fault("launch")
def test_a_run_of_another_config_is_left_alone(run: Any) -> None:
    one = run(RICH)
    one.go(KDLIB_FAULT="step:3", code=-9)
    assert "already holds a run with another seed (0 there, 1 here)" in one.go("seed=1", code=2)
    one.go("log_every=3", "save_every=2")
    check_as_if_nothing_had_been(one)
