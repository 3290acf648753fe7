"""Tables for a terminal, and for a file or a pipe, where nothing is cut off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from ..progress import console


def show_table(head: Sequence[str], rows: Iterable[Sequence[str | Text]], right: Sequence[str] = ()) -> None:
    """Prints rows under their heads; the columns named in ``right`` are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name == head[0])
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:
        console.width = max(80, console.measure(table, options=console.options.update(max_width=10_000)).maximum)
    console.print(table)


def times(shape: Iterable[int]) -> str:
    """64×7×7"""
    return "×".join(map(str, shape))


def short_number(number: float) -> str:
    """1,234, 12.3 M, 1.23 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 10 * size or (unit != "k" and number >= size):
            return f"{number / size:,.{0 if number >= 100 * size else 1 if number >= 10 * size else 2}f} {unit}"
    return f"{number:,.0f}"
