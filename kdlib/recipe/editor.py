"""The JSON schema of a recipe, for editors and for the help text."""

from __future__ import annotations

from typing import Any

from .. import data
from ..losses import LOSSES
from .fields import signature_model
from .schema import Recipe

BASE = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "Path of a config, beside this file, over which this mapping is laid; or a list of them.",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, with the arguments of every loss and of the data set.

    A file may say any part of a recipe, since files and bases are laid over each other; so nothing but a loss's own
    required arguments is required, and null takes away a term or a teacher.
    """
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for part in [schema, *definitions.values()]:
        part.pop("required", None)
        if "properties" in part:
            part["properties"]["base"] = BASE
    for key in ("terms", "teachers"):
        field = schema["properties"][key]
        field["additionalProperties"] = {"anyOf": [field["additionalProperties"], {"type": "null"}]}
    options: list[dict[str, Any]] = [{"enum": sorted(LOSSES)}]
    for name, loss in sorted(LOSSES.items()):
        own = signature_model(loss).model_json_schema()  # type: ignore[arg-type]
        definitions |= own.pop("$defs", {})
        own["properties"] = {"name": {"const": name}} | own.get("properties", {})
        own["required"] = ["name", *own.get("required", [])]
        options.append(own)
    definitions["Loss"] = {"anyOf": options, "title": "Loss"}
    own = signature_model(data.load).model_json_schema()
    definitions |= own.pop("$defs", {})
    schema["properties"]["data"] = own | {"title": "Data", "properties": own["properties"] | {"base": BASE}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
