"""The matrix of faults: tests marked ``fault(group)``, wherever they stand, are counted; a group that shrank fails all.

The hooks below are those of tests/conftest.py. A group is checked where every file that holds one of its tests was
asked for, so that one file alone can be run in peace. A test that stands for many cases tells their number as the
property ``cases``.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

GROUPS: dict[str, tuple[int, str]] = {
    "save": (20, "kill -9 while a checkpoint or a file is written"),
    "kill": (24, "kill -9 of the whole run: at the start, in a step, in evaluation, while resuming, several times"),
    "signal": (12, "SIGTERM and Ctrl-C: in a step, in evaluation, in a save, before the first step, twice, on ranks"),
    "resume": (41, "stopped at five places × accumulation × workers, by kind of run, on ranks; as if nothing had been"),
    "damage": (59, "checkpoints cut, emptied, flipped by a bit, swapped, deleted, of another step, made a link"),
    "disk": (16, "disk full at the first, a later and the last file; places that cannot be written"),
    "numbers": (27, "NaN and infinity in student, teacher, loss, gradient, weights, under stop, skip and rollback"),
    "config": (112, "configs with mistakes: key, type, range, name, file; one line each, with the nearest right name"),
    "fuzz": (500, "documents that hypothesis makes up: a recipe or lines, never a traceback"),
    "hostile config": (61, "tags, import paths, alias bombs, nesting, paths out of folders, plugins that fail"),
    "hostile weights": (26, "pickles, headers that lie, archives and links that lead away; no code is run"),
    "teacher": (12, "the teacher is the one that was named: digest, shapes, names, classes, input; it never changes"),
    "data": (96, "folders, splits, images, shards and lists of shards that are wrong, vanish, or lie"),
    "launch": (12, "copies that do not know of each other, two runs in a folder, ranks that die or disagree"),
    "metrics": (9, "evaluation over ranks counts every image once, for odd numbers of them"),
    "losses": (1000, "what each loss obeys, by law: gradients, precision, shapes, batches of one and none"),
    "install": (6, "what import loads, what the wheel holds"),
}  # fmt: skip
"""Group, the least number of its cases, and what they are."""
HERE = Path(__file__).parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    if mark := item.get_closest_marker("fault"):
        assert mark.args[0] in GROUPS, f"no group {mark.args[0]!r} in tests/matrix.py"
        item.user_properties.append(("fault", mark.args[0]))


def survived(reporter: Any) -> Counter[str]:
    """Cases of each group that passed, of this process or of xdist's workers."""
    found: Counter[str] = Counter()
    for report in reporter.stats.get("passed", []):
        told = dict(report.user_properties)
        if report.when == "call" and "fault" in told:
            found[told["fault"]] += int(told.get("cases", 1))
    return found


@cache
def files() -> dict[str, set[Path]]:
    """Group to the files that hold its tests."""
    found: dict[str, set[Path]] = {group: set() for group in GROUPS}
    for path in HERE.rglob("test_*.py"):
        for group in re.findall(r'mark\.fault\("([a-z ]+)"\)', path.read_text()):
            found.setdefault(group, set()).add(path)
    return found


def whole(config: pytest.Config) -> list[str]:
    """The groups of which every test was asked for."""
    if (
        config.option.keyword
        or config.option.markexpr
        or getattr(config.option, "lf", False)
        or config.option.collectonly
    ):
        return []
    asked = [Path(str(argument)).resolve() for argument in config.args]
    return [
        group for group in GROUPS
        if all(any(place == path or place in path.parents for place in asked) for path in files()[group] or {HERE})
    ]  # fmt: skip


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (found := survived(terminalreporter)):
        return
    terminalreporter.section("faults survived")
    checked = whole(config)
    for group, (least, what) in GROUPS.items():
        if found[group] or group in checked:
            short = "  TOO FEW" if group in checked and found[group] < least else ""
            terminalreporter.write_line(f"{group:15} {found[group]:5} of at least {least:4}  {what}{short}")
    terminalreporter.write_line(f"{'all':15} {found.total():5} of at least {sum(n for n, _ in GROUPS.values()):4}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput") or exitstatus != 0:
        return
    found = survived(session.config.pluginmanager.get_plugin("terminalreporter"))
    if any(found[group] < GROUPS[group][0] for group in whole(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
