"""The objects that a checked recipe becomes: models, terms, optimizer, learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from .. import schedules, terms
from ..adapters import Renormalize
from ..config import ConfigError
from ..data import Augment, Data
from ..data import load as load_data
from ..distiller import Panel
from ..losses import LOSSES
from ..pairing import Pair, pair
from .schema import Named, Recipe, Student, Teacher, Term

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Turns a checkpoint of foreign names into the state dict of a model here; ValueError if it does not know it."""


def open_data(recipe: Recipe, device: torch.device, rank: int, world_size: int) -> Data:
    """The data of a recipe, as this process sees them.

    Raises:
        ConfigError: whatever is wrong with them, as ``data.load`` says it.
    """
    arguments = dict(recipe.data)
    try:
        if "augment" in arguments:
            arguments["augment"] = Augment(**arguments["augment"])
        return load_data(
            **arguments,
            seed=recipe.seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    except (ValueError, OSError) as error:
        raise ConfigError([f"data: {error}"]) from None


def build_model(spec: Named, data: Data, where: str) -> nn.Module:
    """The timm model that ``spec`` names, with as many classes and channels as the data have.

    Raises:
        ConfigError: an unknown name (with the nearest right ones), or arguments that the model does not take.
    """
    known = timm.list_models()
    if spec.name not in known and not spec.name.startswith(("hf-hub:", "local-dir:")):
        near = get_close_matches(spec.name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ConfigError([f"{where}.name: no model {spec.name!r}{hint}"])
    arguments = {"num_classes": len(data.classes)} | spec.arguments
    if data.channels != 3:
        arguments = {"in_chans": data.channels} | arguments
    try:
        return timm.create_model(spec.name, **arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).split("\n")[0].replace("__init__()", spec.name)
        raise ConfigError([f"{where}: {spec.name} cannot be built from {arguments}: {reason}"]) from None


def load_weights(model: nn.Module, path: Path, where: str, convert: Convert | None = None) -> None:
    """Loads a file of weights into a model, strictly; no code in it is ever run.

    Args:
        convert: tried where the names in the file are not the model's.

    Raises:
        ConfigError: a file that is missing or corrupt, or whose tensors are not the model's.
    """
    state = read_weights(path, where)
    own = model.state_dict()
    if convert is not None and set(state) != set(own):
        try:
            state = convert(state)
        except ValueError as error:
            raise ConfigError([f"{where}: {path}: {error}"]) from None
    lacking, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if lacking or extra:
        raise ConfigError(
            [
                f"{where}: {path} holds another model: {len(lacking)} of {len(own)} tensors are missing"
                f"{f' (first {lacking[0]})' if lacking else ''}, {len(extra)} are unknown"
                f"{f' (first {extra[0]})' if extra else ''}; choose the model that it was saved from"
            ]
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ConfigError(
                [f"{where}: {path}: {name} is {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}"]
            )
    model.load_state_dict(dict(state))


def read_weights(path: Path, where: str) -> Mapping[str, Tensor]:
    """The tensors of a safetensors or torch file, outermost ``state_dict`` or ``model`` wrapper removed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError([f"{where}: no file {path}"]) from None
    except (SafetensorError, OSError) as error:
        raise ConfigError([f"{where}: {path} is corrupt or no weight file: {error}"]) from None
    except Exception as error:  # torch.load raises many kinds for a broken or unsafe file
        reason = str(error).split("\n")[0][:150]
        raise ConfigError([f"{where}: {path} is corrupt, or no plain file of tensors: {reason}"]) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError([f"{where}: {path} holds no state dict (names to tensors)"])
    return state


def inherit(student: nn.Module, teacher: nn.Module) -> tuple[list[str], list[str]]:
    """Copies every tensor of the teacher whose name and shape the student has; RIFormer's guideline 5.

    Returns:
        The names that were copied, and those of the student that were not.
    """
    theirs, own = teacher.state_dict(), student.state_dict()
    copied = [name for name, tensor in own.items() if name in theirs and theirs[name].shape == tensor.shape]
    student.load_state_dict({name: theirs[name] for name in copied}, strict=False)
    return copied, [name for name in own if name not in copied]


def build_terms(recipe: Recipe, student: nn.Module, panel: nn.Module) -> list[terms.Term]:
    """The terms of a recipe, their patterns turned into pairs of taps.

    Raises:
        ConfigError: a pattern that finds nothing, or groups that do not match.
    """
    built = []
    for name, spec in recipe.terms.items():
        loss = LOSSES[spec.loss.name](**spec.loss.arguments)
        try:
            pairs = _pairs(spec, loss, student, panel, list(recipe.teachers))
        except ValueError as error:
            raise ConfigError([f"terms.{name}: {error}"]) from None
        schedule: schedules.Schedule = schedules.Window(spec.start, spec.until)
        if spec.slope is not None:
            slope = spec.slope
            schedule = schedules.Ramp(slope.first, slope.last, spec.start, spec.until, slope.shape)
        built.append(
            terms.Term(
                name, loss, spec.weight, schedule, pairs, spec.view, spec.layout, spec.adapter, reduce=spec.reduce
            )
        )
    return built


def _pairs(spec: Term, loss: nn.Module, student: nn.Module, panel: nn.Module, members: list[str]) -> tuple[Pair, ...]:
    teacher = spec.teacher
    if teacher is None:
        if "teacher" not in getattr(loss, "against", ("teacher",)):
            teacher = "@labels"
        else:
            teacher = members[0] + (f".{spec.student}" if spec.student and not spec.student.startswith("@") else "")
    mine = spec.student or "@output"
    if mine.startswith("@") or teacher.startswith("@") or teacher in members:
        return (Pair(mine, teacher),)
    return pair(student, panel, mine, teacher)


def build_prepare(recipe: Recipe, data: Data, panel: Panel) -> dict[str, nn.Module]:
    """For each teacher whose input differs from the student's, the module that bridges normalisation and size."""
    built: dict[str, nn.Module] = {}
    for name, spec in recipe.teachers.items():
        mean, std, size = _expects(spec, panel[name], data)
        resize = (size, size) if size not in (None, data.image_size) else None
        if resize is not None or (mean, std) != (data.mean, data.std):
            built[name] = Renormalize(data.mean, data.std, mean, std, resize)
    return built


def _expects(spec: Teacher, model: nn.Module, data: Data) -> tuple[tuple[float, ...], tuple[float, ...], int | None]:
    """Mean, standard deviation and size of the images that a teacher was trained on."""
    config = getattr(model, "pretrained_cfg", None) or {}
    own = is_foreign(spec) and len(config.get("mean", ())) == data.channels
    mean = spec.mean or (tuple(config["mean"]) if own else data.mean)
    std = spec.std or (tuple(config["std"]) if own else data.std)
    return mean, std, spec.size


def build_optimizer(recipe: Recipe, distiller: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; what is one-dimensional, a bias, or named by ``no_weight_decay`` is not decayed."""
    spec = recipe.optimizer
    extras = {name: getattr(spec, name) for name in ("betas", "eps", "momentum") if getattr(spec, name) is not None}
    try:
        return create_optimizer_v2(distiller, opt=spec.name, lr=spec.lr, weight_decay=spec.weight_decay, **extras)
    except (AssertionError, ValueError, TypeError) as error:
        near = get_close_matches(spec.name, list_optimizers(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] != spec.name else ""
        raise ConfigError([f"optimizer: {spec.name!r} cannot be built: {error}{hint}"]) from None


def build_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """timm's cosine schedule, called with the number of the optimizer step.

    Raises:
        ConfigError: warm-up and cool-down fill the whole run.
    """
    spec = recipe.schedule
    warmup, cooldown = (round(e * steps_per_epoch) for e in (spec.warmup_epochs, spec.cooldown_epochs))
    total = recipe.epochs * steps_per_epoch
    if warmup + cooldown >= total:
        raise ConfigError(
            [
                f"schedule: warmup_epochs {spec.warmup_epochs:g} and cooldown_epochs {spec.cooldown_epochs:g} "
                f"leave nothing of {recipe.epochs} epochs; shorten them or train longer"
            ]
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=total - cooldown,
        lr_min=spec.min_lr,
        warmup_t=warmup,
        warmup_lr_init=spec.warmup_lr,
        t_in_epochs=False,
        cycle_limit=1,
    )


def is_foreign(spec: Student | Teacher) -> bool:
    """Whether a model comes with weights of its own."""
    return spec.weights is not None or bool(spec.arguments.get("pretrained"))
