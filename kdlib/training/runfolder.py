"""The folder of a run: whose it is, and what a finished run left in it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from .. import __version__
from ..config import ConfigError
from ..data import Data
from ..files import AVERAGE, CONFIG, STUDENT, SUMMARY
from ..recipe import Recipe, build
from ..recipe.weights import load_weights
from ..yaml12 import YAMLError, dump, parse
from . import checkpoint
from .lock import LOCK, held

NO_MATTER = ("output", "threads", "log_every", "log_gradients", "save_every", "trackers")
"""Keys that change nothing in what a run computes."""


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, defaults included."""
    return recipe.model_dump(mode="json")


def beside(recipe: Recipe, parent: Recipe) -> Recipe:
    """A child's recipe with the output that its config gives it, beside the parent's: equal configs share a folder."""
    digest = hashlib.sha256(json.dumps(_identity(resolved(recipe)), sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", recipe.student.name)  # hf-hub:… has separators, which would leave the folder
    return recipe.model_copy(update={"output": parent.output.parent / f"{name}-{digest}"})


def check_free(recipe: Recipe) -> None:
    """Makes sure that the output folder is new, empty, or this very run's.

    Raises:
        ConfigError: it is a file, or holds anything else.
    """
    folder, file = recipe.output, recipe.output / CONFIG
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"output: {folder} is a file; name a folder"])
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError([f"output: {folder} cannot be made: {above} is not a folder that you may write to"])
    if not file.exists():
        if folder.exists() and any(path.name not in (f".tmp-{CONFIG}", LOCK) for path in folder.iterdir()):
            raise ConfigError([f"output: {folder} is not empty and holds no run; choose another output=…"])
        return
    try:
        there = parse(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"output: {file} is damaged ({error}); choose another output=… or delete the folder"]
        ) from None
    there = _identity(there if isinstance(there, dict) else {})
    here = _identity(resolved(recipe))
    for key in [*here, *there]:
        if not _same(there.get(key), here.get(key)):
            old, new = _difference(there.get(key), here.get(key))
            raise ConfigError(
                [
                    f"output: {folder} already holds a run with another {key} ({old} there, {new} here); "
                    "choose another output=… or delete it"
                ]
            )


def check_agreed(recipe: Recipe, accelerator: Accelerator) -> None:
    """Makes sure that all processes of a job were started with one config.

    Raises:
        ConfigError: they were not; on every process.
    """
    mine = {key: value for key, value in resolved(recipe).items() if key != "threads"}
    for rank, theirs in enumerate(gather_object([mine]) if accelerator.num_processes > 1 else []):
        for key in mine:
            if not _same(theirs.get(key), mine[key]):
                old, new = _difference(theirs.get(key), mine[key])
                raise ConfigError(
                    [
                        f"launch: process {rank} was started with another {key} ({old} there, {new} on process "
                        f"{accelerator.process_index}); start all with the same config"
                    ]
                )


@contextmanager
def claimed(recipe: Recipe) -> Iterator[None]:
    """Makes the folder and writes the config that it belongs to; inside, no other process can.

    Raises:
        ConfigError: the folder cannot be made, another process runs in it, or it became another run's meanwhile.
        OSError: the config cannot be written.
    """
    try:
        recipe.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"output: {recipe.output} cannot be made ({error.strerror})"]) from None
    try:
        with held(recipe.output):
            check_free(recipe)
            with checkpoint.whole(recipe.output / CONFIG) as draft:
                draft.write_text(dump(resolved(recipe)), encoding="utf-8")
            yield
    except BlockingIOError as error:
        raise ConfigError([f"output: {error}; wait until it ends, or choose another output=…"]) from None


def summary(folder: Path) -> dict[str, Any] | None:
    """What the finished run in a folder wrote down: ``result``, ``seconds`` and more; None if there is no finished run.

    Raises:
        ConfigError: it is damaged.
    """
    file = folder / SUMMARY
    if not file.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        float(found["result"]["top1"]), float(found["seconds"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            [f"output: {file} is damaged; delete it to finish the run again from its checkpoint"]
        ) from None
    return found


def finished(recipe: Recipe, student: nn.Module) -> tuple[dict[str, float], float] | None:
    """What the finished run in the folder came to and the seconds it took, its weights loaded into ``student``.

    None if there is no finished run.

    Raises:
        ConfigError: it is finished and its summary or weights are damaged.
    """
    found = summary(recipe.output)
    if found is None:
        return None
    try:
        load_weights(student, recipe.output / STUDENT, "output")
    except ConfigError as error:
        what = error.lines[0].partition("; ")[0]
        again = f"delete {recipe.output / SUMMARY} to finish the run again from its checkpoint"
        raise ConfigError([f"{what}; {again}"]) from None
    return found["result"], float(found["seconds"])


def open_data(recipe: Recipe, folder: Path, device: torch.device) -> Data:
    """The data of the run in ``folder``.

    Raises:
        ConfigError: they are not there; names the config that says where they should be.
    """
    try:
        return build.open_data(recipe, device, 0, 1)
    except ConfigError as error:
        root = recipe.data.get("root")
        hint = "" if root is None or Path(root).is_absolute() else "; root is relative to where the run was started"
        raise ConfigError(f"{folder / CONFIG}: {line}{hint}" for line in error.lines) from None


def finish(
    recipe: Recipe, student: nn.Module, average: nn.Module | None, result: Mapping[str, float], seconds: float
) -> None:
    """Writes the trained weights, and their moving average, then the summary, which says that the run is finished."""
    checkpoint.save_weights(student, recipe.output / STUDENT)
    if average is not None:
        checkpoint.save_weights(average, recipe.output / AVERAGE)
    made_with = versions(next(student.parameters()).device)
    told = {"result": dict(result), "seconds": seconds, "made_with": made_with}
    checkpoint.write_json(recipe.output / SUMMARY, told)


def versions(device: torch.device) -> dict[str, str]:
    """What computes here, in words: packages by name, and the device."""
    found = {"torch": torch.__version__} | {name: metadata.version(name) for name in ("timm", "accelerate")}
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    return {"kdlib": __version__, "python": platform.python_version(), **found, "device": on}


def _identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in NO_MATTER}


def _same(old: Any, new: Any) -> bool:
    """Equal, and 1 is not 1.0: as a moment the one is an epoch, the other the whole run."""
    return json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def _difference(old: Any, new: Any) -> tuple[str, str]:
    """The first part in which two values differ, shown short."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if not _same(old.get(key), new.get(key)):
                inner = _difference(old.get(key), new.get(key))
                return f"{key}: {inner[0]}", f"{key}: {inner[1]}"
    return str(old)[:60], str(new)[:60]
