"""The help text of a recipe, from the fields of its schema."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from .losses import LOSSES
from .recipe import json_schema

SECTIONS = {
    "": "the recipe",
    "Student": "student",
    "Teacher": "teachers.NAME",
    "Term": "terms.NAME",
    "Slope": "terms.NAME.slope",
    "data": "data",
    "Augment": "data.augment",
    "Optimizer": "optimizer",
    "Schedule": "schedule",
    "Ema": "ema",
    "Compile": "compile",
}
WIDTH, NARROW = 110, 90
"""Columns at most, where the terminal has them; below so many an explanation stands under its key."""
FLAGS = {
    "--dry-run": "what would be trained, from whom and for how long; needs neither data nor weights",
    "--print-config": "the whole recipe with all defaults, as a config that gives the same run",
    "--schema": "the JSON schema of a recipe, for editors",
    "--quiet": "say nothing but errors; what is written is the same",
    "--debug": "where an error came from",
}
CODES = (
    "Ends with 0 when done, 2 for a config or an input that is wrong, 1 for a disk, a worker or numbers that failed, "
    "130 after Ctrl-C, 143 after SIGTERM; started again, a run that was stopped goes on."
)


def usage(default: Path) -> str:
    """What ``--help`` prints; ``default`` is the config that is read where none is given."""
    schema = json_schema()
    sections = schema["$defs"] | {"": schema, "data": schema["properties"]["data"]}
    name = Path(sys.argv[0]).name
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    how = f"usage: {name} [CONFIG.yaml …] [key=value …] [--help | {' | '.join(FLAGS)}]"
    about = f"Without a CONFIG, {default.name} is read. Later wins; keys are dotted, a number is an index. For example:"
    lines = [
        *_wrapped(how, "", width),
        "",
        *_wrapped(about, "", width),
        f"  {name} epochs=20 optimizer.lr=2e-3 terms.soft.weight=0.5 data.name=folder data.root=~/images",
        "",
    ]
    for flag, text in FLAGS.items():
        told = _wrapped(text, " " * 16, width)
        lines += [flag.ljust(16) + told[0].strip(), *told[1:]]
    lines += ["", *_wrapped(CODES, "", width)]
    for section, title in SECTIONS.items():
        lines += ["", f"{title}:"]
        for key, field in sections[section]["properties"].items():
            if key != "base":
                lines += _entry(key, field, width)
    return "\n".join([*lines, "", "losses:", *_wrapped(", ".join(sorted(LOSSES)), "  ", width)])


def _entry(key: str, field: dict[str, Any], width: int) -> list[str]:
    kind, default, text = parts(field)
    text = text.replace("`", "")
    head = f"  {key}{f' ({kind})' if kind else ''}{f' [{default}]' if default else ''}"
    if width < NARROW:
        return [*textwrap.wrap(head, width, subsequent_indent=" " * 4), *_wrapped(text, " " * 6, width)]
    lines = _wrapped(text, " " * 44, width)
    if not lines or len(head) > 42:
        return [head, *lines]
    return [head.ljust(44) + lines[0].strip(), *lines[1:]]


def parts(field: dict[str, Any]) -> tuple[str, str, str]:
    """Of one key in a JSON schema: what may stand there, its default, what it means; each empty if there is none."""
    text = " ".join(str(field.get("description", "")).replace("``", "`").split())
    default = field.get("default")
    shown = "" if default is None or default in ({}, "") or isinstance(default, dict) else _short(default)
    return _kind(field), shown, text


def _kind(field: dict[str, Any]) -> str:
    """What may stand there, shortly."""
    if "enum" in field:
        return "|".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    kinds = [_kind(option) for option in field.get("anyOf", [])] or [str(field.get("type", ""))]
    names = {"object": "", "null": "", "boolean": "true|false", "string": "text", "array": "list"}
    return "|".join(dict.fromkeys(kind for kind in (names.get(kind, kind) for kind in kinds) if kind))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    if isinstance(value, float):  # as YAML must write it: a moment of 1 is an epoch, one of 1.0 the whole run
        return str(float(f"{value:.4g}"))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
