"""docs/reliability.md shows the faults that are survived."""

from __future__ import annotations

from tests.conftest import ROOT
from tests.matrix import GROUPS


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = page.split("<!-- faults -->\n")[1].split("<!-- /faults -->")[0].splitlines()[2:]
    total = sum(least for least, _ in GROUPS.values())
    expected = [f"| {group} | {least} | {what} |" for group, (least, what) in GROUPS.items()]
    assert rows == [*expected, f"| all | {total} | |"]
    assert f"{total} cases" in page
