"""The count of faults: what shrank or was skipped fails a whole run, and a part of it is left in peace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import matrix


def report(group: str | None, when: str = "call", cases: int | None = None) -> Any:
    told = [["fault", group]] * (group is not None) + [["cases", cases]] * (cases is not None)  # as xdist sends them
    return SimpleNamespace(when=when, user_properties=told)


def session(reports: list[Any], *args: Path, worker: bool = False, keyword: str = "") -> Any:
    option = SimpleNamespace(keyword=keyword, markexpr="", lf=False, collectonly=False)
    reporter = SimpleNamespace(stats={"passed": reports})
    config = SimpleNamespace(
        option=option, args=[*map(str, args)], pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter)
    )
    if worker:
        config.workerinput = {}
    return SimpleNamespace(config=config, exitstatus=0)


EVERY = [report(group, cases=least) for group, (least, _) in matrix.GROUPS.items()]
DISK = Path(__file__).parent / "faults" / "test_disk.py"


def status(one: Any) -> int:
    matrix.pytest_sessionfinish(one, one.exitstatus)
    return int(one.exitstatus)


def test_cases_are_counted_once() -> None:
    reports = [report("data"), report("data", when="setup"), report("fuzz", cases=500), report(None)]
    assert matrix.survived(SimpleNamespace(stats={"passed": reports})) == {"data": 1, "fuzz": 500}
    assert matrix.survived(SimpleNamespace(stats={"skipped": reports})) == {}


def test_a_group_that_shrank_fails_a_whole_run_and_no_part_of_one() -> None:
    assert status(session(EVERY, matrix.HERE)) == 0
    assert status(session(EVERY, matrix.HERE.parent)) == 0
    assert status(session(EVERY[1:], matrix.HERE)) == pytest.ExitCode.TESTS_FAILED
    assert status(session([*EVERY[1:], report("save")], matrix.HERE)) == pytest.ExitCode.TESTS_FAILED
    assert status(session([], DISK)) == 0  # other files have faults of disks too
    assert status(session([], matrix.HERE, keyword="disk")) == 0
    assert status(session([], matrix.HERE, worker=True)) == 0
    kill = DISK.with_name("test_kill.py")
    assert matrix.whole(session([], kill).config) == ["save"]
    assert status(session([], kill)) == pytest.ExitCode.TESTS_FAILED


def test_every_group_has_tests_and_every_mark_a_group() -> None:
    assert matrix.files().keys() == matrix.GROUPS.keys() and all(matrix.files().values())
