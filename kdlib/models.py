"""From what a person calls a model to the model: a timm name, a finished run, or a function that makes one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .config import ConfigError, Document, one_line, read_file
from .data import IMAGENET_MEAN, IMAGENET_STD, Data
from .files import CONFIG, STUDENT
from .recipe import Recipe, build, load
from .recipe.weights import load_weights, read_weights
from .recipe.wording import nearest
from .training import runfolder
from .yaml12 import YAMLError, parse

IMPORT_HINT = "; models of a recipe, and your own, need --import of what registers them: --import recipes.riformer.run"
REMOTE = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class Found:
    """A model in eval mode, and the images that it takes."""

    name: str
    model: nn.Module
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    mean: tuple[float, ...]
    """Of each channel, white being 1; subtracted from images."""
    std: tuple[float, ...]
    recipe: Recipe | None = None
    """Of a run: what made it."""
    data: Data | None = None
    """Of a run: its data."""
    folder: Path | None = None
    """Of a run: where it lies."""
    trained: bool | None = None
    """Whether it has weights of any training; None where nobody can tell."""

    def noise(self, count: int) -> Tensor:
        """``(count, C, H, W)``, the same every time."""
        return torch.randn((count, *self.shape), generator=torch.Generator().manual_seed(0))

    def prepared(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` on which white is 1, as this model takes them: its channels, its normalisation."""
        channels = self.shape[0]
        if images.shape[1] != channels:
            images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def find_model(text: str, image_size: int | None = None) -> Found:
    """The model that ``text`` names.

    Args:
        text: a timm name, a mapping with its arguments (``{name: resnet18, pretrained: true}``), the folder of a
            finished run or a weight file in it, a folder that timm loads (``kdlib export --to timm``), or
            ``module:function``, which is called without arguments; the module is imported, so this is for what a
            person types, never for what a file says.
        image_size: side of the images; by default what the run or the model says, else 224.

    Raises:
        ConfigError: there is no such model, or it cannot be built or take these images.
    """
    path = Path(text).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not (path / CONFIG).exists():
        found = _described(text, _of_timm({"name": f"local-dir:{path}", "pretrained": True}), True)  # an export
    elif text.strip() and path.exists():
        found = _of_run(path)
    elif ":" in text and not text.startswith((*REMOTE, "{")):
        found = _described(text, _of_function(text))
    else:
        spec = _mapping(text)
        found = _described(str(spec["name"]), _of_timm(spec), bool(spec.get("pretrained")))
    if image_size is not None:
        found = Found(**vars(found) | {"shape": (found.shape[0], image_size, image_size)})
    found.model.eval()
    with torch.no_grad():
        try:
            found.model(found.noise(1))
        except Exception as error:  # hundreds of models: each fails in its own way
            shape = "×".join(map(str, found.shape))
            raise ConfigError(
                [f"{found.name}: cannot take images of {shape} ({one_line(error, 200)}); give --image-size or img_size"]
            ) from error
    return found


def _mapping(text: str) -> dict[str, Any]:
    if not text.startswith("{"):
        return {"name": text}
    try:
        spec = parse(text)
    except YAMLError as error:
        raise ConfigError([f"{text}: {error}"]) from None
    if not isinstance(spec, dict) or "name" not in spec:
        raise ConfigError([f"{text}: a mapping for a model has a name and arguments, as in {{name: resnet18}}"])
    return spec


def _of_timm(spec: dict[str, Any]) -> nn.Module:
    name = str(spec["name"])
    if not name.startswith(REMOTE) and "/" in name:
        raise ConfigError([f"{name}: no such folder or file; name a finished run, or a timm model"])
    if not name.startswith(REMOTE) and not timm.is_model(name):
        raise ConfigError(
            [f"{name}: no timm model, no file and no folder{nearest(name, timm.list_models())}{IMPORT_HINT}"]
        )
    try:
        return timm.create_model(**{"model_name" if key == "name" else key: value for key, value in spec.items()})
    except Exception as error:  # as above
        raise ConfigError([f"{name}: cannot be built ({one_line(error, 200)})"]) from error


def _of_function(text: str) -> nn.Module:
    module, _, function = text.partition(":")
    try:
        made = getattr(import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            [f"{text}: cannot be called ({one_line(error, 200)}); write module:function, as Python imports it"]
        ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError([f"{text}: returned {type(made).__name__}, not a model (torch.nn.Module)"])
    return made


def _described(name: str, model: nn.Module, trained: bool | None = None) -> Found:
    """A model with what its ``pretrained_cfg`` says of images; ImageNet's where it says nothing."""
    told = getattr(model, "pretrained_cfg", None) or {}
    shape = tuple(told.get("input_size") or (3, 224, 224))
    channels = next((p.shape[1] for p in model.parameters() if p.ndim == 4), shape[0])
    channels = getattr(model, "in_chans", channels if channels in (1, 3) else shape[0])
    mean, std = told.get("mean", IMAGENET_MEAN), told.get("std", IMAGENET_STD)
    if len(mean) != channels:
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or shape[1:]
    return Found(name, model, (channels, size[0], size[1]), tuple(mean), tuple(std), trained=trained)


def _of_run(path: Path) -> Found:
    folder = path if path.is_dir() else path.parent
    file = folder / STUDENT if path.is_dir() else path
    if not (folder / CONFIG).is_file():
        raise ConfigError([f"{path}: no run ({folder / CONFIG} is missing); name the folder of a finished run"])
    if not file.is_file():
        raise ConfigError([f"{path}: the run is not finished ({file.name} is missing); finish it first"])
    document = Document()
    document.overlay(*read_file(folder / CONFIG))
    try:
        recipe = load(document)
    except ConfigError as error:
        raise ConfigError(f"{line}{IMPORT_HINT if ': no model ' in line else ''}" for line in error.lines) from None
    data = runfolder.open_data(recipe, folder, torch.device("cpu"))
    model = build.build_model(recipe.student, data, "student")
    fused = getattr(model, "fused", None)
    if callable(fused) and set(read_weights(file, str(file))) != set(model.state_dict()):
        model = fused()
    load_weights(model, file, "weights")
    shape = (data.channels, data.image_size, data.image_size)
    return Found(f"{recipe.student.name} of {path}", model, shape, data.mean, data.std, recipe, data, folder, True)
