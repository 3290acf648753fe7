"""From command line and YAML files to one plain dictionary, remembering where each value came from.

``CONFIG… key=value …``: later wins. A mapping may name ``base: other.yaml`` (a path beside its own file), which it then
overlays. YAML is read as version 1.2 has it: only ``true`` and ``false`` are booleans, ``1e-3`` is a number, ``012`` is
twelve, ``1:30`` is text; a key that stands twice is an error, and no tag can make anything but plain data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]


class ConfigError(ValueError):
    """What is wrong with a config, one line each: ``file: key: what is wrong (got …); did you mean …``."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(lines)
        super().__init__("\n".join(self.lines))


class Document:
    """A dictionary, and for each of its values the file (or ``command line``) that said it."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self._origins: dict[Key, str] = {}

    def overlay(self, data: Mapping[str, Any], origin: str) -> None:
        """Lays ``data`` over what is there."""
        merge(self.data, data)
        self._note((), data, origin)

    def assign(self, text: str) -> None:
        """Obeys one ``dotted.key=value``; the value is YAML, a number in the key is a list index."""
        key, _, value = text.partition("=")
        path = [int(part) if part.isdigit() else part for part in key.split(".")]
        parsed = parse(value, f"command line: {key}")
        node: Any = self.data
        for i, part in enumerate(path):
            place, last = ".".join(map(str, path[: i + 1])), i == len(path) - 1
            if isinstance(node, list):
                if not isinstance(part, int) or part >= len(node):
                    raise ConfigError(
                        [f"command line: {place}: the list has the indices 0 to {len(node) - 1} (got {part})"]
                    )
            elif isinstance(node, dict):
                part = str(part)
                if not last and not isinstance(node.get(part), dict | list):
                    node[part] = {}
            else:
                raise ConfigError([f"command line: {place}: what is above it is {node!r}, not a mapping or a list"])
            if last and part == "name" and i and path[i - 1] == "loss" and node.get("name") != parsed:
                node.clear()
            if last:
                _put(node, part, parsed)
            node = node[part]
        self._note(tuple(path), parsed, "command line")

    def _note(self, key: Key, value: Any, origin: str) -> None:
        if key:
            self._origins[key] = origin
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        for name, inner in items:
            self._note((*key, name), inner, origin)

    def origin(self, key: Key) -> str:
        """Who said ``key``, or the nearest thing above it; ``config`` for a default."""
        while key:
            if key in self._origins:
                return self._origins[key]
            key = key[:-1]
        return next(iter(self._origins.values()), "config")


def read(arguments: Iterable[str]) -> Document:
    """The files and ``key=value`` assignments of a command line, in order.

    Raises:
        ConfigError: a file that is missing or no mapping, YAML that cannot be read, an assignment that fits nowhere.
    """
    document = Document()
    for argument in arguments:
        if re.match(r"[A-Za-z_][\w.-]*=", argument):
            document.assign(argument)
        elif argument.startswith("-"):
            raise ConfigError(
                [f"command line: unknown option {argument} (known: --help, --print-config, --schema, --debug)"]
            )
        else:
            document.overlay(read_file(Path(argument)), argument)
    return document


def read_file(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file as a dictionary, its bases underneath."""
    if path.resolve() in above:
        raise ConfigError([f"{path}: base: the files include each other in a circle"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is a directory" if path.is_dir() else getattr(error, "strerror", None) or "is no UTF-8 text"
        near = (
            get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
            if path.parent.is_dir()
            else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError([f"{path}: cannot be read ({reason}){hint}"]) from None
    data = parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: a config is a mapping of keys to values (got {type(data).__name__})"])
    return _with_bases(data, path, (*above, path.resolve()))


def _with_bases(data: dict[str, Any], path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    data = {key: _with_bases(value, path, above) if isinstance(value, dict) else value for key, value in data.items()}
    bases = data.pop("base", [])
    result: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str):
            raise ConfigError([f"{path}: base: expected the path of a file beside this one (got {base!r})"])
        merge(result, read_file(path.parent / base, above))
    merge(result, data)
    return result


def merge(under: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lays ``over`` over ``under`` in place: mappings join, all else replaces.

    A ``loss`` of another name replaces the old one whole, since the arguments of one mean nothing to another.
    """
    for key, value in over.items():
        _put(under, key, value)


def _put(node: Any, key: Any, value: Any) -> None:
    old = node.get(key) if isinstance(node, dict) else node[key]
    if key == "loss":
        old, value = _named(old), _named(value)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name", old["name"]) != old["name"]:
            old = None
    if isinstance(value, Mapping):
        node[key] = old if isinstance(old, dict) else {}
        merge(node[key], value)
    else:
        node[key] = value


def _named(loss: Any) -> Any:
    """``hard_label`` is short for ``{name: hard_label}``."""
    return {"name": loss} if isinstance(loss, str) else loss


def parse(text: str, where: str) -> Any:
    """YAML text as plain data.

    Raises:
        ConfigError: one line that says where and what.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark and "\n" in text.strip() else ""
        hint = ""
        near = text[max(mark.index - 1, 0) : mark.index + 1] if mark else ""
        if special := next((c for c in near if c in "@*%`"), ""):
            hint = f'; a value that begins with {special} needs quotes: "{special}…"'
        raise ConfigError([f"{where}:{line} {error.problem or error.context}{hint}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{where}: {' '.join(str(error).split())}"]) from None
    except RecursionError:
        raise ConfigError([f"{where}: nested too deeply"]) from None
    except ValueError:  # Python converts no integer of more than some thousand digits
        raise ConfigError([f"{where}: a number has too many digits"]) from None


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, without duplicate keys and without tags."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            raise yaml.constructor.ConstructorError(None, None, "a key is text or a number", key_node.start_mark)
        if str(key) in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen[str(key)] = loader.construct_object(value_node, deep=True)
    return seen


def _refuse(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not allowed", node.start_mark)


_FLOAT = r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?\d+", "-+0123456789"),
    ("float", rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), [*_first, *(("",) * (_tag == "null"))]
    )
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
for _tag in ("binary", "omap", "pairs", "set", "timestamp", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse)
