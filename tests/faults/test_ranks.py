"""Two gloo processes: what happens to one of them ends the job soon, and the job started again goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import Any

import pytest

from kdlib.data.samplers import epoch_order
from tests.faults.harness import PATIENCE, RICH, Run, check_as_if_nothing_had_been

SAID = ("said", "said1")
QUICK = PATIENCE
"""Seconds within which a job ends when it loses a process: a minute."""


def end(one: Run, job: list[Any], *codes: int) -> list[str]:
    started = time.monotonic()
    said = [one.end(process, code, name) for process, code, name in zip(job, codes, SAID, strict=True)]
    assert time.monotonic() - started < QUICK
    return said


@pytest.mark.fault("launch")
@pytest.mark.parametrize("point", ["step:3", "batch:8", "save.tensors:2"])
def test_one_process_is_killed(point: str, run: Any) -> None:
    one = run(RICH)
    killed = 0 if point.startswith("save") else 1
    job = one.start_two(of={killed: {"KDLIB_FAULT": point}})
    said = end(one, job, *((-9, 1) if killed == 0 else (1, -9)))
    assert "another process of this job ended" in said[1 - killed] and "Traceback" not in said[1 - killed]
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("kill")
@pytest.mark.parametrize("points", [("step:2", "step:2"), ("log:3", "evaluate:1")])
def test_both_are_killed(points: tuple[str, str], run: Any) -> None:
    one = run(RICH)
    job = one.start_two(of={rank: {"KDLIB_FAULT": point} for rank, point in enumerate(points)})
    for process in job:
        process.join(QUICK)
    assert -9 in [process.exitcode for process in job] and None not in [process.exitcode for process in job]
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("signal")
@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_process_stops_all_of_them_at_one_step(asked: tuple[int, ...], run: Any) -> None:
    one = run(RICH)
    job = one.start_two(of={rank: {"KDLIB_FAULT": "step:1:TERM"} for rank in asked})
    end(one, job, 143, 143)
    assert "everything is saved. To go on: " in one.said() and one.checkpoints[-1].name == "step-00000003"
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_numbers_that_go_wrong_on_one(policy: str, run: Any) -> None:
    one = run(RICH, on_nonfinite=policy)
    job = one.start_two(KDLIB_BREAK="nan:0.2", KDLIB_BREAK_RANKS="1")
    said = end(one, job, *((1, 1) if policy == "stop" else (0, 0)))
    assert "term 'label' was not finite at step 2" in said[0]
    (entry,) = json.loads((one.output / "nonfinite.json").read_text())
    assert entry["images"] == epoch_order(100, 8, seed=0, epoch=0, rank=1, world_size=2)[2].tolist()


@pytest.mark.fault("launch")
def test_another_number_of_processes_is_refused(run: Any) -> None:
    one = run(RICH)
    end(one, one.start_two(of={rank: {"KDLIB_FAULT": "step:3"} for rank in (0, 1)}), -9, -9)
    said = one.go(code=2)
    assert "this run was begun on 2 processes, here are 1; start as many as then" in said
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("disk")
def test_a_disk_that_is_full_ends_both(run: Any) -> None:
    one = run(RICH)
    said = end(one, one.start_two(limit=20_000), 1, 1)
    assert all("cannot be written" in text and "Traceback" not in text for text in said)
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("launch")
def test_a_second_job_in_the_folder_is_refused(run: Any) -> None:
    one = run(RICH)
    first = one.start_two(KDLIB_BREAK="sleep:0.5")
    one.wait_for((one.folder / "asleep").exists)
    second = one.start_two(said=("said2", "said3"))
    for process, name in zip(second, ("said2", "said3"), strict=True):
        assert "output: runs/r is in use by process" in one.end(process, 2, name)
    for process in first:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("launch")
@pytest.mark.parametrize("change", ["seed=1", "optimizer.lr=0.01"])
def test_ranks_that_disagree_are_refused(change: str, run: Any) -> None:
    one = run(RICH)
    job = one.start_two("threads=1", of={0: {}, 1: {"KDLIB_ARGUMENT": change}})
    said = end(one, job, 2, 2)
    key = change.partition("=")[0].partition(".")[0]
    assert (
        f"launch: process 1 was started with another {key} (" in said[0] and "start all with the same config" in said[1]
    )
    assert not one.output.exists()
    end(one, one.start_two(), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2)


@pytest.mark.fault("launch")
def test_a_port_that_is_taken_is_one_line(run: Any) -> None:
    one = run(RICH)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        group = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said = one.go(code=1, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", **group)
    last = said.strip().splitlines()[-1]
    assert "launch: the processes cannot meet (" in last and "Traceback" not in said, said
