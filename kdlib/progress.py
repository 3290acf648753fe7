"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_terminal = False if Console().is_jupyter else None  # a notebook gets plain lines, neither HTML nor a moving bar
console = Console(highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=_terminal)
EVERY = 10.0
"""Seconds between two plain lines."""


class Bar:
    """Counts steps; ``say`` sets the text behind the count."""

    def __init__(self, title: str, total: int, done: int, progress: Progress | None, shown: bool) -> None:
        self.title, self.total, self.done, self.text, self.printed = title, total, done, "", ""
        self._progress, self._shown, self._last = progress, shown, monotonic()
        self._task = progress.add_task(title, total=total, completed=done, text="") if progress else None

    def advance(self) -> None:
        self.done += 1
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)
        elif monotonic() - self._last > EVERY:
            self._last = monotonic()
            self.print_line()

    def go_back(self, done: int) -> None:
        self.done = done
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    def print_line(self) -> None:
        """Says how far it is, unless that was its last word."""
        line = f"{self.title}: {self.done}/{self.total} {self.text}".rstrip()
        if line != self.printed:
            self.printed = line
            say(line, self._shown)

    def say(self, text: str) -> None:
        self.text = text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, text=escape(text))


@contextmanager
def bar(title: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A progress bar over ``total`` steps of which ``done`` lie behind."""
    if not (shown and console.is_interactive):
        plain = Bar(title, total, done, None, shown)
        yield plain
        plain.print_line()
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    time = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, time, TextColumn("{task.fields[text]}"), console=console) as progress:
        yield Bar(escape(title), total, done, progress, shown)


def say(text: str, shown: bool = True) -> None:
    """One line for the person, from one rank only."""
    if shown:
        console.print(text, markup=False)
