"""The student of a finished run, taken away: written, read back, and compared with the run on its own images."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..models import Found
from .card import write_card
from .context import Context
from .formats import FORMATS

__all__ = ["FORMATS", "Exported", "export", "fuse"]

CLOSE = 1e-3
"""Largest difference of a logit, as a share of the largest logit, with which an export counts as the same model."""


@dataclass(frozen=True)
class Exported:
    """What lies in the folder."""

    folder: Path
    format: str
    fused: bool
    parameters: int
    bytes: int
    """Of the files, the card aside."""
    difference: float
    """Largest between a logit of the run's student and of what was read back from the folder."""
    agreement: float
    """Share of images on which both name the same class."""
    images: int
    """Test images on which both were compared."""
    needs: str
    """What must be installed, and imported, to load it."""


def fuse(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The model as it runs at inference, and the arguments with which timm builds that form.

    A model that can be fused has a method ``fused()``, which returns the fused copy (or itself where nothing can
    be folded), and an attribute ``fused_arguments``. Any other is returned as it is.
    """
    method = getattr(model, "fused", None)
    fused: nn.Module = method() if callable(method) else model
    return fused.eval(), dict(getattr(model, "fused_arguments", {})) if fused is not model else {}


def export(
    found: Found, to: str, folder: Path, *, fused: bool = True, batch_size: int | None = None, count: int = 256
) -> Exported:
    """Writes the model into a new folder, with a model card, and checks it.

    What was written is read back as its user would read it (onnxruntime for ONNX, timm for its folder) and must answer
    to test images as the run's student does; only then does the folder appear.

    Args:
        found: of a finished run, see ``find_model``.
        to: one of ``FORMATS``.
        folder: must not exist.
        fused: fold away what can be folded, see ``fuse``.
        batch_size: of ONNX and torch-export, fixed; by default any.
        count: test images to compare on.

    Raises:
        ConfigError: no such format, a folder that exists, no image to compare on, a model that cannot be written so, or
            one that answers differently.
    """
    if to not in FORMATS:
        raise ConfigError([f"--to: no format {to!r} (known: {', '.join(FORMATS)})"])
    if found.recipe is None or found.data is None:
        raise ConfigError([f"{found.name}: is no finished run; export takes the folder of one"])
    if folder.exists():
        raise ConfigError([f"--out: {folder} exists; delete it or choose another"])
    if batch_size is not None and batch_size < 1:
        raise ConfigError([f"--batch-size: a batch has at least one image, got {batch_size}"])
    if count < 1:
        raise ConfigError([f"--count: at least one test image is compared on, got {count}"])
    model, arguments = fuse(found.model) if fused else (found.model, {})
    images = probe_images(found, count)
    context = Context(found, model, arguments, batch_size)
    form = FORMATS[to]
    draft = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        form.write(context, draft)
        size = sum(path.stat().st_size for path in draft.rglob("*"))
        difference, agreement = compare(found.model, form.read(context, draft), images, batch_size)
        parameters = sum(p.numel() for p in model.parameters())
        is_fused = model is not found.model
        done = Exported(folder, to, is_fused, parameters, size, difference, agreement, len(images), form.needs(context))
        write_card(context, done, form.load, draft)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return done


def probe_images(found: Found, count: int) -> Tensor:
    """The first test images of a run, as its student takes them."""
    assert found.data is not None
    batches, total = [], 0
    for images, _ in found.data.test.epoch(0):
        batches.append(images)
        total += len(images)
        if total >= count:
            break
    return torch.cat(batches)[:count]


@torch.no_grad()
def compare(ours: nn.Module, theirs: Any, images: Tensor, batch_size: int | None = None) -> tuple[float, float]:
    """Largest difference of a logit, and the share of images with the same answer.

    Raises:
        ConfigError: they answer differently beyond rounding, see ``CLOSE``, or not with one score a class.
    """
    step = batch_size or 32
    images = images[: len(images) // step * step] if batch_size and len(images) >= step else images
    if batch_size and len(images) < step:
        images = images.repeat(step // len(images) + 1, 1, 1, 1)[:step]
    wanted = torch.cat([ours(part) for part in images.split(step)])
    given = torch.cat([theirs(part) for part in images.split(step)])
    difference = float((wanted - given).abs().max())
    if not difference <= CLOSE * float(wanted.abs().max()):  # a NaN is a difference too
        raise ConfigError(
            [f"what was written answers differently: a logit by {difference:.1e}; nothing was kept, please report it"]
        )
    return difference, float((wanted.argmax(1) == given.argmax(1)).float().mean())
