"""One block in three forms ("train", "norm", "full"), and the exact algebra that leads from one to the next.

The folds are pure functions from the state of one block to the state of another. They compute in float64 and return the
dtype that came in, so the only error left is the last rounding. `recipes.riformer.model.fuse` walks a whole model.

Source: RIFormer, CVPR 2023, arXiv 2304.05659, Eq. 1-4 and Algorithms 1-2.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

AFFINE_INITS = ("trunc_normal", "uniform", "zero_branch")
MIXERS = ("affine", "pool", "identity")
EPS = 1e-5
"""Of every norm; GroupNorm's own."""


class ChannelAffine(nn.Module):
    """y = s x + t per channel of (B, C, H, W). Stored like the depthwise 1x1 convolution of the paper's Algorithm 1:
    weight (C, 1, 1, 1), bias (C,); computed elementwise, which is the same number and the cheaper kernel."""

    def __init__(self, dim: int, init: str) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, 1))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.init == "uniform":
                self.weight.uniform_(-1, 1)
                self.bias.uniform_(-1, 1)
                return
            if self.init == "zero_branch":
                self.weight.fill_(1)
            else:
                trunc_normal_(self.weight, std=0.02)
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.flatten(1)[..., None] + self.bias[:, None, None]


class Affine(nn.Module):
    """RIFormer's training-time mixer, A(z) = s z + t - z on (B, C, H, W) (Eq. 1). Its output is the whole branch."""

    def __init__(self, dim: int, init: str = "trunc_normal") -> None:
        super().__init__()
        self.affine = ChannelAffine(dim, init)

    def forward(self, z: Tensor) -> Tensor:
        return self.affine(z) - z


class Pool(nn.Module):
    """PoolFormer's mixer, mean of the 3x3 neighbours inside the image, minus z, on (B, C, H, W)."""

    def forward(self, z: Tensor) -> Tensor:
        return F.avg_pool2d(z, 3, stride=1, padding=1, count_include_pad=False) - z


def make_mixer(name: str, affine_init: str, dim: int) -> nn.Module:
    """The token mixer `name`, one of MIXERS, for `dim` channels."""
    if name == "affine":
        return Affine(dim, affine_init)
    return Pool() if name == "pool" else nn.Identity()


class LayerScale(nn.Module):
    """A trained factor per channel of (B, C, H, W)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None]


class Mlp(nn.Module):
    """fc1, exact GELU, fc2 over channels. `layer(in, out)` is `nn.Linear`, or a 1x1 convolution for (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = layer(dim, hidden), nn.GELU(), layer(hidden, dim)
        for fc in (self.fc1, self.fc2):
            trunc_normal_(fc.get_parameter("weight"), std=0.02)
            nn.init.zeros_(fc.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenNorm(nn.Module):
    """GroupNorm(1) for channels-last tokens (B, H, W, C): statistics over H, W and C together, affine per channel."""

    def __init__(self, dim: int, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[1:], eps=EPS)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class BlockArgs(NamedTuple):
    """What a block of any form is built from."""

    dim: int
    hidden: int
    mixer: Callable[[int], nn.Module]
    drop_path: float
    layer_scale_init: float | None

    def layer_scale(self) -> nn.Module:
        off = self.layer_scale_init is None or self.layer_scale_init is False
        return nn.Identity() if off else LayerScale(self.dim, self.layer_scale_init or 0.0)


class Block(nn.Module):
    """x + ls1 mixer(norm1 x), then x + ls2 mlp(norm2 x), with stochastic depth on both branches; (B, C, H, W).

    With `fused`, one norm `norm_reparam` stands for norm1 and mixer: the paper's inference form (Algorithm 2).
    """

    def __init__(self, args: BlockArgs, fused: bool = False) -> None:
        super().__init__()
        self.args, self.fused = args, fused
        if fused:
            self.norm_reparam = nn.GroupNorm(1, args.dim)
        else:
            self.norm1 = nn.GroupNorm(1, args.dim)
            self.token_mixer = args.mixer(args.dim)
        self.layer_scale1 = args.layer_scale()
        self.drop_path1 = DropPath(args.drop_path)
        self.norm2 = nn.GroupNorm(1, args.dim)
        self.mlp = Mlp(args.dim, args.hidden, partial(nn.Conv2d, kernel_size=1))
        self.layer_scale2 = args.layer_scale()
        self.drop_path2 = DropPath(args.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm_reparam(x) if self.fused else self.token_mixer(self.norm1(x))
        x = x + self.drop_path1(self.layer_scale1(mixed))
        return x + self.drop_path2(self.layer_scale2(self.mlp(self.norm2(x))))


class FullBlock(nn.Module):
    """Everything folded, channels-last tokens (B, H, W, C). For inference: no layer scale, no stochastic depth."""

    def __init__(self, args: BlockArgs) -> None:
        super().__init__()
        self.args = args
        self.norm_reparam = TokenNorm(args.dim, affine=True)
        self.norm2 = TokenNorm(args.dim, affine=False)
        self.mlp = Mlp(args.dim, args.hidden, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm_reparam(x)
        return x + self.mlp(self.norm2(x))


State = dict[str, Tensor]


def _float64(block: Mapping[str, Tensor]) -> State:
    return {name: value.detach().double() for name, value in block.items()}


def _like(state: State, block: Mapping[str, Tensor]) -> State:
    dtype = block["norm2.weight"].dtype
    return {name: value.to(dtype).contiguous() for name, value in state.items()}


def _norm(block: State) -> State:
    if "norm_reparam.weight" in block:
        return block
    gamma, beta = block["norm1.weight"], block["norm1.bias"]
    if "token_mixer.affine.weight" in block:
        scale, shift = block["token_mixer.affine.weight"].flatten(), block["token_mixer.affine.bias"]
        gamma, beta = gamma * (scale - 1), beta * (scale - 1) + shift
    kept = {name: value for name, value in block.items() if not name.startswith(("norm1.", "token_mixer."))}
    return {"norm_reparam.weight": gamma, "norm_reparam.bias": beta} | kept


def fold_norm(block: Mapping[str, Tensor]) -> State:
    """Absorb the affine mixer into the norm before it (RIFormer, CVPR 2023, Eq. 3-4).

    The mixer computes A(z) = s z + t - z on z = gamma n + beta, n being the normalised input. So the branch is again a
    norm, with gamma' = gamma (s - 1) and beta' = beta (s - 1) + t. An identity mixer (no tensors of its own) leaves
    gamma and beta as they are.

    Args:
        block: state dict of one block in form "train": `norm1.*` of shape (C,), `token_mixer.affine.weight`
            (C, 1, 1, 1) and `.bias` (C,) if the mixer is affine, and the rest of the block.

    Returns:
        State dict of the block in form "norm": `norm_reparam.{weight,bias}` instead of `norm1` and `token_mixer`.
    """
    return _like(_norm(_float64(block)), block)


def fold_full(block: Mapping[str, Tensor]) -> State:
    """Absorb everything that is affine per channel: the mixer, both layer scales and the affine of norm2.

    With gamma', beta' of `fold_norm`, layer scales l1 and l2, norm2's gamma2 and beta2, and the MLP W1, b1, W2, b2:
    norm_reparam is (l1 gamma', l1 beta'), fc1 is (W1 diag(gamma2), b1 + W1 beta2), fc2 is (diag(l2) W2, l2 b2). This
    goes further than the paper, which leaves layer scales and norm2 alone; it is as exact.

    Args:
        block: state dict of one block in form "train" or "norm"; MLP weights (out, in, 1, 1).

    Returns:
        State dict of the block in form "full": `norm_reparam.{weight,bias}` (C,), `mlp.fc{1,2}.weight` (out, in) and
        `.bias` (out,).
    """
    state = _norm(_float64(block))
    gamma, beta = state["norm_reparam.weight"], state["norm_reparam.bias"]
    weight1, weight2 = state["mlp.fc1.weight"].flatten(1), state["mlp.fc2.weight"].flatten(1)
    bias1, bias2 = state["mlp.fc1.bias"] + weight1 @ state["norm2.bias"], state["mlp.fc2.bias"]
    weight1 = weight1 * state["norm2.weight"]
    if "layer_scale1.scale" in state:
        gamma, beta = gamma * state["layer_scale1.scale"], beta * state["layer_scale1.scale"]
    if "layer_scale2.scale" in state:
        scale = state["layer_scale2.scale"]
        weight2, bias2 = scale[:, None] * weight2, scale * bias2
    fused = {"norm_reparam.weight": gamma, "norm_reparam.bias": beta, "mlp.fc1.weight": weight1, "mlp.fc1.bias": bias1}
    return _like(fused | {"mlp.fc2.weight": weight2, "mlp.fc2.bias": bias2}, block)


BLOCKS: dict[str, Callable[[BlockArgs], nn.Module]] = {
    "train": Block,
    "norm": partial(Block, fused=True),
    "full": FullBlock,
}
FOLDS = {"norm": fold_norm, "full": fold_full}


def fuse_block(block: nn.Module, level: str) -> nn.Module:
    """A new block of form `level`, in training mode: the same function as `block`, which has an earlier form.

    Raises:
        ValueError: a norm of the block has another eps than 1e-5, the only one that fused blocks know.
    """
    assert isinstance(block.args, BlockArgs)
    for name, part in block.named_modules():
        if isinstance(part, nn.GroupNorm) and part.eps != EPS:
            raise ValueError(f"{name} has eps {part.eps:g}, a fused block computes with {EPS:g}; train with that one")
    with torch.device("meta"):
        fused = BLOCKS[level](block.args)
    fused.load_state_dict(FOLDS[level](block.state_dict()), assign=True)
    for name, part in fused.named_modules():
        if isinstance(part, DropPath):
            part.drop_prob = block.get_submodule(name).drop_prob  # which may have been changed since it was made
    return fused.requires_grad_(any(parameter.requires_grad for parameter in block.parameters()))
