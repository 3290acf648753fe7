"""`_info.json` of a folder of tar files: which shards each split has, and how many images each holds."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config import one_line
from .shards import ENDINGS, INFO, grouped


def write_info(root: Path, splits: Mapping[str, str], classes: Sequence[str] = ()) -> dict[str, int]:
    """Counts the images of each shard, reading names alone, and writes what `wds/` needs to know.

    Args:
        splits: name to a pattern of files below `root`, such as `train-*.tar`.
        classes: their names in the order of the labels; none leaves them to `data.classes`.

    Returns:
        Images of each split.

    Raises:
        ValueError: a pattern that finds nothing, a shard that cannot be read, a sample without image or label.
    """
    told: dict[str, object] = {"classes": list(classes)} if classes else {}
    found: dict[str, dict[str, object]] = {}
    counts: dict[str, int] = {}
    for split, pattern in splits.items():
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ValueError(f"{split}={pattern}: leads out of {root}; give a pattern below it")
        files = sorted(path for path in root.glob(pattern) if path.is_file())
        if not files:
            raise ValueError(f"{split}={pattern}: no file in {root} is called so")
        lengths = [_count(file) for file in files]
        names = [file.relative_to(root).as_posix() for file in files]
        counts[split] = sum(lengths)
        found[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": counts[split]}
    (root / INFO).write_text(json.dumps({**told, "splits": found}, indent=1), encoding="utf-8")
    return counts


def _count(file: Path) -> int:
    count = 0
    try:
        with tarfile.open(file) as tar:
            for sample in grouped(tar, sys.maxsize):
                if ".cls" not in sample or not sample.keys() & set(ENDINGS):
                    raise ValueError(f"image {count} holds {', '.join(sorted(sample))}; expected an image and .cls")
                count += 1
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    return count
