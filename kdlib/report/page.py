"""Views of runs to one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..training import runfolder
from . import figures, plots, similarity
from .verdict import beside, verdict
from .view import View

SECTIONS = {
    "outcome": "Outcome",
    "curves": "Curves",
    "classes": "Classes",
    "agreement": "Agreement",
    "calibration": "Calibration",
    "alike": "Similarity",
    "changes": "Changes",
    "time": "Time",
    "config": "Config",
}
"""Anchor to its word in the navigation."""


def render(views: Sequence[View], device: torch.device) -> str:
    """The page. What comes from configs, folders and data is escaped; only our own SVG and CSS are not."""
    place = files(__package__) / "page"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "fixed": fixed,
        "signed": signed,
        "whole": whole,
        "breakable": breakable,
        "bar": bar_of(views),
    }
    lines = _once([line for view in views for line in view.lines])
    return environment.from_string((place / "report.html.jinja").read_text(encoding="utf-8")).render(
        views=views,
        css=Markup((place / "report.css").read_text(encoding="utf-8")),
        sections=list(SECTIONS.items()),
        verdicts=[verdict(view.rows, view.images) for view in views],
        beside=[beside(views[0], view) if i else "" for i, view in enumerate(views)],
        accuracy=plots.curves(lines, "test top-1 (%)") if lines else "",
        accuracy_lines=lines,
        bins=figures.BINS,
        few=plots.FEW,
        cka_images=similarity.IMAGES,
        differences=differences([runfolder.resolved(view.opened.recipe) for view in views], runfolder.NO_MATTER),
        versions=runfolder.versions(device),
        threads=torch.get_num_threads(),
    )


def _once(lines: Sequence[plots.Line]) -> list[plots.Line]:
    """Without those curves that a run shares with an earlier one, its teachers' for one."""
    kept: dict[object, plots.Line] = {}
    for line in lines:
        kept.setdefault(line.folder.resolve() if line.folder else id(line), line)
    return list(kept.values())


def differences(configs: Sequence[Mapping[str, Any]], but: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values are not the same in all configs, with the values as text; ``–`` where there is none."""
    flat = [_flat(config, "") for config in configs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key.partition(".")[0] not in but]
    rows = [(key, [str(one[key]) if key in one else "–" for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(tree: Mapping[str, Any], above: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found


def fixed(value: float | None, digits: int) -> str:
    """``83.30``, or a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int) -> str:
    """``+2.40`` or ``−0.35``; what rounds to zero has no sign."""
    text = fixed(value, digits)
    if text == "–" or float(text) == 0:
        return text.removeprefix("-")
    return f"+{text}" if text[0] != "-" else f"−{text[1:]}"


def whole(value: float | None) -> str:
    """``233,194``."""
    return "–" if value is None or math.isnan(value) else f"{value:,.0f}"


def breakable(name: str) -> Markup:
    """A model's name that may be broken after its underscores, escaped."""
    return Markup("_<wbr>").join(name.split("_"))


def bar_of(views: Sequence[View]) -> Any:
    """A filter: the length of a class's change against the largest of the page, 0 to 1."""
    changes = [abs(row.change) for view in views for row in view.by_class if row.change is not None]
    largest = max((change for change in changes if not math.isnan(change)), default=0.0) or 1.0
    return lambda change: 0 if math.isnan(change) else round(abs(change) / largest, 3)
