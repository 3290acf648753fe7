"""YAML as version 1.2 has it, as plain data and nothing else.

Only ``true`` and ``false`` are booleans, ``1e-3`` is a number, ``012`` is twelve, ``1:30`` is text. A key that stands
twice is an error, so are tags (which could name code), ``.inf`` and ``.nan``, and more depth or values than any config
needs.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

DEEPEST = 50
MOST = 20_000
"""Values in one text once its aliases are written out."""


class YAMLError(ValueError):
    """What is wrong with a text, in one line."""


def parse(text: str) -> Any:
    """YAML text as dictionaries with text keys, lists, text, numbers, booleans and None; nothing in it is shared.

    Raises:
        YAMLError: one line that says what is wrong and where.
    """
    try:
        return _copy(yaml.load(text, _Loader), 0, [0])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and "\n" in text.strip() else ""
        problem = error.problem or error.context or "cannot be read"
        problem = f"{error.context}, {problem}" if problem.startswith("but") and error.context else problem
        special = next((c for c in text[max(mark.index - 1, 0) : mark.index + 1] if c in "@*%`"), "") if mark else ""
        hint = f'; a value that begins with {special} needs quotes: "{special}…"' if special else ""
        raise YAMLError(" ".join(f"{line}{problem}{hint}".split())) from None
    except yaml.reader.ReaderError as error:
        character = error.character if isinstance(error.character, int) else ord(error.character)
        raise YAMLError(f"the character #x{character:04x} at position {error.position} may not stand in YAML") from None
    except RecursionError:
        raise YAMLError(f"nested more than {DEEPEST} deep") from None


def dump(data: Any) -> str:
    """Plain data as YAML that ``parse``, and any YAML 1.1 reader, gives back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _copy(value: Any, depth: int, count: list[int]) -> Any:
    count[0] += 1
    if depth > DEEPEST:
        raise YAMLError(f"nested more than {DEEPEST} deep")
    if count[0] > MOST:
        raise YAMLError(f"holds more than {MOST:,} values")
    if isinstance(value, dict):
        return {key: _copy(inner, depth + 1, count) for key, inner in value.items()}
    return [_copy(inner, depth + 1, count) for inner in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, without duplicate keys and without tags."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _wrong(f"the tag {event.tag!r} is not allowed; values are plain data", event)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _wrong(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key is None or isinstance(key, list | dict | bool):
            raise _wrong("a key is text or a number", key_node)
        if str(key) in made:
            raise _wrong(f"the key {key!r} stands twice", key_node)
        made[str(key)] = loader.construct_object(value_node, deep=True)
    return made


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 400:  # Python itself refuses to read very many digits
        raise _wrong("a number has too many digits", node)
    return int(node.value)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    number = float(node.value) if "n" not in node.value.lower() else math.nan
    if not math.isfinite(number):
        raise _wrong(f"{node.value} is not a finite number", node)
    return number


_DECIMAL = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?"
for _name, _pattern, _first, _make in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda loader, node: node.value.lower() == "true"),
    ("null", r"~|null|Null|NULL|", "~nN", lambda loader, node: None),
    ("int", r"[-+]?\d+", "-+0123456789", _int),
    ("float", rf"{_DECIMAL}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789.", _float),
    ("str", None, "", lambda loader, node: node.value),
    ("seq", None, "", lambda loader, node: loader.construct_sequence(node, deep=True)),
    ("map", None, "", _mapping),
):
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_constructor(_tag, _make)
    if _pattern is not None:
        _starts = [*_first, ""] if _name == "null" else list(_first)
        for _class in (_Loader, _Dumper):
            _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z", re.ASCII), _starts)
