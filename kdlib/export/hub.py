"""The folder that timm loads as ``local-dir:…`` and, once it lies on the Hugging Face hub, as ``hf-hub:…``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from ..config import ConfigError, one_line
from ..data import CROP_PCT, INTERPOLATION
from ..data.from_memory import ArrayLoader
from ..models import Found
from .context import Context, Model

OF_ARCHITECTURE = ("first_conv", "classifier", "fixed_input_size")
"""All that is kept of timm's word on an architecture; licence, papers and image sizes are those of other weights."""


def home(name: str) -> str | None:
    """The module that must be imported before timm knows the architecture; None for timm's own."""
    place = str(timm.models.model_entrypoint(name).__module__)
    return None if place.startswith("timm.") else place


def build_args(found: Found, extra: dict[str, Any]) -> dict[str, Any]:
    """What ``timm.create_model`` takes beside the name: the recipe's arguments, classes and channels of the data."""
    assert found.recipe is not None and found.data is not None
    given = found.recipe.student.arguments.items()
    own = {key: value for key, value in given if key != "pretrained" and value is not None}  # timm drops None, too
    channels = {} if found.data.channels == 3 else {"in_chans": found.data.channels}
    return {"num_classes": len(found.data.classes), **channels, **own, **extra}


def write_folder(context: Context, folder: Path) -> None:
    """``config.json`` (architecture, arguments, how images are prepared, class names), ``model.safetensors``."""
    found, model = context.found, copy.deepcopy(context.model)
    assert found.data is not None
    model = model.to(memory_format=torch.contiguous_format)
    named = {"architecture": context.name, "first_conv": None, "classifier": None}
    given: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    kept = {key: given[key] for key in OF_ARCHITECTURE if key in given}
    # plain attributes, not submodules; timm tells the last two, which a model of one's own need not have
    told = {"pretrained_cfg": named | kept | prepared(found), "num_classes": len(found.data.classes)}
    for name, value in (told | {"num_features": getattr(model, "num_features", None)}).items():
        setattr(model, name, value)
    save_for_hf(
        model,
        str(folder),
        model_config={"label_names": list(found.data.classes)},
        model_args=build_args(found, context.arguments),
        safe_serialization=True,
    )


def prepared(found: Found) -> dict[str, Any]:
    """How the run's test images were prepared, in timm's words: images in memory are resized, never cropped."""
    assert found.recipe is not None and found.data is not None
    told = {"crop_pct": 1.0} if isinstance(found.data.test, ArrayLoader) else found.recipe.data
    return {
        "mean": found.mean,
        "std": found.std,
        "input_size": found.shape,
        "num_classes": len(found.data.classes),
        "crop_pct": told.get("crop_pct", CROP_PCT),
        "crop_mode": "center",
        "interpolation": told.get("interpolation", INTERPOLATION),
    }


def read_folder(context: Context, folder: Path) -> Model:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads an exported folder to the Hugging Face hub and returns where it lies. Nothing else here uses a network.

    Raises:
        ConfigError: the hub refuses: no token, no right, no such owner, no network.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="kdlib")
    try:
        where = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=str(folder), commit_message="Student distilled with kdlib")
    except Exception as error:  # a dozen kinds from three libraries
        reason = one_line(error, 200)
        raise ConfigError([f"--push {repository}: refused ({reason}); `hf auth login` sets a token"]) from error
    return str(where)
