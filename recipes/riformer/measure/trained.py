"""Trained models to look at: those of a run folder of recipes/riformer/run.py, or a name and a file of weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdlib import config, recipe, runs
from kdlib.data import Data
from kdlib.files import CONFIG, STUDENT
from kdlib.recipe import weights
from kdlib.training import runfolder
from recipes.riformer import gfnet, model
from recipes.riformer.convert import convert


@dataclass
class Trained:
    """A model in eval mode."""

    label: str
    net: nn.Module
    source: Path
    """The folder or file that its weights are from."""
    prepare: nn.Module = field(default_factory=nn.Identity)
    """From images as the data give them to the model's own normalisation and size."""


def read_run(folder: Path, device: torch.device) -> tuple[list[Trained], Data]:
    """The models of a finished run (the student as it started, baseline, student, teachers), and its data.

    What is not there any more, such as a teacher whose folder was deleted, is left out.

    Raises:
        ConfigError: a folder that holds no run, or one that is not finished, or damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise config.ConfigError([f"{folder}: no run is there ({CONFIG} is missing); name what run.py made"])
    said = config.read([str(file)])
    said.data["output"] = str(folder)  # it may have been moved since
    asked = recipe.load(said)
    ready = runs.get_ready(asked, Accelerator(cpu=device.type == "cpu"), convert)
    panel, init = ready.panel, asked.student.init
    there = {name for name, spec in asked.teachers.items() if name not in ready.teachers}
    for name, child in ready.teachers.items():
        if runfolder.finished(child.recipe, child.student) is not None:
            panel[name].load_state_dict(child.student.state_dict())
            there.add(name)
    found = []
    if init is None or init in there:
        start = copy.deepcopy(ready.student)
        if init is not None:
            weights.inherit(start, panel[init])
        found.append(Trained("student at its start", start, folder))
    if runfolder.finished(asked, ready.student) is None:
        raise config.ConfigError([f"{folder}: this run is not finished; start run.py on it again, and it goes on"])
    if (base := ready.baseline) is not None and runfolder.finished(base.recipe, base.student) is not None:
        found.append(Trained("baseline", base.student, base.recipe.output))
    found.append(Trained("student", ready.student, folder))
    for name in asked.teachers:
        if name in there:
            source = ready.teachers[name].recipe.output if name in ready.teachers else folder
            prepare = ready.prepare.get(name, nn.Identity())
            found.append(Trained(f"teacher {name}", panel[name], source, prepare))
    for each in found:
        each.net.to(device).eval()
        each.prepare.to(device)
    return found, ready.data


def read_weights(text: str, channels: int, device: torch.device) -> Trained:
    """The model that ``NAME=FILE`` says; as many classes as the file has. Published checkpoints are renamed to ours.

    Raises:
        ConfigError: a name that timm does not know, or a file that is not that model's.
    """
    name, _, file = text.partition("=")
    path = Path(file)
    if not timm.is_model(name):
        raise config.ConfigError(
            [f"{name}: timm knows no such model; write NAME=FILE, as riformer_s12=student.safetensors"]
        )
    state = weights.read_weights(path, name)
    classes = [value.shape[0] for key, value in state.items() if re.fullmatch(r".*\b(head|fc|classifier)\.bias", key)]
    net = timm.create_model(name, num_classes=classes[-1] if classes else 1000, in_chans=channels)
    weights.load_weights(net, path, name, _rename(net))
    return Trained(name, net.to(device).eval(), path)


def affine_scales(path: Path) -> dict[str, Tensor]:
    """The learned scales s of a RIFormer's affine mixers, (C,) each, by block: ``stages.0.blocks.1``.

    Args:
        path: a run folder, or a file of weights of any kind that ``convert`` knows.

    Raises:
        ValueError: there is no such file, or no affine mixer in it.
    """
    file = path / STUDENT if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: holds no {STUDENT}; name a finished run's folder or a file of weights")
    name = re.compile(r"(stages\.\d+\.blocks\.\d+)\.token_mixer\.affine\.weight")
    found = {at[1]: value.flatten().float() for key, value in convert(file).items() if (at := name.fullmatch(key))}
    if not found:
        raise ValueError(
            f"{path}: its model has no affine token mixer; a RIFormer in its train form has, unlike a fused one"
        )
    return found


def _rename(net: nn.Module) -> weights.Convert:
    """``convert`` where the model is one of this recipe's; timm's own names stay as they are."""

    def rename(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return convert(state) if isinstance(net, model.MetaFormer | gfnet.GFNetH) else state

    return rename
