"""What timm asks of a backbone, for models that consist of `stem`, `stages`, `norm`, `drop` and `head`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn


def expect(what: str, given: object, allowed: Sequence[object]) -> None:
    """Raise a ValueError that names `what`, what was given and what is allowed, unless `given` is allowed."""
    if given not in allowed:
        raise ValueError(f"{what} is {given!r}; expected one of {', '.join(map(repr, allowed))}")


class Backbone(nn.Module):
    """The part of a timm model that does not depend on what its blocks do.

    A derived class sets `stem` (with a `conv`), `stages`, `norm`, `drop`, `num_features`, `feature_info`, and gives
    `forward_features` and `forward_head`; stages carry `grad_checkpointing`.
    """

    stem: nn.Module
    stages: nn.Sequential
    norm: nn.Module
    feature_info: list[dict[str, Any]]
    num_features: int
    forward_features: Any
    forward_head: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop, in place, what `forward_intermediates(indices=indices)` does not need; returns the stage numbers."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier with `num_classes` outputs; 0 for none, so that `forward` returns features."""
        if global_pool is not None:
            expect("global_pool", global_pool, ("avg", ""))
            self.global_pool = global_pool
        if num_classes and not self.global_pool:
            raise ValueError(f"num_classes={num_classes} with global_pool='': a classifier needs global_pool='avg'")
        self.num_classes = num_classes
        self.head = new_head(self.num_features, num_classes, self.stem.get_parameter("conv.weight"))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""
        for stage in self.modules():
            if hasattr(stage, "grad_checkpointing"):
                setattr(stage, "grad_checkpointing", enable)  # noqa: B010  a plain attribute, not a submodule

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns from which timm sorts parameters into layers, for layer-wise learning rates."""
        return layer_groups(coarse)


def new_head(dim: int, num_classes: int, like: Tensor) -> nn.Module:
    """Linear(dim, num_classes), trunc_normal(0.02) and 0, with device and dtype of `like`; Identity for no classes."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(dim, num_classes, device=like.device, dtype=like.dtype)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def layer_groups(coarse: bool) -> dict[str, Any]:
    """timm's `group_matcher` patterns for models with the names `stem`, `stages.i.blocks.j` and `norm`."""
    downsample, block = (r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)
    blocks = r"^stages\.(\d+)" if coarse else [downsample, block, (r"^norm", (99999,))]
    return {"stem": r"^stem|^pos_embed", "blocks": blocks}
