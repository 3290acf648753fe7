"""Data sets of the Hugging Face Hub, or folders like them, streamed: Parquet files, which `datasets` finds."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import one_line
from .shards import Shards
from .sources import _same_classes, rgb

AT_ONCE, ROWS = 16, 32
"""Files whose footers are asked for at a time, and rows that are decoded at a time."""


class ParquetShards(Shards):
    """One split: Parquet files `names`, or addresses that fsspec knows, with a column of images and one of classes."""

    def __init__(
        self, keys: tuple[str, str], names: Sequence[str], lengths: Sequence[int], classes: tuple[str, ...]
    ) -> None:
        super().__init__(names, lengths, classes)
        self.keys = keys

    def samples(self, shard: int, first: int, last: int) -> Iterator[dict[str, Any]]:
        """See `Shards.samples`. Groups of rows that nobody wants are not read."""
        at = 0
        with _opened(self.names[shard]) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < at + rows and at < last:
                    place = at
                    for batch in file.iter_batches(ROWS, row_groups=[group], columns=[*self.keys]):
                        if first < place + len(batch):
                            yield from batch.to_pylist()[max(first - place, 0) : max(last - place, 0)]
                        place += len(batch)
                at += rows
        if at != self.lengths[shard]:
            raise ValueError(f"{self.names[shard]} holds {at} images, and {self.lengths[shard]} when the run began")

    def read(self, sample: dict[str, Any]) -> tuple[Any, int]:
        """See `Shards.read`."""
        stored, label = (sample[key] for key in self.keys)
        if not stored or not stored.get("bytes"):
            raise ValueError("holds no bytes of an image; files outside the Parquet files are not followed")
        if label is None:
            raise ValueError("has no label")
        return rgb(io.BytesIO(stored["bytes"])), self.label(label)


def hub_shards(name: str, root: str | Path | None, splits: tuple[str, str]) -> tuple[ParquetShards, ParquetShards]:
    """Training and test images of `hfids/<owner>/<set>`, or of `hfids/<folder>`.

    Args:
        root: where `datasets` keeps what it needs to remember; else its own place.

    Raises:
        ValueError: it is not installed, cannot open the set, or the set does not say what is needed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"data set {name!r} needs the package datasets ({error}): pip install 'kdlib[stream]'"
        ) from None
    where = name.removeprefix("hfids/")
    try:
        builder = datasets.load_dataset_builder(where, cache_dir=None if root is None else str(root))
    except Exception as error:  # of a hundred kinds, from the Hub, the network and the files
        raise ValueError(
            f"data set {name!r}: cannot be opened ({type(error).__name__}: {one_line(error, 200)})"
        ) from None
    train, test = (_split(name, builder, split) for split in splits)
    _same_classes(f"{name} {splits[0]}", train.classes, f"{name} {splits[1]}", test.classes)
    return train, test


def _split(name: str, builder: Any, split: str) -> ParquetShards:
    import datasets

    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(
            f"data set {name!r}: no split {split!r} (known: {', '.join(map(str, files)) or 'none'}); "
            "name two by splits="
        )
    names = [str(file) for file in files[split]]
    if not all(file.endswith(".parquet") for file in names):
        raise ValueError(
            f"data set {name!r}: {names[0]} is no Parquet file, which alone tells how many images it holds; "
            "save the set so (to_parquet), or use hfds/…"
        )
    try:
        features = builder.as_streaming_dataset(split=split).features or {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            lengths = list(pool.map(_rows, names))
    except Exception as error:
        raise ValueError(
            f"data set {name!r}, split {split!r}: cannot be read ({type(error).__name__}: {one_line(error, 200)})"
        ) from None
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"data set {name!r}: has {len(images)} columns of images and {len(labels)} of classes; "
            "exactly one of each tells what to learn"
        )
    classes = tuple(features[labels[0]].names)
    return ParquetShards((images[0], labels[0]), names, lengths, classes)


@contextmanager
def _opened(name: str) -> Iterator[Any]:
    import fsspec
    import pyarrow.parquet

    with fsspec.open(name) as file:
        yield pyarrow.parquet.ParquetFile(file)


def _rows(name: str) -> int:
    """Rows of a Parquet file, from its footer."""
    with _opened(name) as file:
        return int(file.metadata.num_rows)
