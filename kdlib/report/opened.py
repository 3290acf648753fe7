"""The folder of a run, read back: its models with their weights, its data, its numbers; what is missing, and why."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from ..config import ConfigError, one_line, read
from ..data import Data
from ..data.samplers import seeded
from ..files import CHECKPOINTS, CONFIG, METRICS, STUDENT
from ..recipe import Recipe, build, load, load_children, weights
from ..recipe.schema import Named
from ..teacher import Panel
from ..training import checkpoint, runfolder


@dataclass
class Member:
    """One model of a run."""

    what: str
    """``student``, ``baseline`` or ``teacher NAME``."""
    name: str
    net: nn.Module | None = None
    """With its trained weights, in eval mode; None where they could not be had."""
    missing: str = ""
    """Why there is no ``net``, in a line."""
    folder: Path | None = None
    """Where it was trained; None for weights from elsewhere."""
    prepare: nn.Module | None = None
    """Turns the student's images into its own."""
    note: str = ""
    """What is unusual about it."""


@dataclass
class Opened:
    """A run as its folder holds it."""

    name: str
    folder: Path
    recipe: Recipe
    data: Data
    student: Member
    teachers: dict[str, Member]
    baseline: Member | None
    initial: nn.Module | None
    """The student before its first step; None where it cannot be made again."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the run itself wrote down; empty for a run that is not finished."""

    @property
    def members(self) -> list[Member]:
        """Teachers, baseline, student: the rows of the outcome table."""
        return [*self.teachers.values(), *([self.baseline] if self.baseline else []), self.student]


def open_run(folder: Path, device: torch.device, convert: weights.Convert | None = None) -> Opened:
    """Reads a run back. A model whose weights are gone is told as missing; all else goes on.

    Args:
        convert: as for ``runs.run``, for teachers from foreign files.

    Raises:
        ConfigError: the folder holds no run, its config or summary cannot be read, or its data cannot be opened.
    """
    file = folder / CONFIG
    if not file.is_file():
        what = (
            f"{file} is missing"
            if folder.is_dir()
            else "it is a file"
            if folder.exists()
            else "there is no such folder"
        )
        raise ConfigError([f"{folder}: no run ({what}); name the folder of a run, a recipe's output=…"])
    try:
        recipe = load(read([str(file)])).model_copy(update={"output": folder})
    except ConfigError as error:
        if unknown := [line for line in error.lines if ": no model " in line]:
            hint = "import the recipe, or your own module, that registers it (kdlib report … --import recipes.NAME.run)"
            raise ConfigError([f"{unknown[0].partition(';')[0]}; {hint}"]) from None
        raise
    data = runfolder.open_data(recipe, folder, device)
    children = {at[:2]: runfolder.beside(child, recipe).output for at, child in load_children(recipe).items()}
    with seeded("report"):  # building models draws numbers; a caller's generators stay as they were
        teachers = {
            name: _member(f"teacher {name}", spec, data, children.get(("teachers", name)), convert)
            for name, spec in recipe.teachers.items()
        }
        baseline = None
        if recipe.baseline is not None:
            baseline = _member("baseline", recipe.student, data, children[("baseline",)])
        initial = _initial(recipe, data, teachers, convert)
        student = _member("student", recipe.student, data, folder)
    _prepare(recipe, data, teachers)
    opened = Opened(
        _name(folder), folder, recipe, data, student, teachers, baseline, initial, runfolder.summary(folder) or {}
    )
    for member in opened.members:
        for module in (member.net, member.prepare):
            if module is not None:
                module.to(device).eval()
    if initial is not None:
        initial.to(device).eval()
    return opened


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _member(what: str, spec: Named, data: Data, folder: Path | None, convert: weights.Convert | None = None) -> Member:
    """One model with its trained weights: those of its own run in ``folder``, or those that its spec names."""
    member = Member(what, spec.name, folder=folder)
    try:
        net = build.build_model(spec, data, what)
        if folder is not None:
            member.note = _restore(net, folder, what)
        elif (file := getattr(spec, "weights", None)) is not None:
            weights.load_weights(net, file, what, convert)
        member.net = net
    except (ConfigError, OSError, ValueError) as error:
        member.missing = one_line(error)
    return member


def _restore(net: nn.Module, folder: Path, what: str) -> str:
    """Loads what a run trained into ``net``; says so where that is a checkpoint and not the end."""
    file = folder / STUDENT
    if file.exists():
        weights.load_weights(net, file, what)
        return ""
    found = checkpoint.load_latest(folder / CHECKPOINTS)
    if found is None:
        raise ConfigError([f"neither {STUDENT} nor a checkpoint is in {folder.name}/"])
    _, state, _ = found
    own = {key.removeprefix("student."): v for key, v in state["distiller"].items() if key.startswith("student.")}
    try:
        net.load_state_dict(own)
    except RuntimeError as error:
        raise ConfigError([f"{folder.name}/checkpoints hold another model ({str(error).splitlines()[0]})"]) from None
    place = state["place"]
    within = f", batch {place['batch']}" if place["batch"] else ""
    return f"from the checkpoint after epoch {place['epoch']}{within}"


def _initial(
    recipe: Recipe, data: Data, teachers: dict[str, Member], convert: weights.Convert | None
) -> nn.Module | None:
    """The student as ``ready.get_ready`` builds it, before training; None if what it started from is gone."""
    set_seed(recipe.seed)
    try:
        net = build.build_model(recipe.student, data, "student")
        if recipe.student.weights is not None:
            weights.load_weights(net, recipe.student.weights, "student.weights", convert)
    except ConfigError:
        return None
    if recipe.student.init is not None:
        source = teachers[recipe.student.init].net
        if source is None:
            return None
        weights.inherit(net, source)
    return net


def _prepare(recipe: Recipe, data: Data, teachers: dict[str, Member]) -> None:
    """Gives each teacher that is there the module that bridges its input; one whose input is not known is set aside."""
    there = {name: member.net for name, member in teachers.items() if member.net is not None}
    for name, net in there.items():
        only = recipe.model_copy(update={"teachers": {name: recipe.teachers[name]}})
        try:
            teachers[name].prepare = build.build_prepare(only, data, Panel({name: net})).get(name)
        except ConfigError as error:
            teachers[name].net, teachers[name].missing = None, "; ".join(error.lines)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that end an epoch, in order; none where there is no such file."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in found if "weights" in line]


def panel(opened: Opened) -> Panel | None:
    """Copies of all teachers as one, or None where one is missing."""
    nets = {name: member.net for name, member in opened.teachers.items()}
    if any(net is None for net in nets.values()):
        return None
    return Panel({name: copy.deepcopy(net) for name, net in nets.items() if net is not None})
