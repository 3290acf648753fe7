"""The command ``kdlib``: one file a verb, each a thin door to a function that Python can call too.

``main`` finds the verb, gives it its arguments and turns errors into one line and an exit code, as ``kdlib.launch``
does for recipes: 0 is done, 2 an input that is wrong, 1 a disk that failed, 130 Ctrl-C.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from textwrap import fill
from typing import Any, NoReturn

from ..config import one_line

VERBS = {
    "inspect": "the modules of a model: tap names, shapes, layouts, parameters, FLOPs",
    "pairs": "which layer of a teacher answers to which of a student: the plan, and how alike they are",
    "doctor": "examines a config before hours are spent on it",
    "export": "takes the student of a finished run away, checked against the run",
    "report": "what runs came to, as one HTML page",
    "schema": "the JSON schema of a config, for editors",
}
"""Verb to what it does; each is a file here, with ``arguments(parser)`` and ``run(options)``."""
WRONG_INPUT, FAILED, STOPPED = 2, 1, 130
CODES = "Ends with 0 when done, 2 for an input that is wrong, 1 for a disk that failed, 130 after Ctrl-C."


class Help(RawDescriptionHelpFormatter):
    """Descriptions as wide as the terminal; lines that are indented, examples and tables, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip().split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") or "\n " in part else self._prose(part, width) for part in parts
        )

    @staticmethod
    def _prose(text: str, width: int) -> str:
        return fill(text, width, break_long_words=False, break_on_hyphens=False)


class Parser(ArgumentParser):
    """argparse with errors of one line, which name the nearest option that exists."""

    def error(self, message: str) -> NoReturn:
        known = [*self._option_string_actions, *VERBS]
        words = [word for word in re.split(r"[\s=',:]+", message) if word not in known]
        near = [match for word in words if len(word) > 3 for match in get_close_matches(word, known, n=1, cutoff=0.75)]
        hint = f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"
        self.exit(WRONG_INPUT, f"{self.prog}: {' '.join(message.split())}{hint}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. With ``--debug`` an error comes through as it is."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        verb = _verb(given)
        options = _parser(verb).parse_intermixed_args(given[1:])
    except SystemExit as end:  # argparse has said what there was to say
        return int(end.code or 0)
    from ..progress import console

    console.quiet = options.quiet
    if "" not in sys.path:
        sys.path.append("")  # modules that the command line names may lie here, and come last
    try:
        _import(options.imports)
        import_module(f".{verb}", __package__).run(options)
    except Exception as error:
        if options.debug:
            raise
        code = FAILED if isinstance(error, OSError) else WRONG_INPUT
        if isinstance(error, OSError | ValueError):
            return _fail(getattr(error, "lines", None) or [f"{one_line(error)} (--debug shows where)"], code)
        raise
    except KeyboardInterrupt:
        if options.debug:
            raise
        return _fail(["stopped"], STOPPED)
    finally:
        console.quiet = False
    return 0


def _verb(given: Sequence[str]) -> str:
    """The verb that is asked for; ends with the list of them, or with what is wrong."""
    lines = "\n".join(f"  {verb:10}{text}" for verb, text in VERBS.items())
    parser = Parser(
        "kdlib",
        "kdlib VERB …  (kdlib VERB --help says more)",
        f"Knowledge distillation for PyTorch.\n\nverbs:\n{lines}\n\n{CODES}",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="store_true", help="the version of kdlib")
    if given and given[0] in VERBS:
        return given[0]
    if given and not given[0].startswith("-"):
        parser.error(f"no verb {given[0]!r} (known: {', '.join(VERBS)})")
    if parser.parse_args(given).version:
        from .. import __version__

        print(__version__)
    else:
        parser.print_help()
    raise SystemExit(0 if given else WRONG_INPUT)


def _parser(verb: str) -> Parser:
    module = import_module(f".{verb}", __package__)
    parser = Parser(f"kdlib {verb}", description=module.__doc__, formatter_class=Help, allow_abbrev=False)
    module.arguments(parser)
    every = parser.add_argument_group("for every verb")
    every.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="import it first, for what it registers (models of a recipe: recipes.riformer.run); as often as needed",
    )
    every.add_argument("--quiet", action="store_true", help="say nothing but errors")
    every.add_argument("--debug", action="store_true", help="where an error came from")
    return parser


def _import(names: Iterable[str]) -> None:
    """Imports what the command line names, from the working directory too."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(
                f"--import {name}: cannot be imported ({one_line(error)}); start where it can be"
            ) from error


def of_imports(options: Namespace, what: str) -> Any:
    """The attribute ``what`` of the first imported module that has it, e.g. a recipe's ``convert``."""
    return next(
        (getattr(sys.modules[name], what) for name in options.imports if hasattr(sys.modules[name], what)), None
    )


def _fail(lines: Iterable[str], code: int) -> int:
    print("\n".join(lines), file=sys.stderr)
    return code
