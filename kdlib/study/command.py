"""The command line of a study."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import torch

from ..config import ConfigError, is_assignment
from ..dryrun import dry_run
from ..launch import FAILED, WRONG_INPUT
from ..progress import console, say
from ..recipe import Recipe
from ..signals import ending
from ..training import checkpoint
from . import show
from .paired import MOST
from .rows import Key, choose, load_study, recipes
from .run import Train, gather, run

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
            "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
"""What torchrun tells a process of its place among the others."""
WIDE = 160
"""Columns of the table where no terminal limits it."""


def main(train: Train, studies: Path, scales: Path, arguments: Sequence[str] | None = None) -> int:
    """``STUDY --data SCALE --seeds N [--rows …] [--jobs N] [--out FOLDER] [key=value …]``; returns the exit code.

    Args:
        train: trains one recipe; each worker process imports it.
        studies: the folder of the studies that are known by name.
        scales: the folder of the scales: data, models, epochs.
    """
    given, rest = _parser(studies, scales).parse_known_args(arguments)
    began = perf_counter()
    try:
        for argument in rest:
            if not is_assignment(argument):
                raise ConfigError([f"command line: unknown argument {argument}; values are written key=value"])
        if not _leads():
            return 0
        study = load_study(_file(given.study, studies, "study"))
        # `--rows a b key=value`: argparse takes the setting for a row
        rest += [word for word in given.rows or () if is_assignment(word) and word not in study.rows]
        rows = [word for word in given.rows or () if word not in rest]
        study = choose(study, rows) if rows else study
        folder = given.out or Path("runs") / "studies" / f"{Path(given.study).stem}-{Path(given.data).stem}"
        planned = recipes(study, _file(given.data, scales, "--data"), given.seeds, folder, rest)
        if given.dry_run:
            return _try_rows(planned)
        stopped, failed = 0, dict[str, str]()
        try:
            with ending():
                results = run(study, planned, train, given.jobs, failed)
        except KeyboardInterrupt as stop:
            stopped, results = getattr(stop, "number", signal.SIGINT), gather(study, planned, failed)
    except ConfigError as error:
        print("\n".join(error.lines), file=sys.stderr)
        return WRONG_INPUT
    if results.top1:
        about = {
            "command": " ".join([_script(), *(sys.argv[1:] if arguments is None else arguments)]),
            "seconds": perf_counter() - began,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        console.print(show.table(results), width=None if console.is_terminal else WIDE)
        try:
            checkpoint.write_json(folder / "study.json", about | show.plain(results))
            show.plot(results, folder / "study.png")
        except OSError as error:
            print(f"{folder}: the table above cannot be written there ({error.strerror or error})", file=sys.stderr)
            return FAILED
        say(f"{perf_counter() - began:.0f} s; all in {folder}/ (study.json, study.png)")
    for name, reason in results.failed.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if stopped:
        say("stopped; what is finished is above. The same command goes on")
        return 128 + stopped
    return FAILED if results.failed else 0


def _script() -> str:
    """The script that was started, as from here; by its name alone where it lies elsewhere on this machine."""
    path = Path(sys.argv[0])
    if path.is_absolute():
        path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    return path.as_posix()


def _try_rows(planned: Mapping[Key, Recipe]) -> int:
    """Builds each row once, on the meta device, and says what does not fit; returns the exit code.

    Raises:
        ConfigError: a row that a run would refuse, each named.
    """
    wrong = []
    for name, recipe in {name: recipe for (name, _), recipe in planned.items()}.items():
        try:
            dry_run(recipe)
            say(f"{name}: can be run")
        except ConfigError as error:
            wrong += [f"row {name!r}: {line}" for line in error.lines]
    if wrong:
        raise ConfigError(wrong)
    return 0


def _leads() -> bool:
    """Whether this process is the study. Of those that a launcher started, one for each GPU, the first one is, on all
    GPUs; its runs must not take themselves for that launcher's."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    if os.environ.get("RANK", "0") != "0":
        return False
    for name in [*os.environ]:
        if name in LAUNCHED or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    return True


def _parser(studies: Path, scales: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Runs rows of a study over seeds and compares them, seed by seed.")
    known = ", ".join(sorted(path.stem for path in studies.glob("*.yaml")))
    parser.add_argument("study", help=f"a name ({known}) or a YAML file")
    known = ", ".join(sorted(path.stem for path in scales.glob("*.yaml")))
    parser.add_argument("--data", required=True, help=f"the scale: a name ({known}) or a YAML file")
    parser.add_argument("--seeds", type=_few, default=3, help="seeds 0 … N-1 (default 3)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, and what they are compared with")
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time, over all visible GPUs (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="build each row once, train nothing, say what is wrong")
    parser.add_argument("--out", type=Path, help="folder of all runs (default runs/studies/STUDY-SCALE)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 (got {text!r})")
    return int(text)


def _few(text: str) -> int:
    if _count(text) > MOST:
        raise argparse.ArgumentTypeError(f"statistics are for at most {MOST} seeds (got {text})")
    return int(text)


def _file(name: str, folder: Path, what: str) -> Path:
    """A YAML file by its path, or by its name in ``folder``."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if not (found := folder / f"{name}.yaml").exists():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError([f"command line: {what}: no {name!r} (known: {known}); or give a YAML file"])
    return found
