"""What is done to training images: the switches, and the part that runs on whole batches on their device."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .samplers import generator, seeded

FILES_ONLY, ARRAYS_ONLY = ("crop_scale", "crop_ratio", "color_jitter"), ("crop_padding",)
"""Switches without effect on the other kind of data set."""
_SECTION = re.compile(r"(m|n)\d+|(p|mstd)\d+(\.\d+)?|mstdinf|mmax\d+|inc[01]|t[a-z0-9]+")


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images. Every part can be switched off; label smoothing belongs to the loss.

    Raises:
        ValueError: a value outside its range, or a `rand_augment` that timm would not understand.
    """

    crop_padding: int = 0
    """Sets in memory only: pixels of black border on each side before a random crop of the original size; 0 is off."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Image files only: smallest and largest share of the image's area that a random resized crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Image files only: smallest and largest width / height of that crop."""
    flip: float = 0.5
    """Probability that an image is mirrored left to right."""
    color_jitter: float = 0.0
    """Image files only: strength of random brightness, contrast and saturation; must be 0 beside `rand_augment`."""
    rand_augment: str | None = None
    """timm's description of RandAugment, such as `rand-m9-mstd0.5-inc1`; null is off."""
    random_erasing: float = 0.0
    """Probability that a rectangle (2 % to 33 % of the area) of an image is erased."""
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What fills the rectangle: the mean colour, one random colour, or noise."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off. Labels become (B, classes)."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off. Labels become (B, classes)."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all, where mixup or cutmix is on."""
    switch_prob: float = 0.5
    """Probability of CutMix instead of mixup where both are on."""

    def __post_init__(self) -> None:
        for name in ("flip", "random_erasing", "mixup_prob", "switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}: got {getattr(self, name)}, expected a probability from 0 to 1")
        for name in ("mixup", "cutmix", "color_jitter"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"augment.{name}: got {getattr(self, name)}, expected a number of at least 0 (0 is off)"
                )
        if self.crop_padding < 0:
            raise ValueError(f"augment.crop_padding: got {self.crop_padding}, expected at least 0 pixels")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"augment.crop_scale: got {low}, {high}, expected 0 < smallest <= largest <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high < math.inf:
            raise ValueError(f"augment.crop_ratio: got {low}, {high}, expected 0 < smallest <= largest")
        if self.erasing_mode not in ("const", "rand", "pixel"):
            raise ValueError(f"augment.erasing_mode: got {self.erasing_mode!r}, expected const, rand or pixel")
        if self.rand_augment is not None:
            head, *sections = self.rand_augment.split("-")
            wrong = [s for s in sections if not _SECTION.fullmatch(s)] if head == "rand" else [head]
            if wrong:
                raise ValueError(
                    f"augment.rand_augment: {wrong[0]!r} in {self.rand_augment!r} is not understood; "
                    "write it like rand-m9-mstd0.5-inc1, or null to switch it off"
                )
            if self.color_jitter:
                raise ValueError(
                    f"augment.color_jitter: got {self.color_jitter} beside rand_augment, which replaces it; set it to 0"
                )

    @property
    def mixes(self) -> bool:
        """Whether labels are (B, classes) float32 instead of (B,) int64."""
        return self.mixup > 0 or self.cutmix > 0

    def changed(self, *names: str) -> list[str]:
        """Those of `names` whose value is not the default."""
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]


def crop_flip_draws(images: int, augment: Augment, *, seed: int, epoch: int) -> Tensor:
    """The crop and flip of every image in one epoch: int64 (3, images), rows top, left, mirrored (0 or 1)."""
    draw = generator(seed, "crop and flip", epoch)
    corners = torch.randint(0, 2 * augment.crop_padding + 1, (2, images), generator=draw)
    mirrored = torch.rand(images, generator=draw) < augment.flip
    return torch.cat([corners, mirrored[None].long()])


def crop_flip(padded: Tensor, windows: Tensor, size: int) -> Tensor:
    """Cuts one window out of each named image, and mirrors it where asked.

    `padded` is (N, C, H, W) with its border; `windows` is int64 (4, B) on the same device, with rows index, top, left,
    mirrored. The answer is (B, C, size, size): `padded[index, :, top:top+size, left:left+size]`, its columns reversed
    where `mirrored` is 1.
    """
    index, top, left, mirrored = windows[..., None].unbind()
    line = torch.arange(size, device=padded.device)
    rows = top + line
    columns = left + torch.where(mirrored > 0, size - 1 - line, line)
    return padded[index[..., None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def rand_augment(description: str, size: int, mean: tuple[float, ...]) -> Any:
    """timm's RandAugment for PIL images of `size` pixels, grey (one mean) or RGB (three)."""
    from timm.data.auto_augment import rand_augment_transform

    fill = [min(255, round(255 * value)) for value in mean]
    hints = {"translate_const": int(size * 0.45), "img_mean": fill[0] if len(fill) == 1 else tuple(fill)}
    return _mended(rand_augment_transform(description, hints))


def _mended(policy: Any) -> Any:
    # timm asks for 0 bits at full magnitude, which Pillow 13 refuses and earlier ones answer with black
    for operation in policy.ops:
        if operation.aug_fn.__name__ == "posterize":
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Any, bits_to_keep: int, **_: Any) -> Any:
    from PIL import Image, ImageOps

    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def train_transform(augment: Augment, size: int, mean: tuple[float, ...], interpolation: str) -> Any:
    """timm's training transform from an RGB PIL image to uint8 (3, size, size); erasing and mixing come later."""
    from timm.data.transforms_factory import create_transform

    jitter: Any = augment.color_jitter or None
    transform = create_transform(
        size,
        is_training=True,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.flip,
        color_jitter=jitter,
        auto_augment=augment.rand_augment,
        interpolation=interpolation,
        mean=mean,
        normalize=False,
    )
    for step in transform.transforms:
        if hasattr(step, "ops"):
            _mended(step)
    return transform


def eval_transform(size: int, crop_pct: float, interpolation: str) -> Any:
    """timm's evaluation transform from an RGB PIL image to uint8 (3, size, size): resize, then crop the centre."""
    from timm.data.transforms_factory import create_transform

    return create_transform(size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)


class BatchAugment:
    """Random erasing, then mixup or cutmix, of a normalised batch on its device, by timm.

    Called with images float32 (B, C, H, W), which it may change in place, int64 labels (B,), the epoch and the batch's
    number; gives images and labels, which are float32 (B, classes) if the batch may be mixed.
    """

    def __init__(self, augment: Augment, classes: int, *, seed: int, rank: int, device: torch.device) -> None:
        self.seed, self.rank, self.device = seed, rank, device
        self.steps: list[Any] = []
        self.mixup: Any = None
        if augment.random_erasing:
            from timm.data.random_erasing import RandomErasing

            self.steps.append(RandomErasing(augment.random_erasing, mode=augment.erasing_mode, device=device))
        if augment.mixes:
            from timm.data.mixup import Mixup

            self.mixup = Mixup(
                augment.mixup,
                augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=0.0,
                num_classes=classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        if not self.steps and self.mixup is None:
            return images, labels
        with seeded(self.seed, "batch", epoch, batch, self.rank, device=self.device):
            for step in self.steps:
                images = step(images)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
        return images, labels
