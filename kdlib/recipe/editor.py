"""The JSON schema of a recipe, for editors and for the help text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import data
from ..losses import LOSSES
from .fields import signature_model
from .schema import Recipe

SHIPPED = Path(__file__).resolve().with_name("schema.json")
"""The schema as a file."""
MARK = "# yaml-language-server: $schema="
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
    whole = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}  # a recipe inside a recipe is checked as one
    definitions["Teacher"]["properties"]["recipe"] |= whole
    schema["properties"]["baseline"] |= whole
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


def mark(config: Path) -> bool:
    """Names the schema in the first line of a config, for editors; whether that changed the file.

    Raises:
        OSError: it cannot be read or written.
    """
    text = config.read_text(encoding="utf-8")
    path = Path(os.path.relpath(SHIPPED, config.resolve().parent)).as_posix()
    rest = text.partition("\n")[2] if text.startswith(MARK) else text
    marked = f"{MARK}{path}\n{rest}"
    if marked != text:
        config.write_text(marked, encoding="utf-8")
    return marked != text
