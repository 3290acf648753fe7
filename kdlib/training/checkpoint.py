"""What a run leaves on disk, and how it is read back.

A checkpoint is a folder ``step-00000390/`` with ``state.safetensors`` (every tensor), ``state.json`` (the rest) and
``manifest.json`` (size and SHA-256 of both). It is written under another name, synced, and moved into place whole, so
it exists completely or not at all; only then is an older one deleted, and two are kept. Reading never runs code:
tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import faults

KEEP = 2
TENSOR = "@tensor"
"""Marks the place of a tensor in the JSON tree."""
INTEGERS = "@integers"
"""Marks a mapping whose keys are integers, which JSON turns into text."""
TENSORS, TREE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = KEEP) -> Path:
    """Writes the checkpoint of ``step`` and deletes all but the ``keep`` newest, and later ones, which the run went
    back from.

    Args:
        state: a tree of mappings and lists whose leaves are tensors or what JSON can say. Tuples come back as lists.

    Raises:
        OSError: the disk is full or the folder read-only; older checkpoints are untouched, and no draft stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    target, draft = folder / f"step-{step:08d}", folder / f".tmp-{step}-{os.getpid()}"
    try:
        draft.mkdir()
        faults.reach("save.begin")
        tensors: dict[str, Tensor] = {}
        tree = _split(state, "", tensors)
        _save_file(tensors, draft / TENSORS)
        faults.reach("save.tensors")
        (draft / TREE).write_text(json.dumps(tree))
        faults.reach("save.tree")
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
        faults.reach("save.manifest")
        for file in [*draft.iterdir(), draft]:
            _sync(file)
        faults.reach("save.synced")
        if target.exists():  # a damaged one, or the same step before it was evaluated
            shutil.rmtree(target)
            faults.reach("save.replaced")
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _sync(folder)
    faults.reach("save.moved")
    later = [path for path in _steps(folder) if _step(path) > step]
    earlier = [path for path in _steps(folder) if _step(path) <= step]
    for old in [*later, *earlier[keep:]]:
        shutil.rmtree(old, ignore_errors=True)
    faults.reach("save.pruned")
    return target


def load_latest(folder: Path) -> tuple[int, dict[str, Any], list[str]] | None:
    """``(step, state, notes)`` of the newest checkpoint that is whole, or None where there is none at all.

    ``notes`` has a line for each newer one that was damaged and passed over.

    Raises:
        ValueError: there are checkpoints and every one is damaged; says what is wrong with each.
    """
    notes: list[str] = []
    for path in _steps(folder):
        try:
            return _step(path), load(folder, _step(path)), notes
        except Exception as error:  # what damage can do is not to be listed; it is told, and an older one is tried
            reason = f"{getattr(error, 'strerror', None) or error}" or type(error).__name__
            notes.append(f"checkpoint {path.name} is damaged and was passed over: {reason}")
    if notes:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(notes)}; delete the folder to start anew")
    return None


def load(folder: Path, step: int) -> dict[str, Any]:
    """The state that was saved at ``step``.

    Raises:
        Exception: of any kind, where it is missing or not what was written.
    """
    path = folder / f"step-{step:08d}"
    manifest = json.loads((path / MANIFEST).read_text())
    if manifest["step"] != _step(path):
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}")
    for name in (TENSORS, TREE):
        told, file = manifest["files"][name], path / name
        if not file.exists():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != told["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {told['bytes']} were written")
        if _digest(file) != told["sha256"]:
            raise ValueError(f"{name} is not what was written (SHA-256 differs)")
    state: dict[str, Any] = _join(json.loads((path / TREE).read_text()), load_file(path / TENSORS))
    return state


def save_weights(model: nn.Module | Mapping[str, Tensor], path: Path) -> None:
    """A model's state dict as safetensors, moved into place whole.

    Raises:
        OSError: it cannot be written; what was there before is untouched, and no draft stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict() if isinstance(model, nn.Module) else model
    with whole(path) as draft:
        _save_file({name: _plain(tensor) for name, tensor in weights.items()}, draft)


def write_json(path: Path, value: Any) -> None:
    """JSON, moved into place whole.

    Raises:
        OSError: as ``save_weights``.
    """
    with whole(path) as draft:
        draft.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` to write to; it takes the path's place once it is complete, or is removed."""
    draft = path.with_name(f".tmp-{path.name}")
    try:
        yield draft
        faults.reach("file.draft")
        _sync(draft)
        faults.reach("file.synced")
        draft.replace(path)
        faults.reach("file.moved")
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with its tensors taken out into ``tensors``, by path."""
    if isinstance(tree, Tensor):
        while path in tensors:  # {"a/b": …, "a": {"b": …}}
            path += "'"
        tensors[path] = _plain(tree)
        return {TENSOR: path}
    if isinstance(tree, Mapping):
        kinds = {type(key) for key in tree}
        assert kinds <= {str} or kinds == {int}, f"{path}: the keys of a mapping are all text or all integers"
        assert TENSOR not in tree and INTEGERS not in tree, f"{path}: {TENSOR} and {INTEGERS} are no keys"
        inner = {str(key): _split(value, f"{path}/{key}", tensors) for key, value in tree.items()}
        return {INTEGERS: inner} if kinds == {int} else inner
    if isinstance(tree, list | tuple):
        return [_split(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    assert tree is None or isinstance(tree, bool | int | float | str), f"{path}: JSON has no {type(tree).__name__}"
    return tree


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``_split`` took apart."""
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if TENSOR in tree:
        return tensors[tree[TENSOR]]
    if INTEGERS in tree:
        return {int(key): _join(value, tensors) for key, value in tree[INTEGERS].items()}
    return {key: _join(value, tensors) for key, value in tree.items()}


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, sharing memory with no other."""
    return tensor.detach().cpu().contiguous().clone()


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path.parent}: cannot be written ({error}); free some space and start again") from None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)), key=_step, reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows neither opens folders nor syncs what is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
