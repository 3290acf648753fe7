"""Charts as SVG for the page: drawn by matplotlib, coloured by the page, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from .figures import Bin

INK, MUTED, RULE = "#00000a", "#00000b", "#00000c"
"""Stand for the page's colours until the SVG is written; the series are ``#000010`` and on."""
SERIES = 8
FEW = 10
"""A bin of fewer answers is drawn hollow, since it may lie anywhere."""
NAMES = {INK: "ink", MUTED: "muted", RULE: "rule"} | {f"#0000{16 + i:02x}": f"s{i}" for i in range(SERIES)}
"""Of the page's CSS variables."""
DASHES = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.6))}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a $ in a name is a dollar
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_numbers = count()


@dataclass(frozen=True)
class Line:
    """One curve, and its entry in the legend, which the page writes."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    """Number of the series' colour."""
    dash: str = "solid"
    folder: Path | None = None
    """Of the run that it shows."""

    @property
    def css(self) -> str:
        return f"s{self.colour % SERIES}"


def colour(number: int) -> str:
    return f"#0000{16 + number % SERIES:02x}"


@contextmanager
def _figure(width: float, height: float, write: Callable[[str], None]) -> Iterator[Any]:
    """Axes to draw on; afterwards ``write`` gets the SVG."""
    import matplotlib  # here, since importing it takes longer than everything else
    from matplotlib.figure import Figure  # no pyplot: nothing global, no backend

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        yield axes
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        write(_inline(file.getvalue(), next(_numbers)))


def _inline(svg: str, number: int) -> str:
    """The ``<svg>`` element alone: the page's colours, its font, ids of its own and only those that are referred to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="f{number}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1f{number}-", svg)
    for stand_in, name in NAMES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', svg, count=1
    )


def curves(lines: Sequence[Line], ylabel: str, log: bool = False) -> str:
    """Values over epochs."""
    found: list[str] = []
    with _figure(4.6, 2.9, found.append) as axes:
        for line in lines:
            if line.points:
                x, y = zip(*line.points, strict=True)
                mark = "o" if len(x) < 15 else None
                axes.plot(x, y, color=colour(line.colour), linestyle=DASHES[line.dash], marker=mark, markersize=2.6)
        if log and any(value > 0 for line in lines for _, value in line.points):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(_few_minor)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return found[0]


def _few_minor(value: float, _: int) -> str:
    """Between powers of ten, 2 and 5 are named."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def diagram(bins: Sequence[Bin], number: int) -> str:
    """Reliability: accuracy over confidence, and below it where the answers lie."""
    found: list[str] = []
    with _figure(2.6, 2.6, found.append) as axes:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=DASHES["dashed"])
        heights = [b.share for b in bins]
        places = [b.confidence for b in bins]
        axes.bar(places, heights, width=0.035, color=RULE)
        firm = [b for b in bins if b.count >= FEW]
        points = [b.confidence for b in firm], [b.accuracy for b in firm]
        axes.plot(*points, color=colour(number), marker="o", markersize=3, clip_on=False)
        rest = [b for b in bins if b.count < FEW]
        points = [b.confidence for b in rest], [b.accuracy for b in rest]
        axes.plot(*points, "o", mec=colour(number), mfc="none", ms=3, mew=0.7, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="share right", aspect="equal")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
    return found[0]


def heat(values: Tensor, rows: Sequence[str], columns: Sequence[str], ylabel: str, xlabel: str) -> str:
    """CKA, 0 to 1: cells with their number where there is room for it."""
    found: list[str] = []
    tall, wide = values.shape
    with _figure(3.4, min(4.2, 0.9 + 2.5 * max(tall / wide, 0.5)), found.append) as axes:
        axes.grid(False)
        axes.pcolormesh(
            values.clamp(0, 1).nan_to_num(0), cmap="viridis", vmin=0, vmax=1, edgecolors="face", linewidth=0.3
        )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        step = math.ceil(max(tall, wide) / 14)
        axes.set_xticks([i + 0.5 for i in range(0, wide, step)], columns[::step], rotation=90)
        axes.set_yticks([i + 0.5 for i in range(0, tall, step)], rows[::step])
        axes.tick_params(length=0, labelsize=9 if max(tall, wide) <= 8 else 7.5)
        axes.spines[:].set_visible(False)
        if max(tall, wide) <= 14:
            size = 9.5 if max(tall, wide) <= 6 else 8 if max(tall, wide) <= 10 else 6.5
            for i, line in enumerate(values.tolist()):
                for j, value in enumerate(line):
                    text = "–" if math.isnan(value) else f"{value:.2f}".lstrip("0") if value < 0.995 else "1"
                    shade = "#ffffff" if not value > 0.6 else "#111111"
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=size, color=shade)
    return found[0]
