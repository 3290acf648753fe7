"""Files of weights into models, and one model's weights into another; no code in a file is ever run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import ConfigError, one_line
from ..data.by_name import NAMES
from ..data.sources import STREAMS, TIMM
from ..files import STUDENT
from ..yaml12 import YAMLError, parse
from .wording import short

ENTRIES = ("state_dict", "model_state_dict", "model", "net")
"""Under which trainings save a model's state dict beside other things; the first that is there counts."""
Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Turns a checkpoint of foreign names into the state dict of a model here; ValueError if it does not know it."""


def load_weights(
    model: nn.Module, path: Path, where: str, convert: Convert | None = None, sha256: str | None = None
) -> None:
    """Loads a file of weights into a model, strictly.

    Args:
        convert: tried where the names in the file are not the model's.
        sha256: what the file's SHA-256 must begin with.

    Raises:
        ConfigError: a file that is missing or corrupt, or whose tensors are not the model's.
    """
    if sha256 is not None and path.is_file() and not (found := digest(path)).startswith(sha256):
        raise ConfigError(
            [f"{where}: {path} is not the file that sha256 names ({found[: len(sha256)]}… there, {sha256} asked for)"]
        )
    state = read_weights(path, where)
    own = model.state_dict()
    state = _bare(state, own)
    if convert is not None and set(state) != set(own):
        try:
            state = convert(state)
        except ValueError as error:
            raise ConfigError([f"{where}: {path}: {one_line(error)}"]) from None
    lacking, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if lacking or extra:
        raise ConfigError(
            [
                f"{where}: {path} holds another model: {len(lacking)} of {len(own)} tensors are missing"
                f"{f' (first {short(lacking[0])})' if lacking else ''}, {len(extra)} are unknown"
                f"{f' (first {short(extra[0])})' if extra else ''}; choose the model that it was saved from"
            ]
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            theirs = tuple(state[name].shape)
            raise ConfigError(
                [
                    f"{where}: {path} holds another model: {name} is {theirs}, the model's is {tuple(tensor.shape)}; "
                    "choose the model that it was saved from"
                ]
            )
        if state[name].is_floating_point() and not state[name].isfinite().all():
            raise ConfigError([f"{where}: {path}: {name} holds NaN or infinity; the file is of no use"])
    model.load_state_dict(dict(state))


def read_weights(path: Path, where: str) -> Mapping[str, Tensor]:
    """The tensors of a safetensors or torch file; of a training's checkpoint, the entry that holds the weights.

    Raises:
        ConfigError: a file that is missing, corrupt, or holds more than tensors.
    """
    if not path.is_file():
        inside = path / STUDENT
        hint = f"; name the file, {inside}" if inside.is_file() else ""
        raise ConfigError([f"{where}: no file {path}{f' (it is a folder{hint})' if path.is_dir() else ''}"])
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise many kinds for a broken or unsafe file
        # torch tells first, at length, how to run the file all the same, and what is in it last
        told = str(error).rpartition("WeightsUnpickler error: ")[2].split("\n")[0]
        reason = " ".join(told.partition(". ")[0].split())[:120]
        raise ConfigError(
            [
                f"{where}: {path} is corrupt, or holds more than tensors ({type(error).__name__}: {reason}); "
                "save the state dict alone, best as safetensors"
            ]
        ) from None
    for entry in ENTRIES:
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        there = f" but {short(', '.join(map(str, state)))}" if isinstance(state, dict) else ""
        raise ConfigError([f"{where}: {path} holds no state dict (names to tensors){there}; save model.state_dict()"])
    return state


def _bare(state: Mapping[str, Tensor], own: Container[str]) -> Mapping[str, Tensor]:
    """Without what DistributedDataParallel, torch.compile or a module around the model put before each of its names."""
    bare = state
    while not any(name in own for name in bare):
        if len({name.partition(".")[0] for name in bare}) != 1 or not all("." in name for name in bare):
            return state
        bare = {name.partition(".")[2]: tensor for name, tensor in bare.items()}
    return bare


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trained_on(path: Path) -> Mapping[str, Any] | None:
    """``data`` of the run of kdlib in whose folder a file of weights lies; None where it lies in no such folder."""
    try:  # by the file's name besides: the config of what is about to run may lie beside a file from anywhere
        config = parse((path.parent / "config.yaml").read_text("utf-8")) if path.name.startswith("student") else None
    except (OSError, UnicodeDecodeError, YAMLError):
        return None
    data = config.get("data") if isinstance(config, dict) and "student" in config else None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return None
    return data if data["name"].startswith((*NAMES, *TIMM, *STREAMS)) else None


def shared(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The student's tensors that the teacher has under the same name and in the same shape."""
    theirs = teacher.state_dict()
    return [name for name, own in student.state_dict().items() if name in theirs and theirs[name].shape == own.shape]


def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copies every shared tensor of the teacher into the student, and says which; RIFormer's guideline 5."""
    copied = shared(student, teacher)
    student.load_state_dict({name: teacher.state_dict()[name] for name in copied}, strict=False)
    return copied
