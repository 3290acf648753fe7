"""Strict building blocks of a schema, and schemas that are read off signatures.

Arguments of losses, of the data set and of its augmentation are not listed anywhere: a default lives in code, once.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, WithJsonSchema, create_model
from torch import nn

from .. import data


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]
Count = Annotated[int, Field(gt=0, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]


def _moment(value: Any) -> Any:
    if isinstance(value, str) and (parts := re.fullmatch(r"(\d{1,6})/([1-9]\d{0,5})", value)):
        value = int(parts[1]) / int(parts[2])
    if not isinstance(value, bool) and isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, float) and 0 <= value <= 1:
        return value
    raise ValueError(
        "Input should be an epoch (an int from 0) or a fraction of the run (a float from 0.0 to 1.0, or 80/120)"
    )


_MOMENT = {"anyOf": [{"type": "integer"}, {"type": "number"}, {"type": "string", "pattern": r"^\d+/\d+$"}]}
Moment = Annotated[int | float, BeforeValidator(_moment), WithJsonSchema(_MOMENT)]


def _path(value: Any) -> Any:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("Input should be the path of a file or folder")
    return Path(value).expanduser()


Location = Annotated[Path, BeforeValidator(_path)]


Taps = str | Annotated[list[str], Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Named(BaseModel):
    """A name and arguments that depend on it."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def whole(self) -> dict[str, Any]:
        """Name and arguments together, as a recipe writes them."""
        return {"name": self.name, **self.arguments}


@cache
def signature_model(target: Any) -> type[BaseModel]:
    """A strict schema of a function's or a class's plain arguments; those that YAML cannot write are left out."""
    inner = target.__init__ if inspect.isclass(target) else target
    hints = get_type_hints(inner, include_extras=True)
    texts = _described(target)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        annotation = _strict(hints.get(name, Any))
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if annotation is not None and name not in NOT_IN_CONFIGS.get(target, ()) and not variadic:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (annotation, Field(default, description=texts.get(name)))
    title = target.__name__
    return create_model(title, __base__=Strict, __doc__=(inspect.getdoc(target) or "").split("\n")[0], **fields)


def _described(target: Any) -> dict[str, str]:
    """Argument to text: the part ``Args:`` of a docstring, or the strings below a dataclass's fields."""
    if dataclasses.is_dataclass(target):
        lines = inspect.getsource(target)  # type: ignore[arg-type]
        return dict(re.findall(r'^    (\w+): [^\n]+\n    """(.+?)"""', lines, re.M | re.S))
    part = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(target) or "", re.M)
    texts: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.+(?:\n {5,}.+)*)", part[1] if part else "", re.M):
        texts |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return texts


NOT_IN_CONFIGS: dict[Callable[..., Any], tuple[str, ...]] = {data.load: ("seed", "device", "rank", "world_size")}
"""Arguments that the run itself gives."""


def _strict(annotation: Any) -> Any:
    """An annotation with strict ints, booleans and finite floats; None where YAML has no such value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Path:
        return Location
    if annotation is nn.Module:
        return Named  # a loss that another loss holds
    if annotation in (str, type(None), Any) or origin is Literal:
        return annotation
    if annotation in PLAIN:
        return PLAIN[annotation]
    if dataclasses.is_dataclass(annotation):
        return signature_model(annotation)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        kept = [inner for inner in map(_strict, arguments) if inner is not None]
        return Union[tuple(kept)] if kept and kept != [type(None)] else None  # noqa: UP007
    if origin in (tuple, list, Sequence):
        inner = tuple(a if a is Ellipsis else _strict(a) for a in arguments)
        return None if None in inner else tuple[inner] if origin is tuple else list[inner]  # type: ignore[valid-type]
    return None


PLAIN: dict[Any, Any] = {int: StrictInt, bool: StrictBool, float: Number}
