"""One table at the end: the faults of each group that were survived; a group that shrank or was skipped fails all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Run

GROUPS: dict[str, tuple[int, str]] = {
    "kill": (36, "kill -9 at start, in a step, while a checkpoint or a file is written, while resuming"),
    "signal": (9, "SIGTERM and Ctrl-C: in a step, in evaluation, in a save, before the first step, twice"),
    "damage": (21, "checkpoints cut, emptied, flipped by a bit, swapped, deleted, replaced by a pickle"),
    "disk": (8, "disk full at the first, a later and the last file; places that cannot be written"),
    "folder": (4, "two runs in one folder; a holder that died; unconnected copies; another run's folder"),
    "data": (5, "corrupt image, vanished data, killed worker, in training and in evaluation"),
    "numbers": (19, "NaN and infinity in student, teacher, loss, gradient, under stop, skip and rollback"),
    "ranks": (13, "two processes: one or both killed, signals to one or both, NaN on one, another number of them"),
}
"""Group, the least number of its cases, and what they are. Each test carries ``@pytest.mark.fault(group)``."""
HERE = Path(__file__).parent


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes runs, and removes them afterwards."""
    made: list[Run] = []

    def make(recipe: dict[str, Any], **changes: Any) -> Run:
        made.append(Run(recipe, **changes))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if mark := item.get_closest_marker("fault"):
        item.user_properties.append(("fault", mark.args[0]))


def _survived(reporter: Any) -> Counter[str]:
    reports = [report for report in reporter.stats.get("passed", []) if report.when == "call"]
    return Counter(value for report in reports for name, value in report.user_properties if name == "fault")


def _whole(config: pytest.Config) -> bool:
    """Whether all of this folder was asked for."""
    chosen = config.option.keyword or config.option.markexpr or config.option.lf
    above = [Path(str(argument)).resolve() for argument in config.args]
    return not chosen and any(place == HERE or place in HERE.parents for place in above)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (survived := _survived(terminalreporter)):
        return
    terminalreporter.section("faults survived")
    for group, (least, what) in GROUPS.items():
        terminalreporter.write_line(f"{group:8} {survived[group]:3} of at least {least:3}  {what}")
    terminalreporter.write_line(f"{'all':8} {survived.total():3} of at least {sum(n for n, _ in GROUPS.values()):3}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput") or not _whole(session.config):
        return
    survived = _survived(session.config.pluginmanager.get_plugin("terminalreporter"))
    if any(survived[group] < least for group, (least, _) in GROUPS.items()) and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
