"""From a document to a checked recipe, or to one line for each thing that is wrong with it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from .. import data
from ..config import ConfigError, Document, Key
from ..losses import LOSSES
from .agree import disagreements
from .children import children
from .fields import Named, signature_model
from .schema import Loss, Recipe
from .wording import dotted, nearest, wrongs

Wrong = list[tuple[Key, str]]


def load(document: Document) -> Recipe:
    """The checked recipe.

    Raises:
        ConfigError: a line for each thing that is wrong, with its place, its value and the nearest right name.
    """
    recipe, wrong = check(document.data)
    if recipe is None or wrong:
        raise ConfigError(dict.fromkeys(f"{document.origin(key)}: {dotted(key)}: {what}" for key, what in wrong))
    return recipe


def load_children(recipe: Recipe) -> dict[Key, Recipe]:
    """The checked recipes of the runs that ``recipe`` needs, by the key at which each stands.

    Raises:
        ConfigError: as ``load``; never for a recipe that ``load`` gave.
    """
    found: dict[Key, Recipe] = {}
    for at, raw in children(recipe).items():
        child, wrong = check(raw)
        if child is None or wrong:
            raise ConfigError(f"{dotted((*at, *key))}: {what}" for key, what in wrong)
        found[at] = child
    return found


def check(raw: Mapping[str, Any]) -> tuple[Recipe | None, Wrong]:
    """The recipe, with the arguments of losses and data in their types, and what is wrong with it, by key."""
    wrong: Wrong = []
    raw = dict(raw)
    for key in ("terms", "teachers"):  # null takes away what a base has
        if isinstance(raw.get(key), dict):
            raw[key] = {name: spec for name, spec in raw[key].items() if spec is not None}
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        return None, wrongs(error, raw, Recipe)
    given = _arguments(("data",), data.load, recipe.data, wrong)
    terms = {}
    for name, term in recipe.terms.items():
        terms[name] = term.model_copy(update={"loss": _loss(("terms", name, "loss"), term.loss, wrong)})
    wrong += disagreements(recipe, {str(key[1]) for key, _ in wrong if key[0] == "terms"})
    if wrong:
        return None, wrong
    teachers = {name: spec for name, spec in recipe.teachers.items() if name in _wanted(recipe)}
    recipe = recipe.model_copy(update={"terms": terms, "data": given, "teachers": teachers})
    for at, own in children(recipe).items():
        child, inner = check(own)
        wrong += [((*at, *key), what) for key, what in inner]
        parent = recipe.student if at == ("baseline",) else recipe.teachers[str(at[1])]
        if child is not None and child.student.whole != parent.whole:
            wrong.append(
                (
                    (*at, "student"),
                    f"this run trains {parent.whole}, but its own recipe says {child.student.whole}; leave student out",
                )
            )
    return recipe, wrong


def _wanted(recipe: Recipe) -> set[str]:
    """The teachers that a term reads or the student starts from; nobody trains the others."""
    members = list(recipe.teachers)
    read = {theirs.partition(".")[0] for term in recipe.terms.values() for _, theirs in term.compared(members)}
    return read | {recipe.student.init or ""}


def _loss(key: Key, spec: Named, wrong: Wrong) -> Loss:
    """The loss with its arguments in their types, those of a loss that it holds too."""
    if spec.name in LOSSES:
        return Loss(name=spec.name, **_arguments(key, LOSSES[spec.name], spec.arguments, wrong))
    hint = nearest(spec.name, LOSSES) or f"; known: {', '.join(sorted(LOSSES))}"
    wrong.append(((*key, "name"), f"no loss {spec.name!r}{hint}"))
    return Loss(name=spec.name)


def _arguments(key: Key, target: Callable[..., Any], given: Mapping[str, Any], wrong: Wrong) -> dict[str, Any]:
    """The arguments given, checked against the signature of ``target``, and by building it where that is cheap."""
    model = signature_model(target)
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.default is parameter.empty and name not in model.model_fields and parameter.kind.name[:3] != "VAR":
            wrong.append((key, f"needs {name}, which a config cannot say; use it in a loop of your own"))
            return {}
    try:
        checked = model.model_validate(dict(given))
        arguments = {name: getattr(checked, name) for name in checked.model_fields_set}
        known = len(wrong)
        for name, value in arguments.items():
            if isinstance(value, Named):
                arguments[name] = _loss((*key, name), value, wrong).whole
            elif isinstance(value, BaseModel):
                fields = {field: getattr(value, field) for field in value.model_fields_set}
                _build((*key, name), getattr(data, type(value).__name__), fields)
                arguments[name] = fields
        if inspect.isclass(target) and len(wrong) == known:
            held = {name: Loss(**v).build() if isinstance(v, dict) else v for name, v in arguments.items()}
            _build(key, target, held)
        return arguments
    except ValidationError as error:
        wrong += [((*key, *inner), what) for inner, what in wrongs(error, given, model)]
    except _Unbuildable as error:
        wrong.append((error.args[0], error.args[1]))
    return {}


def _build(key: Key, target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        target(**arguments)
    except (ValueError, TypeError, OverflowError) as error:
        argument = next((name for name in arguments if re.search(rf"\b{name}\b", str(error))), None)
        at = (*key, argument) if argument else key
        raise _Unbuildable(at, str(error).removeprefix(f"{'.'.join(map(str, at[-2:]))}: ")) from None


class _Unbuildable(Exception):
    """An object refused its arguments: the key that it speaks of, and what it said."""
