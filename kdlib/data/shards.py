"""Data sets in shards, which are read from their first image to their last: tar files as webdataset writes them.

The layout is timm's: a folder or an http(s) address with `_info.json`, which names the shards of each split and tells
how many images each holds. The reading is ours, since timm's readers pass over broken images and repeat shards where a
process has too few; it needs no package. Nothing is unpacked, and no name in `_info.json` leads out of its folder.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from ..config import one_line
from .sources import _some, rgb

INFO, ENDINGS, SECONDS = "_info.json", (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp"), 60
WEB = ("http://", "https://")


class Shards(ABC):
    """Images in shards. An image's number counts through the shards in the order of `lengths`."""

    def __init__(self, names: Sequence[str], lengths: Sequence[int], classes: tuple[str, ...]) -> None:
        self.names, self.lengths, self.classes = tuple(names), tuple(lengths), classes
        self.ends = np.array(list(accumulate(self.lengths)), np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def where(self, index: int) -> str:
        """How an error message names an image."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return f"{self.names[shard]}, image {index - int(self.ends[shard]) + self.lengths[shard]}"

    def label(self, value: Any) -> int:
        """A class's number.

        Raises:
            ValueError: it is none.
        """
        if not 0 <= int(value) < len(self.classes):
            raise ValueError(f"label {int(value)}, but the classes are 0 to {len(self.classes) - 1}")
        return int(value)

    @abstractmethod
    def samples(self, shard: int, first: int, last: int) -> Iterator[Any]:
        """The images `first` to `last` (excluded) of a shard, as they are stored.

        Raises:
            Exception: of any kind, for a shard that is missing, broken, or of another length than told.
        """

    @abstractmethod
    def read(self, sample: Any) -> tuple[Any, int]:
        """One of `samples` as an image (PIL, RGB) and its label; any exception means that it cannot be read."""


class TarShards(Shards):
    """One split: tar files in which `name.jpg` (or .jpeg, .png, .webp, …) stands beside `name.cls`, an ASCII number."""

    def __init__(self, root: str, files: Sequence[str], lengths: Sequence[int], classes: tuple[str, ...]) -> None:
        super().__init__([f"{root.rstrip('/')}/{file}" for file in files], lengths, classes)

    def samples(self, shard: int, first: int, last: int) -> Iterator[dict[str, bytes]]:
        """See `Shards.samples`: file endings to contents."""
        name, told, found = self.names[shard], self.lengths[shard], 0
        with _opened(name) as file, tarfile.open(fileobj=file, mode="r:*" if file.seekable() else "r|*") as tar:
            for sample in grouped(tar, first):
                if found == told:
                    raise ValueError(f"{name} holds more than the {told} images that {INFO} tells")
                if found >= first:
                    yield sample
                found += 1
                if found == last < told:
                    return
        if found < told:
            raise ValueError(f"{name} ends after {found} of the {told} images that {INFO} tells")

    def read(self, sample: dict[str, bytes]) -> tuple[Any, int]:
        """See `Shards.read`."""
        image = next((sample[ending] for ending in ENDINGS if ending in sample), None)
        if image is None or ".cls" not in sample:
            raise ValueError(f"holds {', '.join(sorted(sample))}; expected an image ({', '.join(ENDINGS)}) and .cls")
        return rgb(io.BytesIO(image)), self.label(sample[".cls"])


def grouped(tar: tarfile.TarFile, first: int = 0) -> Iterator[dict[str, bytes]]:
    """The samples of a tar: files in a row whose names agree up to the first dot; ending to content.

    The contents of those before the `first` are not read, and empty.
    """
    key, count, group = "", 0, dict[str, bytes]()
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or the names of the whole shard are kept
        folder, _, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not member.isfile() or not dot or not stem or stem.startswith("__"):
            continue
        if group and f"{folder}/{stem}" != key:
            yield group
            group, count = {}, count + 1
        key = f"{folder}/{stem}"
        group[f".{ending.lower()}"] = _content(tar, member) if count >= first else b""
    if group:
        yield group


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return content


def _opened(name: str) -> BinaryIO:
    """A file, or what an http(s) address gives: never a command, as webdataset's own opener would run."""
    if name.startswith(WEB):
        from urllib.request import urlopen

        return urlopen(name, timeout=SECONDS)
    return open(name, "rb")


def tar_shards(
    name: str, root: str | Path | None, splits: tuple[str, str], classes: int | None
) -> tuple[TarShards, TarShards]:
    """Training and test images of `root/_info.json`.

    Args:
        classes: how many there are, where the file has no list `classes`.

    Raises:
        ValueError, FileNotFoundError: no such file, or one that does not say what is needed; a shard that is not there.
    """
    if root is None:
        raise ValueError(f"data set {name!r} needs root=, a folder or an http(s) address with {INFO} and its tar files")
    place = str(root)
    if "://" in place and not place.startswith(WEB):
        raise ValueError(f"root: got {place}; expected a folder (mount what is elsewhere), or an http(s) address")
    info = _info(place)
    given = info.get("classes")
    names = tuple(map(str, given)) if isinstance(given, list) else tuple(map(str, range(classes or 0)))
    if classes is not None and len(names) != classes:
        raise ValueError(f"classes: got {classes}, but {place}/{INFO} names {len(names)}; leave it out")
    if len(names) < 2:
        raise ValueError(f"{place}/{INFO}: names no classes; add a list 'classes' to it, or say classes=1000")
    told = info.get("splits")
    known = told if isinstance(told, dict) else {}
    train, test = (TarShards(place, *_split(place, split, known), names) for split in splits)
    if both := set(train.names) & set(test.names):
        raise ValueError(f"{min(both)}: is in both splits; the images that are trained on cannot be the test")
    return train, test


def _info(place: str) -> dict[str, Any]:
    where = f"{place}/{INFO}"
    try:
        with _opened(where) as file:
            info = json.loads(file.read())
    except OSError as error:
        raise FileNotFoundError(
            f"{where}: cannot be read ({one_line(error, 200)}); it must list the shards; kdlib shards writes it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: is no JSON ({one_line(error, 200)}); kdlib shards writes it anew") from None
    if not isinstance(info, dict):
        raise ValueError(f"{where}: holds no mapping; kdlib shards writes it anew")
    return info


def _split(place: str, split: str, known: dict[str, Any]) -> tuple[list[str], list[int]]:
    where, found = f"{place}/{INFO}", known.get(split)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: no split {split!r} (known: {', '.join(known) or 'none'}); name two by splits=")
    files, lengths = found.get("filenames"), found.get("shard_lengths")
    if (
        not (isinstance(files, list) and isinstance(lengths, list) and files and len(files) == len(lengths))
        or not all(isinstance(file, str) and file for file in files)
        or not all(type(length) is int and length >= 0 for length in lengths)
    ):
        raise ValueError(
            f"{where}: split {split!r} needs filenames and shard_lengths, as many of each; kdlib shards writes them"
        )
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\0" in file or "://" in file:
            raise ValueError(f"{where}: {file[:60]!r} leads out of the folder; name shards below it")
    if len(set(files)) < len(files):
        raise ValueError(f"{where}: split {split!r} names a shard twice; each image comes once an epoch")
    if not place.startswith(WEB):
        there = {
            folder: set(os.listdir(folder))
            for folder in {os.path.dirname(f"{place}/{f}") for f in files}
            if os.path.isdir(folder)
        }
        lacking = [f for f in files if os.path.basename(f) not in there.get(os.path.dirname(f"{place}/{f}"), ())]
        if lacking:
            raise FileNotFoundError(
                f"{place}: {len(lacking)} of {len(files)} shards of split {split!r} are missing ({_some(lacking)}); "
                "put them back, or write the list anew by kdlib shards"
            )
    return files, lengths
