"""The face of a recipe's command line: reads the config, shows help, turns errors into one line and an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from .config import ConfigError, read
from .progress import console
from .recipe import Recipe, json_schema, load

FLAGS = ("--help", "-h", "--print-config", "--schema", "--debug")


def main(body: Callable[[Recipe], None], default: Path, arguments: Sequence[str] | None = None) -> int:
    """Runs ``body`` with the recipe of the command line ``[CONFIG…] [key=value …]``; returns the exit code.

    0 is done, 2 is a config or an input that is wrong (one line each on stderr), 130 is Ctrl-C. ``default`` is read
    where no CONFIG is given. ``--debug`` shows where an error came from.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = {flag for flag in arguments if flag in FLAGS}
    rest = [argument for argument in arguments if argument not in FLAGS]
    try:
        if flags & {"--help", "-h"}:
            print(usage(default))
            return 0
        if "--schema" in flags:
            print(json.dumps(json_schema(), indent=1))
            return 0
        given = [argument for argument in rest if "=" not in argument and not argument.startswith("-")]
        recipe = load(read(rest if given else [str(default), *rest]))
        if "--print-config" in flags:
            print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        body(recipe)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        if "--debug" in flags:
            raise
        print("\n".join(error.lines if isinstance(error, ConfigError) else [str(error)]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if "--debug" in flags:
            raise
        command = " ".join(["accelerate launch", sys.argv[0], *rest])
        console.print(f"\nstopped; the last whole epoch is saved. To go on: {command}", markup=False)
        return 130
    return 0


def usage(default: Path) -> str:
    """The help text, from the fields of the recipe."""
    lines = [
        f"usage: {Path(sys.argv[0]).name} [CONFIG.yaml …] [key=value …] [--print-config] [--schema] [--debug]",
        "",
        f"Later wins; keys are dotted, a number is a list index. Without a CONFIG: {default.name}.",
        "Example: epochs=20 optimizer.lr=2e-3 terms.soft.weight=0.5 data.name=folder data.root=/path",
        "",
    ]
    definitions = json_schema()["$defs"] | {"": json_schema()}
    for title, schema in [("", definitions[""])] + [
        (name, definitions[name]) for name in ("Student", "Teacher", "Term", "Optimizer", "Schedule", "Augment")
    ]:
        lines.append(f"{title or 'recipe'}:")
        for key, field in schema.get("properties", {}).items():
            default_value = (
                "" if "default" not in field or isinstance(field["default"], dict) else f" [{field['default']}]"
            )
            lines.append(f"  {key}{default_value}  {' '.join(str(field.get('description', '')).split())}".rstrip())
    return "\n".join(lines)
