"""The objects that a checked recipe becomes: models, terms, optimizer, learning rate."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from .. import schedules, terms
from ..adapters import Renormalize
from ..config import ConfigError, one_line
from ..data import IMAGENET_MEAN, IMAGENET_STD, Augment, Data
from ..data import load as load_data
from ..data.fashion import FASHION_MEAN, FASHION_STD
from ..pairing import Pair, pair
from ..teacher import Panel
from .schema import Named, Optimizer, Recipe, Term
from .weights import trained_on
from .wording import nearest

USUAL = ("in_chans", "num_classes", "drop_rate", "drop_path_rate", "pretrained")
"""Arguments that most models of timm take; a hint for a misspelt one."""


def open_data(recipe: Recipe, device: torch.device, rank: int, world_size: int) -> Data:
    """The data of a recipe, as this process sees them.

    Raises:
        ConfigError: whatever is wrong with them, as ``data.load`` says it.
    """
    arguments = dict(recipe.data)
    try:
        if "augment" in arguments:
            arguments["augment"] = Augment(**arguments["augment"])
        return load_data(**arguments, seed=recipe.seed, device=device, rank=rank, world_size=world_size)
    except (ValueError, OSError) as error:
        raise ConfigError([f"data: {error}"]) from None


def build_model(spec: Named, data: Data, where: str) -> nn.Module:
    """The timm model that ``spec`` names, with as many classes and channels as the data have.

    On the meta device, by ``with torch.device("meta")``, nothing is downloaded.

    Raises:
        ConfigError: arguments that the model does not take, or weights that cannot be had.
    """
    arguments = {"num_classes": len(data.classes)} | spec.arguments
    if data.channels != 3:
        arguments = {"in_chans": data.channels} | arguments
    if torch.get_default_device().type == "meta":
        arguments.pop("pretrained", None)
    try:
        return timm.create_model(spec.name, **arguments)
    except Exception as error:  # hundreds of models and a download: each fails in its own way
        reason = one_line(error, 200).replace("__init__()", "")
        if word := re.search(r"unexpected keyword argument '(\w+)'", reason):
            known = [*(name for name in spec.arguments if name != word[1]), *USUAL, *type(spec).model_fields]
            raise ConfigError(
                [f"{where}.{word[1]}: {spec.name} takes no such argument{nearest(word[1], known)}"]
            ) from None
        raise ConfigError([f"{where}: {spec.name} cannot be built from {arguments}: {reason}"]) from None


def of_term(error: Exception) -> str:
    """An error of the dry run as one line that begins with the key of its term."""
    text = " ".join(str(error).split())
    found = re.match(r"term '([\w-]+)'[,:]? (.*)", text)
    return f"terms.{found[1]}: {found[2]}" if found else f"terms: {text}"


def build_terms(recipe: Recipe, student: nn.Module, panel: nn.Module, images: int) -> list[terms.Term]:
    """The terms of a recipe, their patterns turned into pairs of taps.

    Args:
        images: how many there are to train on.

    Raises:
        ConfigError: a pattern that finds nothing, groups that do not match, or a memory of another number of images.
    """
    built = []
    for name, spec in recipe.terms.items():
        loss = spec.loss.build()
        _size_memory(loss, images, f"terms.{name}.loss")
        try:
            sides = spec.compared(list(recipe.teachers))
            pairs = tuple(p for mine, theirs in sides for p in _pairs(mine, theirs, student, panel, recipe.teachers))
        except ValueError as error:
            raise ConfigError([f"terms.{name}: {error}"]) from None
        schedule = build_schedule(spec)
        built.append(
            terms.Term(
                name, loss, spec.weight, schedule, pairs, spec.view, spec.layout, spec.adapter, reduce=spec.reduce
            )
        )
    return built


def build_schedule(spec: Term) -> schedules.Schedule:
    """The factor on a term's weight: 0 before ``start`` and from ``until`` on, its slope between them."""
    window, slope = schedules.Window(spec.start, spec.until), spec.slope
    if slope is None:
        return window
    until = spec.until if slope.until is None else slope.until
    ramp = schedules.Ramp(slope.first, slope.last, spec.start, until, slope.shape)
    return schedules.Product((window, ramp))


def _size_memory(loss: nn.Module, images: int, where: str) -> None:
    """Tells losses that remember each training image how many there are.

    Raises:
        ConfigError: the recipe says another number.
    """
    for part in loss.modules():
        if "indices" in getattr(part, "against", ()):
            if (told := getattr(part, "samples", 0)) not in (0, images):
                raise ConfigError([f"{where}.samples: the data train on {images} images (got {told}); leave it out"])
            part.samples = images  # type: ignore[assignment]


def _pairs(mine: str, teacher: str, student: nn.Module, panel: nn.Module, members: Collection[str]) -> tuple[Pair, ...]:
    if mine.startswith("@") or teacher.startswith("@") or teacher in members:
        return (Pair(mine, teacher),)
    return pair(student, panel, mine, teacher)


def build_prepare(recipe: Recipe, data: Data, panel: Panel) -> dict[str, Renormalize]:
    """For each teacher whose input differs from the student's, the module that bridges normalisation and size.

    Raises:
        ConfigError: a normalisation of another number of channels than the data's.
    """
    built: dict[str, Renormalize] = {}
    for name in recipe.teachers:
        mean, std, size = expects(recipe, name, panel, data)
        if len(mean) != data.channels or len(std) != data.channels or min(std) <= 0:
            raise ConfigError(
                [
                    f"teachers.{name}.mean: mean and std need {data.channels} numbers each, std above 0 "
                    f"(got {mean}, {std})"
                ]
            )
        resize = (size, size) if size not in (None, data.image_size) else None
        if resize is not None or (mean, std) != (data.mean, data.std):
            built[name] = Renormalize(data.mean, data.std, mean, std, resize)
    return built


def expects(
    recipe: Recipe, name: str, panel: Panel, data: Data
) -> tuple[tuple[float, ...], tuple[float, ...], int | None]:
    """Mean, standard deviation and size of the images that a teacher was trained on.

    Raises:
        ConfigError: its weights are a run's whose data are not there to be measured.
    """
    spec = recipe.teachers[name]
    mean, std = data.mean, data.std
    if spec.mean is None or spec.std is None:
        config = getattr(panel[name], "pretrained_cfg", None) or {}
        if spec.weights is not None and (theirs := trained_on(spec.weights)) is not None:
            mean, std = _statistics(theirs, recipe.data, data, f"teachers.{name}")
        elif spec.foreign and len(config.get("mean", ())) == data.channels:
            mean, std = tuple(config["mean"]), tuple(config["std"])
    return spec.mean or mean, spec.std or std, spec.size


def _statistics(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], data: Data, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of the data of another run, which are opened only where they were measured on others than this one's."""
    if theirs.get("mean") is not None and theirs.get("std") is not None:
        return tuple(theirs["mean"]), tuple(theirs["std"])
    name = theirs["name"]
    if name.startswith("fashion-mnist"):
        return FASHION_MEAN, FASHION_STD
    if not name.startswith("torch/"):  # files and shards
        return IMAGENET_MEAN, IMAGENET_STD
    if ours.get("mean") is None and all(theirs.get(key) == ours.get(key) for key in ("name", "splits")):
        return data.mean, data.std
    given = {key: theirs[key] for key in ("name", "root", "splits") if theirs.get(key) is not None}
    try:
        other = load_data(**given, batch_size=1, device="meta")
    except (TypeError, ValueError, OSError) as error:
        told = f"the data of the run that made them cannot be opened ({one_line(error)})"
        raise ConfigError([f"{where}.weights: {told}; say how they are normalised by {where}.mean and std"]) from None
    return other.mean, other.std


def build_optimizer(spec: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; what is one-dimensional, a bias, or named by ``no_weight_decay`` is not decayed.

    On a GPU it is the fused one where torch has it: one kernel a group of parameters. SGD's is left out: it fails where
    a parameter gets its first gradient later than others, as what a term trains that begins later.

    Raises:
        Exception: of any kind, for an unknown name or an argument that this optimizer does not take.
    """
    extras = {name: getattr(spec, name) for name in ("betas", "eps", "momentum") if getattr(spec, name) is not None}
    given = {"opt": spec.name, "lr": spec.lr, "weight_decay": spec.weight_decay, **extras}
    optimizer = create_optimizer_v2(model, **given)
    fused = "fused" in optimizer.defaults and not isinstance(optimizer, torch.optim.SGD)
    on_gpu = all(p.is_cuda for p in model.parameters())
    return create_optimizer_v2(model, **given, fused=True) if on_gpu and fused else optimizer


def build_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """timm's cosine schedule, called with the number of the optimizer step."""
    spec = recipe.schedule
    warmup, cooldown = (int(e * steps_per_epoch) for e in (spec.warmup_epochs, spec.cooldown_epochs))
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps_per_epoch - cooldown,
        lr_min=spec.min_lr,
        warmup_t=warmup,
        warmup_lr_init=spec.warmup_lr,
        t_in_epochs=False,
        cycle_limit=1,
    )
