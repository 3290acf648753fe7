"""A few real images, for looking at models: from a data set, or from any folder of image files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .augment import eval_transform
from .sources import IMAGES, rgb


def few_images(source: str | Path, count: int, image_size: int) -> Tensor:
    """``(count, C, H, W)`` square images, white is 1.

    Args:
        source: a folder in which image files lie anywhere below, taken evenly spread by name; or the name of a data set
            as ``load`` takes it, of which the first test images are taken.

    Raises:
        ValueError: fewer images than asked for, or one that cannot be read.
    """
    if Path(source).is_dir():
        return _from_folder(Path(source), count, image_size)
    from .by_name import load  # which few_images alone does not need

    data = load(str(source), image_size=image_size, eval_batch_size=count, workers=0)
    images = next(data.test.epoch(0))[0].cpu()
    if len(images) < count:
        raise ValueError(f"{source}: has {len(images)} test images, {count} are asked for; ask for fewer")
    return data.pixels(images)


def _from_folder(folder: Path, count: int, image_size: int) -> Tensor:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if len(files) < count:
        raise ValueError(f"{folder}: holds {len(files)} image files, {count} are asked for; add some or ask for fewer")
    transform, images = eval_transform(image_size, 1.0, "bicubic"), []
    for file in files[:: len(files) // count][:count]:
        try:
            images.append(transform(rgb(file)))
        except Exception as error:  # PIL alone has five kinds
            raise ValueError(f"{file}: cannot be read as an image ({error}); remove or replace it") from None
    return torch.stack([torch.as_tensor(image) for image in images]).float() / 255
