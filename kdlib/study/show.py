"""What a study came to: a table for a terminal, a plot, and all numbers as plain data."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .paired import Mean
from .run import Results


def table(results: Results) -> Table:
    """Mean ± standard deviation of each row, its paired difference with a 95 % interval, its share of the gap."""
    summary = list(results.summary())
    gap = any(share is not None for *_, share in summary)
    built = Table(title=results.study.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    built.add_column("row", overflow="fold")
    for name in ("top-1 %", "differs by", "95 % interval", *(["of gap"] if gap else []), "n"):
        built.add_column(name, justify="right", no_wrap=True)
    built.add_column("from", overflow="fold")
    for name, own, gain, share in summary:
        sd = f" ± {own.sd:.2f}" if own.n > 1 else ""
        closed = "" if share is None else f"{round(100 * share)} %"
        built.add_row(
            name,
            f"{own.mean:.2f}{sd}",
            "" if gain is None else f"{gain.mean:+.2f}",
            _interval(gain),
            *([closed] if gap else []),
            str(own.n),
            "" if gain is None else results.study.against[name],
        )
    return built


def _interval(gain: Mean | None) -> str:
    if gain is None or not isfinite(gain.half):
        return ""
    return f"{gain.mean - gain.half:+.2f} … {gain.mean + gain.half:+.2f}"


def plain(results: Results) -> dict[str, Any]:
    """All numbers, as JSON can say them."""
    return {
        "title": results.study.title,
        "against": results.study.against,
        "gap": results.study.gap,
        "top1": {name: {str(seed): value for seed, value in sorted(v.items())} for name, v in results.top1.items()},
        "summary": {
            name: {
                **_plain(own),
                "difference": None if gain is None else _plain(gain),
                "gap_closed": share,
            }
            for name, own, gain, share in results.summary()
        },
        "failed": results.failed,
    }


def _plain(value: Mean) -> dict[str, Any]:
    return {key: number if isfinite(number) else None for key, number in value._asdict().items()}


def plot(results: Results, path: Path) -> None:
    """Each row's seeds as dots, its mean and the mean's 95 % interval as a bar, as a PNG.

    All dots are seen; an interval of few seeds, many times as wide as what these did, may run out of the frame.
    """
    from matplotlib.figure import Figure  # here, since importing it takes long; no pyplot, whose backend is global

    found = list(results.summary())
    figure = Figure(figsize=(8, 1.2 + 0.34 * len(found)), layout="constrained")
    axis = figure.subplots()
    for place, (name, own, _, _) in enumerate(found):
        color = "C7" if name.startswith("teacher ") else "C0"
        values = list(results.top1[name].values())
        axis.plot(values, [place] * len(values), ".", color=color, alpha=0.45, markersize=7, markeredgewidth=0)
        half = own.half if isfinite(own.half) else 0.0
        axis.errorbar(own.mean, place, xerr=half, fmt="|", color=color, capsize=3, markersize=11, linewidth=1.4)
    every = [value for of in results.top1.values() for value in of.values()]
    border = max(0.1 * (max(every) - min(every)), 0.1)
    axis.set_xlim(min(every) - border, max(every) + border)
    axis.set_yticks(range(len(found)), [name for name, *_ in found])
    axis.invert_yaxis()
    axis.set(xlabel="test top-1 (%): seeds, mean, 95 % interval of the mean", title=results.study.title)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=130)
