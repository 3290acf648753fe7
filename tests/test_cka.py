"""CKA against its definitions written plainly, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kdlib.cka import cka_matrix, hsic, linear_cka


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(x: Tensor, y: Tensor) -> float:
    """Kornblith et al., the form with the cross-covariance: ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def u_statistic(x: Tensor, y: Tensor) -> float:
    """HSIC as what it estimates without bias, the mean over all ordered quadruples of images (Song, Eq. 2)."""
    k, ell = (x @ x.T).tolist(), (y @ y.T).tolist()
    quadruples = list(itertools.permutations(range(len(x)), 4))
    total = sum(k[i][j] * (ell[i][j] + ell[q][r] - 2 * ell[i][q]) for i, j, q, r in quadruples)
    return total / len(quadruples)


def kernel(x: Tensor) -> Tensor:
    return (x @ x.T).fill_diagonal_(0)[None]


def test_linear_cka_is_its_definition_and_ignores_rotation_scale_and_shift() -> None:
    x, y = drawn(20, 3, 2, 2), drawn(20, 5, seed=1)
    torch.testing.assert_close(float(linear_cka(x, y)), definition(x.flatten(1), y))
    rotation = torch.linalg.qr(drawn(5, 5, seed=2)).Q
    assert math.isclose(float(linear_cka(y, 7 * y @ rotation + 3)), 1, rel_tol=1e-12)
    assert linear_cka(x.float(), y.float()).dtype == torch.float64


def test_hsic_is_the_unbiased_estimator() -> None:
    x, y = drawn(7, 3), drawn(7, 4, seed=1)
    torch.testing.assert_close(hsic(kernel(x), kernel(y)).item(), u_statistic(x, y), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hsic(kernel(x + 5), kernel(y)).item(), u_statistic(x, y), rtol=1e-9, atol=1e-12)


def test_the_matrix_sums_over_batches_before_it_divides() -> None:
    batches = [([drawn(6, 3, seed=i), drawn(6, 2, 2, seed=10 + i)], [drawn(6, 4, seed=20 + i)]) for i in range(3)]
    found = cka_matrix(batches)
    assert found.shape == (2, 1) and found.dtype == torch.float64
    for layer in range(2):
        pairs = [(ours[layer].flatten(1), theirs[0]) for ours, theirs in batches]
        cross, own, other = (
            sum(u_statistic(*pair) for pair in chosen)
            for chosen in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
        )
        torch.testing.assert_close(found[layer, 0].item(), cross / math.sqrt(own * other), rtol=1e-10, atol=1e-12)


def test_equal_layers_are_1_and_strangers_about_0_where_the_definition_is_biased() -> None:
    x, y = drawn(64, 200), drawn(64, 200, seed=1)
    found = cka_matrix([([x, y], [2 * x])])
    torch.testing.assert_close(found[0, 0].item(), 1.0)
    assert abs(found[1, 0]) < 0.1 and linear_cka(x, y) > 0.6


def test_with_many_images_both_agree() -> None:
    x = drawn(2000, 6)
    y = x @ drawn(6, 6, seed=1) + drawn(2000, 6, seed=2)
    batches = [([a], [b]) for a, b in zip(x.split(100), y.split(100), strict=True)]
    torch.testing.assert_close(cka_matrix(batches).item(), definition(x, y), rtol=0.02, atol=0)


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ValueError, match="at least 4 images in a batch, got 3"):
        cka_matrix([([drawn(3, 2)], [drawn(3, 2)])])
    with pytest.raises(ValueError, match=r"got \[4, 5\]"):
        linear_cka(drawn(4, 2), drawn(5, 2))
    with pytest.raises(ValueError, match="at least one batch"):
        cka_matrix([])
