"""How good a model is on the test images, over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import nn

from ..data import Loader
from ..taps import in_eval
from . import sharding
from .ranks import share_buffers


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Loader, accelerator: Accelerator, channels_last: bool = False
) -> dict[str, float]:
    """Top-1 and top-5 in percent over all ranks, every image counted once; the model's mode is restored."""
    sums = torch.zeros(4, device=accelerator.device)
    with in_eval(model):
        for images, labels in batches.epoch(0):
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = model(images)
            ranked = logits.float().topk(min(5, logits.shape[-1])).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            hits = ranked.float()
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.full_like(loss, len(labels))])
    top1, top5, loss, count = accelerator.reduce(sums, reduction="sum").tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "test_loss": loss / count}


def evaluate_all(
    models: Mapping[str, nn.Module], batches: Loader, accelerator: Accelerator, channels_last: bool = False
) -> dict[str, float]:
    """``evaluate`` of several models of a run, each with the main process's buffers; keys begin with a model's name."""
    found: dict[str, float] = {}
    for name, model in models.items():
        share_buffers(accelerator, model)
        result = evaluate(model, batches, accelerator, channels_last)
        sharding.release(model)
        found |= {f"{name}{key}": value for key, value in result.items()}
    return found


def with_best(
    found: dict[str, float], before: dict[str, float], metric: str, epoch: int
) -> tuple[dict[str, float], bool]:
    """``found`` with the best ``metric`` so far and its epoch, and whether that is now.

    Of a loss, less is better. NaN is never the best: where nothing else was found yet, there is none.
    """
    best = f"best_{metric}"
    sign, now, old = -1 if metric.endswith("loss") else 1, found[metric], before.get(best, math.nan)
    if not math.isnan(now) and (math.isnan(old) or sign * now > sign * old):
        return {**found, best: now, "best_epoch": epoch}, True
    return {**found, **({} if math.isnan(old) else {best: old, "best_epoch": before["best_epoch"]})}, False
