"""What the measuring scripts share: their command line, one-line errors, and a result that is JSON and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kdlib.training import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Report = dict[str, Any]
WRONG_INPUT, FAILED = 2, 1
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Distinct for the colour-blind too: Paul Tol's bright scheme."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.add_argument("--out", type=Path, help="the result's file, .json; the picture is drawn beside it as .png")
        self.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing: draw an earlier result again")

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message} (--help lists the options)\n")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, ``least`` or more."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least} (got {text})")
        return value

    return number


def main(
    parser: Parser,
    measure: Callable[[argparse.Namespace, Callable[[Report], None]], Report],
    draw: Callable[[Report], Figure],
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses, measures, draws; returns the exit code: 2 and one line for wrong input, 1 for a disk that failed.

    ``measure`` is handed the arguments and a function that writes what it has so far to ``--out``, so that a run that
    is cut off leaves its rows. ``--draw`` turns such a file into a picture.
    """
    try:
        given = parser.parse_args(arguments)
        if given.draw is not None:
            paint(draw, _read(given.draw), (given.out or given.draw).with_suffix(".png"))
            return 0
        out = given.out and _checked(given.out)
        report = measure(given, lambda report: checkpoint.write_json(out, report) if out else None)
        if out:
            checkpoint.write_json(out, report)
            paint(draw, report, out.with_suffix(".png"))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else WRONG_INPUT
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    return 0


def paint(draw: Callable[[Report], Figure], report: Report, path: Path) -> None:
    """Draws a report to a PNG, moved into place whole.

    Raises:
        ValueError: the report is not one of this script's.
    """
    import matplotlib  # here, since importing it takes longer than everything else

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "legend.frameon": False}
    )
    try:
        figure = draw(report)
    except (KeyError, TypeError) as error:
        raise ValueError(f"--draw: this JSON is no result of this script ({type(error).__name__}: {error})") from None
    with checkpoint.whole(path) as draft:
        figure.savefig(draft, dpi=140, format="png")
    pyplot.close(figure)
    print(f"drawn: {path}")


def where(report: Report, *keys: str) -> str:
    """One line for a picture: the device, then ``keys`` of the report, then versions and date."""
    said = [f"{key} {report[key]}" for key in keys if report.get(key) is not None]
    return ", ".join([report["device"], *said, f"torch {report['torch']}", report["date"]])


def _checked(path: Path) -> Path:
    if path.suffix != ".json":
        raise ValueError(f"--out {path}: the name of a result ends in .json")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")
    return path


def _read(path: Path) -> Report:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--draw {path}: is no JSON ({error})") from None
    if not isinstance(report, dict):
        raise ValueError(f"--draw {path}: is no result of this script, which is a mapping")
    return report
