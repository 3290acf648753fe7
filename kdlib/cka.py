"""Centred kernel alignment: how alike two layers are, whatever their widths, up to rotation and scale.

The features of a layer for ``n`` images are an ``(n, d)`` matrix X (all that is not the batch flattened), its kernel
``X Xᵀ``. With the centred kernels K and L of two layers, ``CKA = <K, L> / (‖K‖ ‖L‖)``: 1 where they agree up to
rotation and scale. From small batches this is biased upwards, so over batches the unbiased estimator stands for <K, L>.

Sources: Kornblith et al., ICML 2019, arXiv 1905.00414, Eq. 1 and 3; Nguyen et al., ICLR 2021, arXiv 2010.15327, Eq. 2
and 3; Song et al., JMLR 13, 2012, Eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

LEAST = 4
"""Images of a batch; the unbiased estimator divides by n - 3."""


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """The definition: CKA of features ``(n, …)`` and ``(n, …)`` of the same images, 0 to 1, float64.

    Biased where n is not far above the widths: of independent features it is not 0. See ``cka_matrix``.

    Raises:
        ValueError: the numbers of images differ.
    """
    _same_images([x], [y])
    x, y = (f.flatten(1).double() - f.flatten(1).double().mean(0) for f in (x, y))
    k, ell = x @ x.mT, y @ y.mT
    return (k * ell).sum() / (k.norm() * ell.norm())


@torch.no_grad()
def cka_matrix(batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """CKA of every layer of one model with every layer of another, ``(layers, other layers)``, float64, on the CPU.

    The unbiased estimates of <K, L>, <K, K> and <L, L> are summed over batches before they are divided; layers that
    have nothing in common come out near 0, on either side of it. A layer that answers the same to all images gives NaN.

    Args:
        batches: of each batch the features ``(n, …)`` of both models, in the same order every time, n ≥ 4.

    Raises:
        ValueError: no batch, fewer than 4 images in one, or different numbers of images.
    """
    total: tuple[Tensor, Tensor, Tensor] | None = None
    for ours, theirs in batches:
        _same_images(ours, theirs)
        k, ell = _kernels(ours), _kernels(theirs)
        found = hsic(k, ell).cpu(), hsic(k, k).diagonal().cpu(), hsic(ell, ell).diagonal().cpu()
        total = found if total is None else (total[0] + found[0], total[1] + found[1], total[2] + found[2])
    if total is None:
        raise ValueError("CKA needs at least one batch of images, got none")
    cross, own, other = total
    return cross / (own[:, None] * other[None, :]).sqrt()


def hsic(k: Tensor, ell: Tensor) -> Tensor:
    """Unbiased estimate of <K, L> of centred kernels, for all pairs: ``(s, n, n)``, ``(t, n, n)`` to ``(s, t)``.

    Args:
        k, ell: kernels as they are, uncentred, with a diagonal of zeros.
    """
    n = k.shape[-1]
    traces = k.flatten(1) @ ell.flatten(1).mT
    rows, columns = k.sum(2), ell.sum(2)
    whole = rows.sum(1)[:, None] * columns.sum(1)[None, :]
    return (traces + whole / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ columns.mT) / (n * (n - 3))


def _kernels(features: Sequence[Tensor]) -> Tensor:
    """``(layers, n, n)``, the diagonals zero. Centred first, which changes no estimate but rounds less."""
    kernels = []
    for x in features:
        x = x.flatten(1).double()
        x = x - x.mean(0)
        kernels.append((x @ x.mT).fill_diagonal_(0))
    return torch.stack(kernels)


def _same_images(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    counts = {len(x) for x in (*ours, *theirs)}
    if len(counts) != 1:
        raise ValueError(f"CKA compares layers over the same images, got {sorted(counts)} of them; give equal batches")
    if (least := counts.pop()) < LEAST:
        raise ValueError(f"CKA needs at least {LEAST} images in a batch, got {least}")
