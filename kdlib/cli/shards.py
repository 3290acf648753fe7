"""Lists the shards of a folder of tar files in its _info.json, which data.name=wds/ reads.

  kdlib shards /data/imagenet train='train-*.tar' validation='val-*.tar' --classes names.txt

A tar holds name.jpg (or .jpeg, .png, .webp, .bmp, .ppm) beside name.cls, the number of its class, as webdataset's
TarWriter writes them. Only names are read.

From Python: kdlib.data.write_info(root, splits, classes).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="the folder")
    parser.add_argument("splits", nargs="+", metavar="SPLIT=PATTERN", help="which files are of which split")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line, in their order")


def run(options: Namespace) -> None:
    from ..data.indexing import write_info
    from ..progress import say

    splits = dict(text.split("=", 1) for text in options.splits if "=" in text)
    if len(splits) < len(options.splits) or not all(splits):
        raise ValueError(f"expected SPLIT=PATTERN, such as train='train-*.tar' (got {' '.join(options.splits)})")
    if not options.root.is_dir():
        raise ValueError(f"{options.root}: no such folder")
    classes = options.classes.read_text(encoding="utf-8").split("\n") if options.classes else []
    counts = write_info(options.root, splits, [line.strip() for line in classes if line.strip()])
    say(", ".join(f"{split}: {count:,} images" for split, count in counts.items()) + f" → {options.root}/_info.json")
