"""Checkpoints of other projects, renamed to ours.

`convert(checkpoint)` tells by the key names where a checkpoint comes from; `recognise(checkpoint)` only says so. Known:
RIFormer of open-mmlab/mmpretrain in training and deploy form, PoolFormer and MetaFormer of sail-sg/poolformer,
PoolFormer of timm, hierarchical GFNet of raoyongming/GFNet, and our own files (train, norm and full form, GFNetH).

    student = timm.create_model("riformer_s12")
    student.load_state_dict(convert("riformer-s12_32xb128_in1k_20230406-6741ce71.pth"))

    # the paper's guideline 5: start from PoolFormer, only the affine mixers stay as they are
    student.load_state_dict(convert("poolformer_s12.pth.tar"), strict=False)

mmpretrain's deploy form loads into `form="norm"`. What mmpretrain publishes, all in training form, lies under
https://download.openmmlab.com/mmclassification/v1/riformer/ as riformer-{size}_32xb128_{data}_20230406-{hash}.pth:

    data          s12       s24       s36       m36       m48
    in1k          6741ce71  fdab072a  fdfcd3b0  2fcb9d9b  2b9d1abf
    in1k-384px    145eda4c  bafae7ab  017ed3c4  66a6f764  2e874826

timm's PoolFormer has the same weights as the original, but pools before the final norm (eps 1e-6). Converted, they give
the logits of the original order, which are not those that timm computes from them.
"""

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["convert", "recognise"]

logger = logging.getLogger(__name__)

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


class Source(NamedTuple):
    """Where a checkpoint may come from: the keys that give it away, and (pattern of a whole key, our name) pairs."""

    name: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]


def _network_rules(prefix: str, norm: str, head: str) -> tuple[Rule, ...]:
    """Stages are the even entries of one list `network`, downsampling the odd ones, which belongs to the next stage."""

    def block(match: re.Match[str]) -> str:
        return f"stages.{int(match[1]) // 2}.blocks.{match[2]}.{match[3]}"

    def layer_scale(match: re.Match[str]) -> str:
        return f"stages.{int(match[1]) // 2}.blocks.{match[2]}.layer_scale{match[3]}.scale"

    def downsample(match: re.Match[str]) -> str:
        return f"stages.{(int(match[1]) + 1) // 2}.downsample.conv.{match[2]}"

    inner = r"(?:norm1|norm2|norm_reparam|token_mixer\.affine|mlp\.fc[12])\.(?:weight|bias)"
    return (
        (rf"{prefix}patch_embed\.proj\.(weight|bias)", r"stem.conv.\1"),
        (rf"{prefix}network\.(\d*[02468])\.(\d+)\.({inner})", block),
        (rf"{prefix}network\.(\d*[02468])\.(\d+)\.layer_scale_([12])", layer_scale),
        (rf"{prefix}network\.(\d*[13579])\.proj\.(weight|bias)", downsample),
        (rf"{norm}\.(weight|bias)", r"norm.\1"),
        (rf"{head}\.(weight|bias)", r"head.\1"),
    )


_MMPRETRAIN = _network_rules(r"backbone\.", r"backbone\.norm\d*", r"head\.fc")

_TIMM: tuple[Rule, ...] = (
    (r"(stem\.conv\.(?:weight|bias))", r"\1"),
    (r"(stages\.\d+\.downsample\.conv\.(?:weight|bias))", r"\1"),
    (r"(stages\.\d+\.blocks\.\d+\.(?:layer_scale[12]\.scale|(?:norm[12]|mlp\.fc[12])\.(?:weight|bias)))", r"\1"),
    (r"head\.norm\.(weight|bias)", r"norm.\1"),
    (r"head\.fc\.(weight|bias)", r"head.\1"),
)

_GFNET: tuple[Rule, ...] = (
    (r"(pos_embed|(?:norm|head)\.(?:weight|bias))", r"\1"),
    (r"patch_embed\.0\.proj\.(weight|bias)", r"stem.conv.\1"),
    (r"patch_embed\.(\d+)\.proj\.(weight|bias)", r"stages.\1.downsample.conv.\2"),
    (
        r"blocks\.(\d+)\.(\d+)\.(gamma|filter\.complex_weight|(?:norm[12]|mlp\.fc[12])\.(?:weight|bias))",
        r"stages.\1.blocks.\2.\3",
    ),
)

_OURS: tuple[Rule, ...] = ((r"((?:pos_embed|(?:stem|stages|norm|head)\.).*)", r"\1"),)

# Ordered: the first whose marks are all there is taken, so the more particular stand before the more general.
SOURCES: tuple[Source, ...] = (
    Source(
        "mmpretrain RIFormer, training form",
        ("backbone.patch_embed.proj.weight", "backbone.network.0.0.token_mixer.affine.weight"),
        _MMPRETRAIN,
    ),
    Source(
        "mmpretrain RIFormer, deploy form",
        ("backbone.patch_embed.proj.weight", "backbone.network.0.0.norm_reparam.weight"),
        _MMPRETRAIN,
    ),
    Source(
        "PoolFormer or MetaFormer of sail-sg",
        ("patch_embed.proj.weight", "network.0.0.norm1.weight", "network.0.0.mlp.fc1.weight"),
        _network_rules("", "norm", "head"),
    ),
    Source(
        "GFNet-H of raoyongming", ("pos_embed", "patch_embed.0.proj.weight", "blocks.0.0.filter.complex_weight"), _GFNET
    ),
    Source("PoolFormer of timm", ("stem.conv.weight", "stages.0.blocks.0.norm1.weight", "head.norm.weight"), _TIMM),
    Source("kdlib GFNetH", ("stem.conv.weight", "pos_embed", "stages.0.blocks.0.filter.complex_weight"), _OURS),
    Source(
        "kdlib MetaFormer, training form", ("stem.conv.weight", "stages.0.blocks.0.norm1.weight", "norm.weight"), _OURS
    ),
    Source(
        "kdlib MetaFormer, fused", ("stem.conv.weight", "stages.0.blocks.0.norm_reparam.weight", "norm.weight"), _OURS
    ),
)

_IGNORED = ("data_preprocessor.",)
_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def recognise(checkpoint: str | Path | Mapping[str, Any]) -> str:
    """The name of the project and form a checkpoint comes from; arguments and errors as of `convert`."""
    return _match(_state_dict(checkpoint)).name


def convert(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a checkpoint to the parameter names of `MetaFormer` or `GFNetH`; the tensors are passed on untouched.

    What was recognised is logged (logger of this module, level INFO). Files are read without running code from them:
    `torch.load(weights_only=True)`, or safetensors.

    Args:
        checkpoint: a file (.safetensors, or anything `torch.save` wrote), or what has been loaded from one: a state
            dict, alone or under the key "state_dict" or "model". The prefixes of DistributedDataParallel and
            torch.compile are removed.

    Returns:
        A state dict for `load_state_dict`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read safely, if its keys fit no known source, or if some key of a recognised
            source is not one of that architecture's.
    """
    state = _state_dict(checkpoint)
    source = _match(state)
    converted = {_rename(key, source): value for key, value in state.items()}
    logger.info("recognised %s: %d tensors", source.name, len(converted))
    return converted


def _match(state: Mapping[str, Tensor]) -> Source:
    for source in SOURCES:
        if all(mark in state for mark in source.marks):
            return source
    expected = "\n".join(f"  {source.name}: {', '.join(source.marks)}" for source in SOURCES)
    raise ValueError(
        f"unknown checkpoint of {len(state)} tensors, first keys: {', '.join(list(state)[:5]) or 'none'}. "
        f"Expected one of these, by the keys it must have:\n{expected}"
    )


def _rename(key: str, source: Source) -> str:
    for pattern, ours in source.rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(ours) if isinstance(ours, str) else ours(match)
    raise ValueError(
        f"this looks like {source.name}, but has the key {key!r} that its architecture has not; "
        "it may be another variant of the model, or hold more than weights: remove or rename such keys first"
    )


def _state_dict(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    content = _read(Path(checkpoint)) if isinstance(checkpoint, str | Path) else checkpoint
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a state dict or a file with one, but was given a {type(content).__name__}")
    state = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"a state dict maps names to tensors, but {key!r} holds a {type(value).__name__}; "
                f"give the state dict itself, or put it under one of the keys {', '.join(map(repr, _WRAPPERS))}"
            )
        while key.startswith(_PREFIXES):
            key = key.split(".", 1)[1]
        if not key.startswith(_IGNORED):
            state[key] = value
    return state


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; give the path of a downloaded file, nothing is fetched for you"
        )
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which could run code when loaded and is "
            "refused; download it again, or save its state dict alone where you trust it"
        ) from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); download it again") from error
