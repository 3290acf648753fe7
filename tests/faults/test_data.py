"""Images and workers that are lost: one line that names them, the last checkpoint whole; mended, the run goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import FILES, Run, check_as_if_nothing_had_been


def workers(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ends_with_one_line(one: Run, *arguments: str, code: int, **environment: str) -> str:
    said = one.go(*arguments, code=code, **environment)
    assert "Traceback" not in said, said
    return said.strip().splitlines()[-1]


@pytest.mark.fault("data")
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_corrupt_image(split: str, run: Any) -> None:
    one = run(FILES)
    one.go(KDLIB_FAULT="step:4", code=-9)
    image = one.folder / "images" / split / "green" / "3.png"
    good = image.read_bytes()
    image.write_bytes(good[:60])
    assert f"{split}/green/3.png" in ends_with_one_line(one, code=2)
    image.write_bytes(good)
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("data")
def test_the_data_vanish_while_the_run_goes_on(run: Any) -> None:
    one = run(FILES)
    first = one.start(KDLIB_BREAK="sleep:1.0")
    one.wait_for((one.folder / "asleep").exists)
    shutil.move(one.folder / "images", one.folder / "away")
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert "images: no such folder" in ends_with_one_line(one, code=2)
    shutil.move(one.folder / "away", one.folder / "images")
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("data")
def test_an_image_vanishes_between_two_epochs(run: Any) -> None:
    one = run(FILES)
    one.go(KDLIB_FAULT="evaluate:1", code=-9)
    shutil.move(one.folder / "images" / "train" / "red" / "5.png", one.folder / "5.png")
    last = ends_with_one_line(one, code=2)  # another number of images makes other epochs
    assert "35" in last and "36" in last, last
    shutil.move(one.folder / "5.png", one.folder / "images" / "train" / "red" / "5.png")
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("data")
def test_a_worker_is_killed(run: Any) -> None:
    one = run(FILES)
    first = one.start(KDLIB_BREAK="sleep:1.1")
    one.wait_for((one.folder / "asleep").exists)
    os.kill(workers(first.pid)[0], signal.SIGKILL)
    said = one.end(first, 1)
    assert "a worker process that reads images was lost" in said and "Traceback" not in said, said
    one.go()
    check_as_if_nothing_had_been(one)
