"""Writes what runs came to as one HTML page that opens from disk, reads well on a phone and needs nothing else.

  kdlib report runs/riformer --import recipes.riformer.run
  kdlib report runs/a runs/b --out both.html --import recipes.riformer.run

On the page: the outcome table, curves, change by class, agreement with the teacher, calibration, similarity of blocks
before and after training, what changed with images, time of a step, config and versions; several runs side by side.
What is missing in a run is said there.

From Python: kdlib.report.report([folder, …], file).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the folder of a run, a recipe's output=…")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="HTML",
        help="the page (default: report.html in the run's folder, or here for several)",
    )


def run(options: Namespace) -> None:
    from ..config import ConfigError
    from ..progress import say
    from ..report import report
    from . import of_imports

    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    if options.out is not None and not out.absolute().parent.is_dir():
        raise ConfigError([f"{out}: no folder {out.absolute().parent}; name a file in one that is there by --out"])
    convert: Any = of_imports(options, "convert")
    report(options.runs, out, convert)
    say(f"{out}: {out.stat().st_size / 1e3:,.0f} kB, open it in a browser")
