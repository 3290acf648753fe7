"""The kernels of a fused RIFormer: the algebra in float64, the kernels interpreted on a CPU, and on a GPU if any."""

from __future__ import annotations

import textwrap

import pytest
import timm
import torch
from conftest import interpreted
from torch import nn

pytest.importorskip("triton")

from recipes.riformer import fast, model
from recipes.riformer.fusion import BlockArgs, FullBlock


def random_blocks(dim: int, count: int = 2) -> nn.Sequential:
    torch.manual_seed(dim)
    args = BlockArgs(dim, 4 * dim, nn.Identity, 0.0, None)
    blocks = nn.Sequential(*(FullBlock(args) for _ in range(count))).eval()
    for parameter in blocks.parameters():
        nn.init.normal_(parameter, 0.05, 0.15)
    return blocks


def uneven(*shape: int) -> torch.Tensor:
    """Tokens whose channels have means and spreads of their own, far from zero."""
    return torch.randn(shape) * (0.1 + torch.rand(shape[-1])) + 5 * torch.randn(shape[0], 1, 1, shape[-1])


@pytest.mark.parametrize("dim", [3, 16, 48])
def test_both_norms_follow_from_each_channels_mean_and_variance(dim: int) -> None:
    block: FullBlock = random_blocks(dim, 1).double()[0]
    x = uneven(3, 5, 7, dim).double()
    a, b, p, q = (each[:, None, None] for each in fast.scales(x, block.norm_reparam.weight, block.norm_reparam.bias))
    first = x + block.norm_reparam(x)
    torch.testing.assert_close(a * x + b, first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p * x + q, block.norm2(first), rtol=1e-11, atol=1e-11)


INTERPRETED = textwrap.dedent(
    """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    from recipes.riformer.fast import FastBlocks, Tile
    from test_fast import random_blocks, uneven

    # dim, (B, H, W), on chip or not: one, two and three parts; tiles that cross images and reach over the end
    for dim, shape, on_chip in (
        (16, (3, 3, 5), True), (32, (2, 4, 4), True), (48, (3, 5, 7), True), (96, (1, 3, 3), True),
        (48, (3, 5, 7), False), (80, (2, 3, 3), False),
    ):
        blocks, x = random_blocks(dim), uneven(*shape, dim)
        tile = Tile(M=16, N=32) if on_chip else Tile(M=32, N=32, K=16, G=2)
        with torch.no_grad():
            expected = blocks.double()(x.double())
            found = FastBlocks(blocks.float(), on_chip, tile).run(x)
        wrong = float((found - expected).norm() / expected.norm())
        print(dim, on_chip, wrong)
        assert found.shape == x.shape and wrong < 1e-6, (dim, on_chip, wrong)
    """
)


def test_the_kernels_compute_what_the_blocks_do() -> None:
    assert len(interpreted(INTERPRETED).splitlines()) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_a_whole_model_is_as_near_to_float32_as_without_kernels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = timm.create_model("riformer_m36", depths=(2, 1, 1, 2), layer_scale_init=0.1).cuda().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim == 1 or "affine" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(5, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        exact = net(images)
        plain, kernels = (
            make(net).to(dtype)(images.to(dtype)).float()
            for make in (lambda n: model.fuse(n, "full"), fast.with_kernels)
        )
    wrong = [float((answer - exact).norm() / exact.norm()) for answer in (plain, kernels)]
    assert wrong[1] < max(2 * wrong[0], 1e-3), wrong


def test_elsewhere_the_model_is_the_fused_one() -> None:
    net = timm.create_model("riformer_s12", num_classes=10).eval()
    made, fused = fast.with_kernels(net), model.fuse(net, "full").eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(made(images), fused(images))
    again = fast.with_kernels(fused)
    assert torch.equal(again(images), fused(images)) and again is not fused
    assert [stage.blocks.on_chip for stage in made.stages] == [True, True, False, False]
    assert not isinstance(fused.stages[0].blocks, fast.FastBlocks)


def test_gradients_go_the_plain_way() -> None:
    blocks = fast.FastBlocks(random_blocks(64))
    x = torch.randn(2, 4, 4, 64, requires_grad=True)
    blocks(x).sum().backward()
    assert x.grad is not None and all(parameter.grad is not None for parameter in blocks.parameters())


@pytest.mark.parametrize("how", ["a state dict is loaded", "it runs with gradients"])
def test_copies_of_weights_are_dropped_when(how: str) -> None:
    blocks = fast.FastBlocks(random_blocks(64))
    blocks._weights = [(torch.zeros(1),)]
    with torch.no_grad():
        blocks(torch.randn(1, 2, 2, 64))
    assert blocks._weights
    if how == "a state dict is loaded":
        nn.Sequential(blocks).load_state_dict(nn.Sequential(blocks).state_dict())
    else:
        blocks(torch.randn(1, 2, 2, 64))
    assert not blocks._weights


def test_what_does_not_divide_into_tiles_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"48 channels and 192 hidden ones do not divide into tiles .* without kernels"
    ):
        fast.FastBlocks(random_blocks(48))
    with pytest.raises(ValueError, match="channels: got 80, expected 1, 2 or 3 times a power of two"):
        fast.FastBlocks(random_blocks(80), on_chip=True)
    with pytest.raises(ValueError, match="a pooling mixer reads its neighbours"):
        fast.with_kernels(timm.create_model("metaformer_pool_s12"))
