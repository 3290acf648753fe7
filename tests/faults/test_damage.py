"""Checkpoints that are not what was written are noticed and passed over; nothing in them is ever run."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import RICH, Run, check_as_if_nothing_had_been

FILES = ("state.safetensors", "state.json", "manifest.json")


def flip(file: Path, older: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("bomb"),))


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "cut": lambda file, older: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "flipped": flip,
    "emptied": lambda file, older: file.write_bytes(b""),
    "deleted": lambda file, older: file.unlink(),
    "swapped": lambda file, older: shutil.copy(older / file.name, file),
    "pickled": lambda file, older: file.write_bytes(pickle.dumps(Bomb())),
}
"""What is done to a file of the newest checkpoint; the older checkpoint's folder is given too."""


@pytest.fixture(scope="module")
def killed() -> Iterator[Run]:
    """A run with checkpoints of steps 2 and 4."""
    one = Run(RICH)
    one.go(KDLIB_FAULT="step:5", code=-9)
    assert [path.name for path in one.checkpoints] == ["step-00000002", "step-00000004"]
    yield one
    one.remove()


def again(killed: Run, run: Any) -> Run:
    copy: Run = run(RICH)
    shutil.copytree(killed.folder, copy.folder, dirs_exist_ok=True)
    return copy


@pytest.mark.fault("damage")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_checkpoint_is_damaged(damage: str, name: str, killed: Run, run: Any) -> None:
    one = again(killed, run)
    older, newest = one.checkpoints
    DAMAGE[damage](newest / name, older)
    said = one.go()
    assert "checkpoint step-00000004 is damaged and was passed over: " in said
    assert "goes on after epoch 0 of 2, batch 4" in said and not (one.folder / "bomb").exists()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("damage")
def test_the_newest_checkpoint_is_an_empty_folder(killed: Run, run: Any) -> None:
    one = again(killed, run)
    shutil.rmtree(one.checkpoints[-1])
    (one.output / "checkpoints" / "step-00000004").mkdir()
    assert "step-00000004 is damaged" in one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("damage")
def test_all_checkpoints_are_damaged(killed: Run, run: Any) -> None:
    one = again(killed, run)
    for path in one.checkpoints:
        flip(path / "state.safetensors", path)
    said = one.go(code=2)
    assert said.count("is not what was written (SHA-256 differs)") == 2 and "Traceback" not in said
    assert "delete the folder to start anew" in said
    shutil.rmtree(one.output / "checkpoints")
    one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("damage")
def test_the_metrics_were_cut_in_the_middle_of_a_line(killed: Run, run: Any) -> None:
    one = again(killed, run)
    with (one.output / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 0.9, "st')
    one.go()
    check_as_if_nothing_had_been(one)
