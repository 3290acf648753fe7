"""Tar files of embedded images, as webdataset's writer makes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from kdlib.data.fashion import embedded

LENGTHS = {"train": (13, 20, 7, 25), "validation": (11, 6)}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_shards(root: Path, lengths: Mapping[str, Sequence[int]] = LENGTHS) -> Path:
    """`root` with shards of the first embedded images, and `_info.json`."""
    root.mkdir(parents=True, exist_ok=True)
    sources = dict(zip(lengths, embedded(), strict=True))
    splits = {}
    for split, counts in lengths.items():
        names, at = [f"{split}-{k:04d}.tar" for k in range(len(counts))], 0
        for name, count in zip(names, counts, strict=True):
            with tarfile.open(root / name, "w") as tar:
                for index in range(at, at + count):
                    picture = io.BytesIO()
                    Image.fromarray(sources[split].images[index, 0].numpy()).save(picture, "PNG")
                    add(tar, f"{index:05d}.png", picture.getvalue())
                    add(tar, f"{index:05d}.cls", str(int(sources[split].labels[index])).encode())
            at += count
        splits[split] = {"name": split, "filenames": names, "shard_lengths": [*counts], "num_samples": at}
    classes = list(sources[next(iter(lengths))].classes)
    (root / "_info.json").write_text(json.dumps({"classes": classes, "splits": splits}))
    return root
