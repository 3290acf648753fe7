"""Pages whose tables are written by a script: what stands between two marks of a page is replaced, the rest is kept.

<!-- table: NAME -->
…
<!-- end -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def result(name: str) -> dict[str, Any] | None:
    """A result of the benchmarks, None where it is not there (yet)."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def fill(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with every marked part written anew.

    Raises:
        ValueError: a mark that no table has, or a table that the page has no place for.
    """
    names = re.findall(r"<!-- table: (\w+) -->", page)
    if set(names) != set(tables):
        raise ValueError(f"the page marks {sorted(names)}, there are tables for {sorted(tables)}")

    def write(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{tables[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", write, page, flags=re.DOTALL)


def main(page: Path, tables: Mapping[str, Callable[[], str]]) -> None:
    """Writes the page, or with ``--check`` exits with a line if it is not what would be written."""
    stored = page.read_text()
    made = fill(stored, tables)
    if "--check" in sys.argv:
        sys.exit(None if made == stored else f"{page.name} is out of date: run docs/make_{page.stem}.py")
    page.write_text(made)
