"""How an error is put: where it is, what is wrong, what was given, and the nearest right name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..config import Key


def dotted(key: Key) -> str:
    """A key as the command line writes it, what is long cut short."""
    return ".".join(part if len(part) < 60 else short(part) for part in map(str, key)) or "config"


def short(value: Any) -> str:
    """A value in one line of at most sixty characters."""
    shown = repr(value)
    return shown if len(shown) < 60 else shown[:57] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean …?``, or nothing where no known name is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def wrongs(error: ValidationError, raw: Any, model: type[BaseModel]) -> list[tuple[Key, str]]:
    """pydantic's errors by key, those of one key in one line: a value may be none of several kinds."""
    found: dict[Key, list[str]] = {}
    for one in error.errors(include_url=False):
        key = _place(one, raw)
        found.setdefault(key, []).append(_say(one, model) + _sibling(one, key, raw))
    return [(key, ", or ".join(dict.fromkeys(says))) for key, says in found.items()]


def _sibling(error: Any, key: Key, raw: Any) -> str:
    """The nearest name beside one that lacks what it must have: a term or a teacher that was misspelt."""
    if error["type"] != "missing" or len(key) != 3 or not isinstance(raw, dict):
        return ""
    beside = raw.get(key[0])
    return nearest(str(key[1]), [name for name in beside if name != key[1]]) if isinstance(beside, dict) else ""


def _place(error: Any, raw: Any) -> Key:
    """The key of an error: its location without the names of union members, which are no keys."""
    key: list[str | int] = []
    for part in error["loc"]:
        keys = raw if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ()
        if part in keys:
            raw = raw[part]
            key.append(part)
    return (*key, error["loc"][-1]) if error["type"] == "missing" else tuple(key)


def _say(error: Any, model: type[BaseModel]) -> str:
    """What is wrong by one of pydantic's errors against ``model``."""
    loc, given = error["loc"], error.get("input")
    if error["type"] == "extra_forbidden":
        known = _fields(model, loc[:-1])
        return f"unknown key{nearest(str(loc[-1]), known)} (known: {', '.join(known) or 'none'})"
    if error["type"] == "missing":
        return "is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "Input should be a mapping of keys to values"
    word = "write true or false, " if error["type"].startswith("bool_") else ""
    return f"{message[0].lower()}{message[1:]} ({word}got {short(given)})"


def _fields(model: Any, loc: Sequence[Any]) -> list[str]:
    """The keys that may stand at ``loc``."""
    for part in loc:
        field = model.model_fields.get(part) if inspect.isclass(model) and issubclass(model, BaseModel) else None
        inner = field.annotation if field else model
        options = [inner, *get_args(inner)]
        model = next((o for o in options if inspect.isclass(o) and issubclass(o, BaseModel)), inner)
    return sorted(model.model_fields) if inspect.isclass(model) and issubclass(model, BaseModel) else []
