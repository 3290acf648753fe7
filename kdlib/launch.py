"""The face of a recipe's command line: reads the config, shows help, turns errors into one line and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .config import COMMAND_LINE, ConfigError, Document, is_assignment, one_line, read
from .dryrun import dry_run
from .plugins import load_plugins
from .progress import console
from .recipe import Recipe, json_schema, load
from .recipe.weights import Convert
from .signals import Stopped, ending
from .training.runfolder import resolved
from .usage import usage
from .yaml12 import dump

FLAGS = ("--help", "-h", "--print-config", "--schema", "--dry-run", "--quiet", "--debug")
WRONG_INPUT, FAILED = 2, 1


def main(
    body: Callable[[Recipe], None],
    default: Path,
    arguments: Sequence[str] | None = None,
    convert: Convert | None = None,
) -> int:
    """Runs ``body`` with the recipe of the command line ``[CONFIG…] [key=value …]``; returns the exit code.

    0 is done, 2 is a config or an input that is wrong, 1 a disk, a worker, another process or numbers that failed (one
    line each on stderr), 130 is Ctrl-C, 143 is SIGTERM. ``default`` is read where no CONFIG is given. With ``--debug``
    an error comes through as it is, with ``--quiet`` nothing but errors is said, with ``--dry-run`` the plan of the run
    is printed instead of made; ``convert`` is what ``runs.run`` is given.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    flags = {flag for flag in arguments if flag in FLAGS}
    rest = [argument for argument in arguments if argument not in FLAGS]
    console.quiet = "--quiet" in flags
    try:
        load_plugins()
        if flags & {"--help", "-h"}:
            print(usage(default))
            return 0
        if "--schema" in flags:
            print(json.dumps(json_schema(), indent=1))
            return 0
        document = read_config(rest, default)
        recipe = load(document)
        if "--print-config" in flags:
            print(dump(resolved(recipe)), end="")
            return 0
        try:
            if "--dry-run" in flags:
                if os.environ.get("RANK", "0") == "0":
                    print(dry_run(recipe, convert))
            else:
                with ending():
                    body(recipe)
        except ConfigError as error:
            raise ConfigError(with_origin(error.lines, document)) from error
    except Exception as error:
        if "--debug" in flags:
            raise
        if isinstance(error, ConfigError):
            return _fail(error.lines, WRONG_INPUT)
        if isinstance(error, ValueError):
            return _fail([f"{one_line(error)} (--debug shows where)"], WRONG_INPUT)
        if isinstance(error, FloatingPointError):
            return _fail([one_line(error)], FAILED)
        if isinstance(error, OSError):
            return _fail([f"{one_line(error)} (what was saved before is whole; --debug shows where)"], FAILED)
        raise
    except KeyboardInterrupt as stop:
        if "--debug" in flags:
            raise
        saved = "everything is saved" if isinstance(stop, Stopped) and stop.saved else "the last checkpoint is whole"
        command = shlex.join(["accelerate", "launch", sys.argv[0], *rest])
        if os.environ.get("RANK", "0") == "0":
            console.print(f"\nstopped; {saved}. To go on: {command}", markup=False)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)
    return 0


def read_config(arguments: Sequence[str], default: Path | None = None) -> Document:
    """The document of ``[CONFIG…] [key=value …]``; its output is named by its CONFIGs where nothing names it.

    Raises:
        ConfigError: as ``config.read``.
    """
    files = [argument for argument in arguments if not is_assignment(argument) and not argument.startswith("-")]
    document = read(arguments if files or default is None else [str(default), *arguments])
    if files and "output" not in document.data:
        said_by = COMMAND_LINE if document.data else files[0]  # whose mistake it is that nothing is said
        document.overlay({"output": f"runs/{'-'.join(Path(file).stem for file in files)}"}, said_by)
    return document


def with_origin(lines: Iterable[str], document: Document) -> list[str]:
    """Lines that begin with a key of the recipe get the file that said it in front."""
    keys = [(tuple(line.partition(":")[0].split(".")), line) for line in lines]
    return [f"{document.origin(key)}: {line}" if key[0] in Recipe.model_fields else line for key, line in keys]


def _fail(lines: Iterable[str], code: int) -> int:
    print("\n".join(lines), file=sys.stderr)
    return code
