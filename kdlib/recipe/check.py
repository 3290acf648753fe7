"""From a document to a checked recipe, or to one line for each thing that is wrong with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .. import data
from ..config import ConfigError, Document, Key
from ..losses import LOSSES
from .fields import signature_model
from .schema import Loss, Recipe


def load(document: Document) -> Recipe:
    """The checked recipe.

    Raises:
        ConfigError: a line for each thing that is wrong, with its place, its value and the nearest right name.
    """
    raw = dict(document.data)
    for key in ("terms", "teachers"):  # null takes away what a base has
        if isinstance(raw.get(key), dict):
            raw[key] = {name: spec for name, spec in raw[key].items() if spec is not None}
    wrong: list[tuple[Key, str]] = []
    try:
        recipe = Recipe.model_validate(raw)
        checks: list[tuple[Key, Callable[..., Any], dict[str, Any]]] = [(("data",), data.load, recipe.data)]
        for name, term in recipe.terms.items():
            if term.loss.name not in LOSSES:
                near = _nearest(term.loss.name, LOSSES)
                wrong.append(
                    (
                        ("terms", name, "loss", "name"),
                        f"no loss {term.loss.name!r}{near}; known: {', '.join(sorted(LOSSES))}",
                    )
                )
            else:
                checks.append((("terms", name, "loss"), LOSSES[term.loss.name], term.loss.arguments))
        checked = {key: _arguments(key, target, given, wrong) for key, target, given in checks}
        wrong += _cross_checks(recipe)
    except ValidationError as error:
        wrong = [(tuple(e["loc"]), _say(e, raw)) for e in error.errors(include_url=False)]
    if wrong:
        raise ConfigError(
            dict.fromkeys(f"{document.origin(key)}: {'.'.join(map(str, key)) or 'config'}: {say}" for key, say in wrong)
        )
    terms = {
        name: term.model_copy(update={"loss": Loss(name=term.loss.name, **checked["terms", name, "loss"])})
        for name, term in recipe.terms.items()
    }
    return recipe.model_copy(update={"terms": terms, "data": checked["data",]})


def _arguments(
    key: Key, target: Callable[..., Any], given: Mapping[str, Any], wrong: list[tuple[Key, str]]
) -> dict[str, Any]:
    """The arguments given, checked against the signature of ``target``, and by building it where that is cheap."""
    model = signature_model(target)
    try:
        checked = model.model_validate(dict(given))
        arguments = {name: getattr(checked, name) for name in checked.model_fields_set}
        for name, value in arguments.items():
            if isinstance(value, BaseModel):
                fields = {field: getattr(value, field) for field in value.model_fields_set}
                _build((*key, name), getattr(data, type(value).__name__), fields)
                arguments[name] = fields
        if inspect.isclass(target):
            _build(key, target, arguments)
        return arguments
    except ValidationError as error:
        wrong += [((*key, *e["loc"]), _say(e, given, model)) for e in error.errors(include_url=False)]
    except _Unbuildable as error:
        wrong.append((error.args[0], error.args[1]))
    return {}


def _build(key: Key, target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        target(**arguments)
    except (ValueError, TypeError) as error:
        argument = next((name for name in arguments if re.search(rf"\b{name}\b", str(error))), None)
        place = (*key, argument) if argument else key
        raise _Unbuildable(place, str(error).removeprefix(f"{'.'.join(map(str, place[-2:]))}: ")) from None


class _Unbuildable(Exception):
    """An object refused its arguments: the key that it speaks of, and what it said."""


def _cross_checks(recipe: Recipe) -> list[tuple[Key, str]]:
    """What a schema cannot say: names that must agree between sections."""
    wrong: list[tuple[Key, str]] = []
    if not recipe.terms:
        wrong.append((("terms",), "there are no terms; give at least one, e.g. {label: {loss: cross_entropy}}"))
    for name in recipe.teachers:
        if not name.isidentifier():
            wrong.append((("teachers", name), f"a teacher's name is a plain word (got {name!r})"))
    for name, term in recipe.terms.items():
        needs = getattr(LOSSES.get(term.loss.name), "against", ("teacher",))
        owner = (term.teacher or "").partition(".")[0]
        if term.teacher is None and "teacher" in needs and not recipe.teachers:
            wrong.append((("terms", name), f"{term.loss.name} needs a teacher, and teachers is empty"))
        elif term.teacher is None and "teacher" in needs and len(recipe.teachers) > 1:
            wrong.append((("terms", name, "teacher"), f"say which teacher: {', '.join(recipe.teachers)}"))
        elif term.teacher is not None and owner != "@labels" and owner not in recipe.teachers:
            wrong.append(
                (
                    ("terms", name, "teacher"),
                    f"no teacher {owner!r}{_nearest(owner, recipe.teachers)}; "
                    f"known: {', '.join(recipe.teachers) or 'none'}",
                )
            )
    if recipe.student.init is not None and recipe.student.init not in recipe.teachers:
        wrong.append(
            (("student", "init"), f"no teacher {recipe.student.init!r}{_nearest(recipe.student.init, recipe.teachers)}")
        )
    for name, teacher in recipe.teachers.items():
        if teacher.weights is None and teacher.recipe is None and not teacher.arguments.get("pretrained"):
            wrong.append(
                (
                    ("teachers", name),
                    "has no weights: give weights: a file, pretrained: true, or recipe: what trains it",
                )
            )
    return wrong


def _say(error: Any, raw: Any, model: type[BaseModel] | None = None) -> str:
    """One of pydantic's errors in a line: what is wrong, what was given, the nearest right name."""
    loc, given = error["loc"], error.get("input")
    if error["type"] == "extra_forbidden":
        known = _fields(model or Recipe, loc[:-1])
        return f"unknown key{_nearest(str(loc[-1]), known)} (known: {', '.join(known)})"
    if error["type"] == "missing":
        return "is missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(given) if len(repr(given)) < 60 else repr(given)[:57] + "…"
    return f"{message[0].lower()}{message[1:]} (got {shown})"


def _fields(model: Any, loc: Sequence[Any]) -> list[str]:
    """The keys that may stand at ``loc``."""
    for part in loc:
        field = model.model_fields.get(part) if inspect.isclass(model) and issubclass(model, BaseModel) else None
        inner = field.annotation if field else model
        options = [inner, *get_args(inner)]
        model = next((o for o in options if inspect.isclass(o) and issubclass(o, BaseModel)), inner)
    return sorted(model.model_fields) if inspect.isclass(model) and issubclass(model, BaseModel) else []


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with the arguments of every loss and of the data set, for editors."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    options = []
    for name, loss in sorted(LOSSES.items()):
        own = signature_model(loss).model_json_schema()  # type: ignore[arg-type]
        definitions |= own.pop("$defs", {})
        own["properties"] = {"name": {"const": name}} | own.get("properties", {})
        own["required"] = ["name", *own.get("required", [])]
        options.append(own)
    definitions["Loss"] = {"anyOf": [{"enum": sorted(LOSSES)}, *options], "title": "Loss"}
    own = signature_model(data.load).model_json_schema()
    definitions |= own.pop("$defs", {})
    schema["properties"]["data"] = own | {"title": "Data"}
    return schema | {"$schema": "https://json-schema.org/draft/2020-12/schema"}
