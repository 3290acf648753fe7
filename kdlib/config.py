"""From command line and YAML files to one plain dictionary, remembering where each value came from.

``CONFIG… key=value …``: later wins. A mapping may name ``base: other.yaml`` (a path beside its own file, or a list of
them), which it then overlays. What YAML is here: see ``yaml12``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from .yaml12 import DEEPEST, YAMLError, parse

Key = tuple[str | int, ...]
LARGEST = 100_000
"""Bytes of a config file; parsing so many takes a second."""


class ConfigError(ValueError):
    """What is wrong with a config, one line each: ``file: key: what is wrong (got …); did you mean …``."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = [_printable(line) for line in lines]
        super().__init__("\n".join(self.lines))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.lines,)  # by itself it would be made anew from its text, letter by letter


def _printable(line: str) -> str:
    """The line with its control characters written out, so that a hostile name neither hides nor breaks it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def one_line(error: BaseException, longest: int | None = None) -> str:
    """What an error says, in one line: of the system's, the file and what is wrong with it, without a number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())[:longest] or type(error).__name__


class Source(NamedTuple):
    """Who says a value, and the files (resolved) through which it was reached as a base."""

    name: str
    folder: Path = Path()
    above: tuple[Path, ...] = ()


COMMAND_LINE = Source("command line")


class Document:
    """A dictionary, and for each of its values the file (or ``command line``) that said it."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self._origins: dict[tuple[str, ...], str] = {}

    def overlay(self, data: Mapping[str, Any], origin: str | Source) -> None:
        """Lays ``data`` over what is there: mappings join, all else replaces.

        A ``loss`` of another name replaces the old one whole, since the arguments of one mean nothing to another.

        Raises:
            ConfigError: a ``base`` that cannot be read.
        """
        self._lay(self.data, (), data, Source(origin) if isinstance(origin, str) else origin)

    def assign(self, text: str) -> None:
        """Obeys one ``dotted.key=value``; the value is YAML, a number in the key is a list index.

        Raises:
            ConfigError: a value that cannot be read, or a key that fits nowhere.
        """
        key, _, value = text.partition("=")
        path = key.split(".")
        if not all(path) or len(path) > DEEPEST:
            raise ConfigError([f"command line: {key[:60]}: a key is words joined by single dots"])
        parsed = _parse(value, f"command line: {key}")
        node: Any = self.data
        for i, part in enumerate(path[:-1]):
            place = _place(node, path[: i + 1])
            if isinstance(node, dict) and not isinstance(node.get(part), dict | list):
                self._put(node, part, tuple(path[: i + 1]), {}, COMMAND_LINE)
            node = node[place]
        last = _place(node, path)
        if last == "name" and path[-2:-1] == ["loss"] and _renamed(node, parsed):
            node.clear()
        if last == "base":
            self._lay(node, tuple(path[:-1]), {"base": parsed}, COMMAND_LINE)
        else:
            self._put(node, last, tuple(path), parsed, COMMAND_LINE)

    def origin(self, key: Key) -> str:
        """Who said ``key``, or the nearest thing above it; ``config`` for a default."""
        names = tuple(map(str, key))
        for end in range(len(names), 0, -1):
            if names[:end] in self._origins:
                return self._origins[names[:end]]
        return next(iter(self._origins.values()), "config")

    def _lay(self, node: dict[str, Any], at: tuple[str, ...], data: Mapping[str, Any], source: Source) -> None:
        bases = data.get("base", [])
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, str):
                place = ".".join((*at, "base"))
                raise ConfigError(
                    [f"{source.name}: {place}: expected the path of a file beside this one (got {base!r})"]
                )
            try:
                found = read_file(source.folder / base, source.above)
            except ConfigError as error:
                raise ConfigError(f"{source.name}: {'.'.join((*at, 'base'))}: {line}" for line in error.lines) from None
            self._lay(node, at, *found)
        for key, value in data.items():
            if key != "base":
                self._put(node, key, (*at, str(key)), value, source)

    def _put(self, node: Any, key: str | int, at: tuple[str, ...], value: Any, source: Source) -> None:
        old = node.get(key) if isinstance(node, dict) else node[key]
        if key == "loss":
            old, value = _named(old), _named(value)
            if isinstance(value, dict) and _renamed(old, value.get("name")):
                old = None
        self._note(at, value, source.name)
        if isinstance(value, Mapping):
            node[key] = old if isinstance(old, dict) else {}
            self._lay(node[key], at, value, source)
        else:
            node[key] = value

    def _note(self, at: tuple[str, ...], value: Any, origin: str) -> None:
        for end in range(1, len(at) + 1):  # of a mapping, whoever touched it last
            self._origins[at[:end]] = origin
        for i, inner in enumerate(value if isinstance(value, list) else ()):
            self._note((*at, str(i)), inner, origin)


def _named(loss: Any) -> Any:
    """``hard_label`` is short for ``{name: hard_label}``."""
    return {"name": loss} if isinstance(loss, str) else loss


def _renamed(old: Any, name: Any) -> bool:
    return isinstance(old, dict) and "name" in old and name is not None and old["name"] != name


def _place(node: Any, path: list[str]) -> str | int:
    """The last part of ``path`` as a key of the mapping, or an index of the list, that ``node`` is."""
    place, part = ".".join(path), path[-1]
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError([f"command line: {place}: what is above it is {node!r}, not a mapping or a list"])
    if not re.fullmatch("[0-9]{1,6}", part) or int(part) >= len(node):
        raise ConfigError([f"command line: {place}: the list has the indices 0 to {len(node) - 1} (got {part})"])
    return int(part)


def is_assignment(argument: str) -> bool:
    """Whether an argument of the command line is ``key=value``; any other one is a file."""
    return re.match(r"[A-Za-z_][\w.-]*=", argument) is not None


def read(arguments: Iterable[str]) -> Document:
    """The files and ``key=value`` assignments of a command line, in order.

    Raises:
        ConfigError: a file that is missing or no mapping, YAML that cannot be read, an assignment that fits nowhere.
    """
    document = Document()
    for argument in arguments:
        if is_assignment(argument):
            document.assign(argument)
        elif argument.startswith("-"):
            known = "--help, --print-config, --schema, --dry-run, --quiet, --debug; values are written key=value"
            raise ConfigError([f"command line: unknown option {argument} (known: {known})"])
        else:
            document.overlay(*read_file(Path(argument)))
    return document


def read_file(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Source]:
    """One YAML file as a dictionary, its bases not yet read, and the source that it is.

    Raises:
        ConfigError: a file that is missing, too large or no mapping, a circle of bases, YAML that cannot be read.
    """
    try:
        real = path.resolve()
        if real in above:
            raise ConfigError([f"{path}: the files include each other in a circle"])
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError([f"{path}: is larger than {LARGEST:,} bytes, which no config is"])
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: cannot be read (is no UTF-8 text)"]) from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: NUL in the name
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{path}: cannot be read ({reason}){_other(path)}"]) from None
    data = _parse(text, str(path))
    if data is not None and not isinstance(data, dict):
        raise ConfigError([f"{path}: a config is a mapping of keys to values (got {type(data).__name__})"])
    return data or {}, Source(str(path), path.parent, (*above, real))


def _other(path: Path) -> str:
    """A hint at what may have been meant by a path that cannot be read."""
    try:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    except (OSError, ValueError):
        near = []
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    return "" if path.suffix and "=" not in path.name else "; a CONFIG is a YAML file, and values are written key=value"


def _parse(text: str, where: str) -> Any:
    try:
        return parse(text)
    except YAMLError as error:
        raise ConfigError([f"{where}: {error}"]) from None
