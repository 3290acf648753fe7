"""Runs for the tests of this folder. tests/matrix.py counts what they survive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.harness import Run


@pytest.fixture
def run() -> Iterator[Any]:
    """Makes runs, and removes them afterwards."""
    made: list[Run] = []

    def make(recipe: dict[str, Any], **changes: Any) -> Run:
        made.append(Run(recipe, **changes))
        return made[-1]

    yield make
    for one in made:
        one.remove()
