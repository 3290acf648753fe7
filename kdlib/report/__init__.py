"""`kdlib report`: what runs came to, as one HTML page that opens from disk and needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..config import ConfigError
from ..recipe import weights
from ..training.checkpoint import whole
from .opened import open_run
from .page import render
from .view import look

__all__ = ["report"]


def report(runs: Sequence[Path], out: Path, convert: weights.Convert | None = None) -> Path:
    """Writes the report of one run, or of several side by side, to ``out`` and returns that path.

    Every model of a run (teachers, baseline, student) goes over the run's test set once, here, on the GPU if there is
    one; nothing of a run is changed. What is missing (weights that were deleted, a run that is not finished, no
    baseline) is said on the page. The recipe's models must be registered with timm, as its ``run.py`` does on import.

    Args:
        runs: the folders of runs, as a recipe's ``output`` names them.
        out: the HTML file.
        convert: for weight files of foreign names, as for ``runs.run``.

    Raises:
        ConfigError: a folder that holds no run, a config of it that cannot be read, data that cannot be opened; no run.
        OSError: ``out`` cannot be written; what was there before is untouched.
    """
    if not runs:
        raise ConfigError(["report: no run was given; name the folder of at least one"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = [look(open_run(Path(run), device, convert), i, len(runs) == 1) for i, run in enumerate(runs)]
    page = render(views, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as draft:
        draft.write_text(page, encoding="utf-8")
    return out
