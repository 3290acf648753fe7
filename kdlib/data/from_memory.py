"""Batches from images in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import Augment, BatchAugment, crop_flip, crop_flip_draws, rand_augment
from .fashion import Arrays
from .loader import BatchLoader, Normalise
from .samplers import EpochBatches, seeded


class ArrayLoader(BatchLoader):
    """Batches of images in memory: they are moved to the device once, and cropped, flipped and resized there.

    RandAugment works on PIL images, so with it the images stay in the host's memory and each batch is sent.
    `augment` and `finish` are None in evaluation.
    """

    batches: EpochBatches

    def __init__(
        self,
        arrays: Arrays,
        batches: EpochBatches,
        normalise: Normalise,
        *,
        device: torch.device,
        mean: tuple[float, ...],
        augment: Augment | None = None,
        finish: BatchAugment | None = None,
    ) -> None:
        super().__init__(batches, device)
        self.normalise, self.augment, self.finish = normalise, augment, finish
        self.size = arrays.images.shape[-1]
        self.policy: Any = None
        if augment is not None and augment.rand_augment:
            self.policy = rand_augment(augment.rand_augment, self.size, mean)
        self.home = torch.device("cpu") if self.policy else device
        padding = augment.crop_padding if augment else 0
        self.images = F.pad(arrays.images, (padding,) * 4).to(self.home)
        self.labels = arrays.labels.to(self.home)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.batches.rows(epoch)
        if not rows:
            return
        order = torch.cat(rows)
        # all that is random about cropping and flipping is sent in one piece, so that a batch sends nothing
        draws = (
            crop_flip_draws(len(self.labels), self.augment, seed=self.batches.seed, epoch=epoch)
            if self.augment
            else None
        )
        plan = order[None] if draws is None else torch.cat([order[None], draws[:, order]])
        for batch, part in enumerate(self._send(plan, self.home).split(self.batches.batch_size, dim=1)):
            if batch < start:
                continue
            index = part[0]
            labels = self.labels[index]
            images = self.images[index] if draws is None else crop_flip(self.images, part, self.size)
            if self.policy is not None:
                with seeded(self.batches.seed, "rand augment", epoch, batch, self.batches.rank):
                    images = torch.stack([self._policy(image) for image in images])
            images = self.normalise(self._send(images, self.device))
            labels = self._send(labels, self.device)
            if self.finish is not None:
                images, labels = self.finish(images, labels, epoch, batch)
            yield images, labels

    def _policy(self, image: Tensor) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        return pil_to_tensor(self.policy(to_pil_image(image)))

    @staticmethod
    def _send(values: Tensor, device: torch.device) -> Tensor:
        if device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)
