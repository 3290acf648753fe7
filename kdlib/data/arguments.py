"""What ``load`` may be given: the defaults, and what is wrong with a value."""

from __future__ import annotations

from collections.abc import Sequence

from .augment import ARRAYS_ONLY, FILES_ONLY, Augment
from .sources import STREAMS, TIMM

CROP_PCT, INTERPOLATION, SPLITS = 0.875, "bicubic", ("train", "validation")
BUFFER = 2000
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
STREAMED = ("wds/", "hfids/")


def check(
    batch_size: int,
    eval_batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    image_size: int | None,
    limit: int | None,
    augment: Augment,
    crop_pct: float,
    interpolation: str,
    splits: Sequence[str],
    shuffle: int,
) -> None:
    """Makes sure of what can be told before a data set is opened.

    Raises:
        ValueError: a value that is out of its range, or does not go with another.
    """
    least = {"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1), "workers": (workers, 0)}
    least |= {
        "world_size": (world_size, 1),
        "image_size": (1 if image_size is None else image_size, 1),
        "limit": (1 if limit is None else limit, 1),
        "shuffle": (shuffle, 1),
    }
    for key, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{key}: got {value}, expected at least {low}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, expected 0 to {world_size - 1} (world_size {world_size})")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: got {crop_pct}, expected a share above 0 and at most 1")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
    if augment.mixes and batch_size % 2:
        raise ValueError(f"batch_size: got {batch_size}, but mixup and cutmix pair images; use an even number")
    if splits[0] == splits[1]:
        raise ValueError(f"splits: {splits[0]!r} twice; the images that are trained on cannot be the test")


def check_unused(
    name: str,
    in_memory: bool,
    *,
    augment: Augment,
    crop_pct: float,
    interpolation: str,
    splits: Sequence[str],
    limit: int | None,
    classes: int | None,
    shuffle: int,
) -> None:
    """Makes sure that what was given has an effect on this kind of data set.

    Raises:
        ValueError: an argument has none and is not at its default; the first of them.
    """
    streamed = name.startswith(STREAMED)
    unused = [f"augment.{field}" for field in augment.changed(*(FILES_ONLY if in_memory else ARRAYS_ONLY))]
    unused += ["crop_pct"] * (in_memory and crop_pct != CROP_PCT)
    unused += ["interpolation"] * (in_memory and interpolation != INTERPOLATION)
    unused += ["splits"] * (tuple(splits) != SPLITS and not name.startswith((*TIMM, *STREAMS)))
    unused += ["shuffle"] * (shuffle != BUFFER and not streamed) + ["limit"] * (limit is not None and streamed)
    unused += ["classes"] * (classes is not None and not name.startswith("wds/"))
    if unused:
        kind = "images in memory" if in_memory else "shards" if streamed else "image files"
        raise ValueError(f"{unused[0]}: has no effect on {name!r} ({kind}); leave it at its default")
