"""What a study compares: rows, each a few configs and settings, and the recipe that each becomes for a seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import ConfigError, is_assignment, read, read_file
from ..recipe import Recipe, load
from ..recipe.wording import nearest

Key = tuple[str, int]
"""(row, seed)"""
KEYS = ("title", "against", "gap", "rows")


@dataclass(frozen=True)
class Study:
    """What is compared. Each row is a list of config files and ``key=value`` settings, laid over the scale in order."""

    title: str
    rows: dict[str, list[str]]
    against: dict[str, str]
    """Row to the row that it is compared with, seed by seed."""
    gap: tuple[str, str] | None = None
    """The rows or teachers (as ``teacher wide``) between which a row's gain is measured: 0 and 100 %."""
    partial: bool = False
    """Rows were left out, and a teacher of theirs that ``gap`` names may be missing."""


def load_study(path: Path) -> Study:
    """A study from YAML: ``rows: {name: [config.yaml, key=value, …]}``, files beside the study's own.

    Raises:
        ConfigError: a file or key that is not as expected.
    """
    data, _ = read_file(path)

    def wrong(key: str, what: str) -> ConfigError:
        return ConfigError([f"{path}: {key}: {what}"])

    for key in data:
        if key not in KEYS:
            raise wrong(key, f"unknown key (known: {', '.join(KEYS)})")
    rows = data.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise wrong("rows", f"expected a mapping of names to lists of configs and settings (got {rows!r})")
    for name, parts in rows.items():
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise wrong(f"rows.{name}", f"expected a list of config files and key=value settings (got {parts!r})")
    against = data.get("against", next(iter(rows)))
    compared = against if isinstance(against, dict) else dict.fromkeys(rows, against)
    for name in [*compared, *compared.values()]:
        if name not in rows:
            raise wrong("against", f"no row {name!r}{nearest(str(name), rows)} (known: {', '.join(rows)})")
    slugs: dict[str, str] = {}
    for name in rows:
        if (slug := _slug(name)) in slugs or not slug:
            other = f" and {slugs[slug]!r} would share a folder" if slug else " would have no folder"
            raise wrong("rows", f"{name!r}{other}, named by what of a row is A-Z, a-z, 0-9, '.' or '_'; rename it")
        slugs[slug] = name
    gap = data.get("gap")
    if gap is not None and not (isinstance(gap, list) and len(gap) == 2 and all(isinstance(name, str) for name in gap)):
        raise wrong("gap", f"expected two names, [from, to] (got {gap!r})")
    for name in gap or ():
        if name not in rows and not name.startswith("teacher "):
            known = f"(known: {', '.join(rows)}; or a teacher, as 'teacher NAME')"
            raise wrong("gap", f"no row {name!r}{nearest(str(name), rows)} {known}")
    return Study(
        str(data.get("title", path.stem)),
        {name: [_beside(path, part) for part in parts] for name, parts in rows.items()},
        {name: other for name, other in compared.items() if name != other},
        None if gap is None else (gap[0], gap[1]),
    )


def _beside(path: Path, part: str) -> str:
    return part if is_assignment(part) else str(path.parent / part)


def choose(study: Study, only: Sequence[str]) -> Study:
    """The study with some of its rows, and those that they are compared with.

    Raises:
        ConfigError: a name that is no row.
    """
    for name in only:
        if name not in study.rows:
            raise ConfigError(
                [f"--rows: no row {name!r}{nearest(str(name), study.rows)} (known: {', '.join(study.rows)})"]
            )
    kept = {name for row in only for name in (row, study.against.get(row, row))}
    rows = {name: parts for name, parts in study.rows.items() if name in kept}
    against = {a: b for a, b in study.against.items() if a in kept and b in kept}
    return replace(study, rows=rows, against=against, partial=study.partial or len(rows) < len(study.rows))


def recipes(study: Study, scale: Path, seeds: int, folder: Path, more: Sequence[str]) -> dict[Key, Recipe]:
    """The recipe of each row and seed; all lie in one folder, so that equal teachers are trained once.

    Raises:
        ConfigError: a row that is no recipe; its name stands in front.
    """
    for key, instead in (("seed", "--seeds"), ("output", "--out"), ("baseline", "a row of its own")):
        if any(re.match(rf"{key}\b", given) for given in more):
            raise ConfigError([f"command line: {key}: a study has {instead} for it; leave it out"])
    found = {}
    for seed in range(seeds):  # a study that is cut off has few seeds of every row, not every seed of few rows
        for name, parts in study.rows.items():
            own = [f"seed={seed}", "baseline=null", f"output={folder / f'{_slug(name)}-{seed}'}"]
            try:
                found[name, seed] = load(read([str(scale), *parts, *more, *own]))
            except ConfigError as error:
                raise ConfigError(f"row {name!r}: {line}" for line in error.lines) from None
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-")
