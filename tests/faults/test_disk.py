"""Full disks and closed places: one line, the last checkpoint whole; with room again the run goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import RICH, Run, check_as_if_nothing_had_been

SMALL = 20_000
"""Bytes: enough for every file but the tensors of a checkpoint."""


def refused(one: Run, code: int = 1, **how: Any) -> str:
    """It ends with one line, and leaves no draft of anything."""
    before = set(one.output.rglob(".tmp-*"))
    said = one.go(code=code, **how)
    drafts = set(one.output.rglob(".tmp-*")) - before
    assert "Traceback" not in said and not drafts, f"{drafts}: {said}"
    last = said.strip().splitlines()[-1]
    return last


@pytest.mark.fault("disk")
def test_full_before_the_first_step(run: Any) -> None:
    one = run(RICH)
    assert "cannot be written" in refused(one, limit=6_000) and not one.checkpoints
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("disk")
def test_full_before_anything_is_written(run: Any) -> None:
    one = run(RICH)
    assert "runs/r/config.yaml: File too large" in refused(one, limit=500)
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("disk")
@pytest.mark.parametrize("point", ["step:3", "step:8"])
def test_full_at_a_later_checkpoint(point: str, run: Any) -> None:
    one = run(RICH)
    one.go(KDLIB_FAULT=point, code=-9)
    before = [path.name for path in one.checkpoints]
    assert "cannot be written" in refused(one, limit=SMALL)
    assert [path.name for path in one.checkpoints] == before
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("disk")
def test_full_at_the_last_files(run: Any) -> None:
    one = run(RICH)
    one.go(KDLIB_FAULT="file.draft:4", code=-9)  # all is trained, the student is to be written
    assert "runs/r/metrics.jsonl: File too large" in refused(one, limit=2_000)
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("disk")
def test_a_small_file_system_fills_up(run: Any) -> None:
    """A tmpfs of 80 kB where one may be mounted; else the limit on file sizes stands for it once more."""
    one = run(RICH)
    one.output.mkdir(parents=True)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(one.output)], capture_output=True, check=False
    ).returncode
    try:
        last = refused(one, limit=0 if mounted else SMALL)
        assert ("No space left" in last or "cannot be written" in last) and "what was saved before is whole" in last
        kept = [path.name for path in one.checkpoints]
        shutil.copytree(one.output, one.folder / "kept")
    finally:
        if mounted:
            subprocess.run(["umount", str(one.output)], check=True)
    shutil.copytree(one.folder / "kept", one.output, dirs_exist_ok=True)
    said = one.go()
    assert kept == [] or not mounted or "damaged" not in said
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("disk")
def test_the_folder_of_checkpoints_is_a_file(run: Any) -> None:
    one = run(RICH)
    one.output.mkdir(parents=True)
    one.go(KDLIB_FAULT="start:1", code=-9)
    (one.output / "checkpoints").write_text("")
    assert "checkpoints" in refused(one)
    (one.output / "checkpoints").unlink()
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("disk")
def test_a_place_that_nobody_may_write_to(run: Any, tmp_path: Path) -> None:
    one = run(RICH)
    place = Path("/proc/kdlib")
    if os.geteuid():  # root may write to any folder but those of the kernel
        place = tmp_path / "closed" / "r"
        place.parent.mkdir(mode=0o500)
    said = one.go(f"output={place}", code=2)
    assert "is not a folder that you may write to" in said or "cannot be made" in said, said
    assert "Traceback" not in said
