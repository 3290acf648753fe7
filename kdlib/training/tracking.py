"""accelerate's trackers: TensorBoard, Weights & Biases, MLflow, trackio and others beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

DEFAULT = "tensorboard"


def choose(wanted: Sequence[str] | str) -> list[str]:
    """The trackers that ``wanted`` names; ``auto`` is TensorBoard where it is installed.

    Raises:
        ValueError: one that is not installed.
    """
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if wanted == "auto":
        return [DEFAULT] if DEFAULT in installed else []
    for name in wanted:
        if name not in installed:
            raise ValueError(f"{name} is not installed; pip install {name}, or leave it out")
    return list(wanted)


def start(names: Sequence[str], folder: Path, step: int, config: Mapping[str, Any]) -> list[Any]:
    """Trackers that write to ``folder``, or under its name to their servers, from ``step`` on."""
    started = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            # what was written after the checkpoint is taken back, as in metrics.jsonl
            tracker = kind("tensorboard", str(folder), **({"purge_step": step + 1} if step else {}))
        elif kind.requires_logging_directory:
            tracker = kind(folder.name, str(folder))
        else:
            tracker = kind(folder.name)
        if hasattr(tracker, "start"):  # before accelerate 1.11 a tracker started itself
            tracker.start()
        if not step:
            tracker.store_init_configuration(flat(config))
        started.append(tracker)
    return started


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, int | float | str | bool]:
    """Nested mappings and lists as one, ``terms/soft/weight``: trackers take nothing else."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple):
            value = {str(i): part for i, part in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}/")
        else:
            found[f"{above}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
