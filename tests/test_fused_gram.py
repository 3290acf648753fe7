"""The relation's kernels: interpreted on a CPU against the definition, and on a Hopper GPU if there is one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import pytest
import torch
from conftest import interpreted
from torch import Tensor

from kdlib.losses import GramRelation, fused_gram

INTERPRETED = textwrap.dedent(
    """
    import sys
    sys.path[:0] = [{root!r}, {tests!r}]
    import torch
    from kdlib.losses import fused_gram
    from test_fused_gram import definition, given

    # (B, N, C): channels that fill no power of two, tokens that fill no tile, one and two pieces of a Gram, chunks
    for shape in ((2, 9, 4), (3, 70, 16), (2, 150, 64), (2, 130, 96), (1, 200, 128), (2, 65, 48), (1, 400, 20)):
        for layout in ("tokens", "map"):
            for normalize in (True, False):
                exact = definition(*given(shape, layout, torch.float64), normalize)
                wrong = []
                for fused_gram.ROUND in (False, True):
                    s, t = given(shape, layout, torch.float32)
                    value = fused_gram.gram_gap(s, t, normalize)
                    (gradient,) = torch.autograd.grad(3 * value, s)
                    assert gradient.stride() == s.stride()
                    for mine, hers in zip((3 * value, gradient), exact):
                        wrong.append(float((mine - hers).norm() / hers.norm()))
                print(shape, layout, normalize, *wrong)
                assert max(wrong[:2]) < 1e-6, "in float32"
                assert max(wrong[2:]) < 1e-3, "in TF32"
    """
)


def given(shape: tuple[int, int, int], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens, as such or as a map reads; one of each is zero."""
    torch.manual_seed(sum(shape))
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2)]
    for i, x in enumerate(made):
        x[0, 3 + i] = 0
    if layout == "map":
        made = [x.mT.contiguous().mT for x in made]
    return made[0].requires_grad_(), made[1]


def definition(s: Tensor, t: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Three times the sum by Grams of tokens, and its gradient; a zero token is divided by 1."""
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (s, t)]
    u, v = (x / (n + (n == 0)) for x, n in zip((s, t), lengths, strict=True)) if normalize else (s, t)
    value = 3 * (u @ u.mT - v @ v.mT).square().sum()
    return value, torch.autograd.grad(value, s)[0]


def test_the_kernels_compute_the_definition() -> None:
    assert len(interpreted(INTERPRETED).splitlines()) == 28


def test_the_definition_here_is_the_loss() -> None:
    s, t = given((2, 9, 4), "tokens", torch.float64)
    value, gradient = definition(s, t, True)
    loss = 3 * GramRelation()(s, t) * 2 * 9 * 9
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], gradient)


def test_where_there_is_no_such_gpu_they_are_not_asked() -> None:
    assert not fused_gram.serves(torch.randn(2, 9, 4), torch.randn(2, 9, 4))


@pytest.fixture
def hopper() -> Iterator[None]:
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).major != 9:
        pytest.skip("needs a Hopper GPU")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(4, 784, 128), (4, 3136, 64), (2, 130, 96)])
@pytest.mark.parametrize("layout", ["tokens", "map"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_loss_is_as_near_to_float64_as_in_tf32(
    hopper: None, shape: tuple[int, int, int], layout: str, compiled: bool
) -> None:
    s, t = (x.detach().cuda() for x in given(shape, layout, torch.float32))
    s.requires_grad_()
    assert fused_gram.serves(s, t)
    loss = GramRelation()
    exact, by_s = definition(*given(shape, layout, torch.float64), True)
    value = (torch.compile(loss, fullgraph=True) if compiled else loss)(s, t)
    (gradient,) = torch.autograd.grad(value, s)
    scale = 3 * shape[0] * shape[1] ** 2
    assert abs(value.item() * scale / exact.item() - 1) < 2e-4
    assert (gradient.cpu() * scale - by_s).norm() < 3e-3 * by_s.norm()
    half = GramRelation()(s, t.bfloat16())
    assert abs(half.item() / value.item() - 1) < 1e-2
