"""RIFormer and its same-size relatives: one MetaFormer with an affine, a pooling or an identity token mixer.

The head has the order of the papers: GroupNorm over (C, H, W), mean over space, linear. timm's PoolFormer pools first
and norms afterwards (eps 1e-6): same weights, other logits. Importing this file registers the models with timm.

Sources: RIFormer, CVPR 2023, arXiv 2304.05659; PoolFormer, CVPR 2022, arXiv 2111.11418.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from recipes.riformer.backbone import Backbone, expect
from recipes.riformer.convert import convert
from recipes.riformer.fusion import AFFINE_INITS, BLOCKS, FOLDS, MIXERS, BlockArgs, fuse_block, make_mixer
from recipes.riformer.sizes import SIZES, VARIANTS, model_cfg, refuse_pretrained

__all__ = ["MetaFormer", "fuse"]


class PatchEmbed(nn.Module):
    """A convolution that cuts (B, C, H, W) down: 7x7 stride 4 in the stem, 3x3 stride 2 between stages; no norm."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Stage(nn.Module):
    """Downsampling (none in the first stage) and blocks; (B, C, H, W) in and out in every form."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], form: str) -> None:
        super().__init__()
        self.form, self.grad_checkpointing = form, False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.form == "full":
            x = x.permute(0, 2, 3, 1).contiguous()
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2) if self.form == "full" else x


class MetaFormer(Backbone):
    """Images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        token_mixer: "affine" (RIFormer), "pool" (PoolFormer) or "identity". The output of the submodule
            `stages.{i}.blocks.{j}.token_mixer` is the mixer's result with its "minus input", before the layer scale.
        depths: blocks per stage; as many stages as entries.
        dims: channels per stage.
        num_classes: 0 for no classifier.
        in_chans: channels of the image.
        mlp_ratio: hidden channels of the MLP per channel.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0, the same for both branches.
        layer_scale_init: first value of both layer scales; 0 makes every block start as identity, None or False is for
            no layer scale at all (`timm.create_model` drops a None and takes the default of the size: say False there).
        affine_init: "trunc_normal" (s ~ 0.02 N(0, 1) truncated, t = 0), "uniform" (both in (-1, 1), what a depthwise
            convolution gets in PyTorch) or "zero_branch" (s = 1, t = 0). The paper does not say which.
        global_pool: "avg", or "" to hand out the feature map (only without a classifier).
        form: "train", or the two that `fuse` makes: "norm" and "full"; for loading a fused state dict.

    Raises:
        ValueError: for a name that is not in the lists above, unequal lengths, or a fused form of pooling.
    """

    def __init__(
        self,
        token_mixer: str = "affine",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init: float | None = 1e-5,
        affine_init: str = "trunc_normal",
        global_pool: str = "avg",
        form: str = "train",
    ) -> None:
        super().__init__()
        expect("token_mixer", token_mixer, MIXERS)
        expect("affine_init", affine_init, AFFINE_INITS)
        expect("form", form, tuple(BLOCKS))
        if not depths or len(depths) != len(dims):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} need one entry per stage each")
        if form != "train":
            _refuse_pool(token_mixer)
        self.token_mixer, self.form, self.in_chans, self.num_features = token_mixer, form, in_chans, dims[-1]
        self.head_hidden_size = dims[-1]
        self.stem = PatchEmbed(in_chans, dims[0], 7, 4, 2)
        rates = [drop_path_rate * k / max(sum(depths) - 1, 1) for k in range(sum(depths))]
        mixer, stages = partial(make_mixer, token_mixer, affine_init), []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            first = sum(depths[:i])
            args = [
                BlockArgs(dim, int(dim * mlp_ratio), mixer, rate, layer_scale_init)
                for rate in rates[first : first + depth]
            ]
            downsample = PatchEmbed(dims[i - 1], dim, 3, 2, 1) if i else nn.Identity()
            stages.append(Stage(downsample, [BLOCKS[form](a) for a in args], form))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.norm: nn.Module = nn.GroupNorm(1, dims[-1])
        self.drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the normed map (B, dims[-1], h, w)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed map (B, C, h, w) to logits (B, num_classes), or to pooled features (B, C) with `pre_logits`."""
        x = self.drop(x.mean((2, 3)) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs (B, C_i, h_i, w_i), and before them the normed last map unless `intermediates_only`.

        Args:
            x: images (B, in_chans, H, W).
            indices: which stages: a list, the last n, or None for all.
            norm: apply the final norm to the last stage's output.
            stop_early: do not run stages after the last that was asked for; the map is then that stage's output.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
        """
        expect("output_fmt", output_fmt, ("NCHW",))
        take, last = feature_take_indices(len(self.stages), indices)
        x, outputs = self.stem(x), []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            is_final = i == len(self.feature_info) - 1
            if i in take:
                outputs.append(self.norm(x) if norm and is_final else x)
        if intermediates_only:
            return outputs
        return (self.norm(x) if is_final else x), outputs

    def no_weight_decay(self) -> set[str]:
        """The affine mixers: the norms that they become are not decayed either, and s = 0 is not a neutral value."""
        return {name for name, _ in self.named_parameters() if ".token_mixer." in name}

    fused_arguments = MappingProxyType({"form": "full"})
    """What `timm.create_model` needs besides, to build what `fused` returns."""

    def fused(self) -> "MetaFormer":
        """The model as it runs at inference, which `kdlib export` asks for: `fuse(self, "full")`, or itself where there
        is nothing to fold."""
        return self if self.form == "full" or self.token_mixer == "pool" else fuse(self, "full")


def _refuse_pool(token_mixer: str) -> None:
    if token_mixer == "pool":
        raise ValueError(
            "a pooling mixer reads its neighbours, so no norm can stand for it: form 'norm' and 'full' exist for "
            "token_mixer 'affine' and 'identity'; run a PoolFormer in form 'train'"
        )


def fuse(model: nn.Module, level: str = "norm") -> MetaFormer:
    """A copy of `model` with its token mixers folded away; the same function of the image. `model` is not changed.

    Level "norm" is the paper's re-parameterisation (Eq. 3-4): the affine mixer goes into the norm before it. Level
    "full" also folds both layer scales and the affine of norm2 and runs the MLPs as linears over channels-last tokens;
    its convolutions are set to channels_last. It is an inference form: it has no stochastic depth. "full" accepts a
    model that "norm" has made. A fused state dict is loaded into `timm.create_model(name, form=level)`.

    Raises:
        ValueError: for something other than a MetaFormer, another level, a pooling mixer, or a model fused that far.
    """
    if not isinstance(model, MetaFormer):
        raise ValueError(
            f"fuse takes a MetaFormer, but was given a {type(model).__name__}; take it out of its wrapper first "
            "(.module of DistributedDataParallel, ._orig_mod of torch.compile)"
        )
    expect("level", level, tuple(FOLDS))
    _refuse_pool(model.token_mixer)
    if model.form == "full" or model.form == level:
        raise ValueError(f"this model is already fused, form={model.form!r}; fuse the one it was made from")
    fused = copy.deepcopy(model)
    fused.form = level
    for stage in list(fused.modules()):
        if isinstance(stage, Stage):
            stage.form = level
            blocks = nn.Sequential(*(fuse_block(block, level) for block in stage.blocks))
            stage.blocks = blocks.train(stage.training)
    return fused.to(memory_format=torch.channels_last) if level == "full" else fused


FAMILIES = {"riformer": "affine", "metaformer_pool": "pool", "metaformer_id": "identity"}


def published_weights(variant: str) -> dict[str, Tensor]:
    """PoolFormer's weights of one size in our names, by timm, which downloads them once."""
    return convert(timm.create_model(f"poolformer_{variant}", pretrained=True).state_dict())


def _published(model: MetaFormer, variant: str) -> MetaFormer:
    """`model` with PoolFormer's published weights; its head too, where that has ImageNet's classes."""
    state = published_weights(variant)
    if model.in_chans != 3:
        raise ValueError(f"pretrained=True: the weights are for images of 3 channels (got in_chans={model.in_chans})")
    if model.num_classes != len(state["head.bias"]):
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=len(state) == len(model.state_dict()))
    return model


def _entry(name: str, token_mixer: str, key: str) -> Callable[..., nn.Module]:
    """What timm calls to build the model `name`; `key` is a size, or "" for any of the papers' sizes by `variant`."""

    def build(pretrained: bool = False, variant: str | None = None, **kwargs: Any) -> nn.Module:
        size = SIZES[key or "s12"]
        if variant is not None:
            expect(f"variant of {name}", variant, VARIANTS if key in ("", "micro") else (None,))
            size = size.like(SIZES[variant]) if key else SIZES[variant]
        paper = variant or key or "s12"
        pool = token_mixer == "pool" and key != "micro" and paper in VARIANTS
        exported = pretrained and bool(kwargs.get("pretrained_cfg"))  # local-dir: and hf-hub: have weights of their own
        if not (pool or exported):
            refuse_pretrained(name, pretrained)
        arch: dict[str, Any] = {"token_mixer": token_mixer, "depths": size.depths, "dims": size.dims}
        features = {"out_indices": tuple(range(len(size.depths))), "feature_cls": "getter"}
        arguments = arch | {"layer_scale_init": size.layer_scale_init} | kwargs
        model = build_model_with_cfg(MetaFormer, name, exported, feature_cfg=features, **arguments)
        return _published(model, paper) if pretrained and not exported else model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"MetaFormer({token_mixer!r}) of size {key or 'variant'} for timm.create_model."
    return build


_TABLE: Mapping[str, tuple[str, str]] = {
    f"{family}_{key}".rstrip("_"): (mixer, key) for family, mixer in FAMILIES.items() for key in ("", *SIZES)
}
default_cfgs = generate_default_cfgs({name: model_cfg(SIZES[key or "s12"]) for name, (_, key) in _TABLE.items()})
for _name, (_token_mixer, _key) in _TABLE.items():
    globals()[_name] = register_model(_entry(_name, _token_mixer, _key))
