"""What a step costs beside a loop by hand, counted: kernels over whole features, and those that walk two layouts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Tiny, randomise
from test_distiller import by_hand, objective
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdlib as kd
from kdlib.adapters import view_as
from kdlib.losses import LOSSES, FeatureMSE


class Kernels(TorchDispatchMode):
    """Counts kernels over tensors of at least ``least`` elements, and those whose tensors differ in layout."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.full, self.mixed = least, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((out, args, kwargs)) if isinstance(x, Tensor) and x.numel() >= self.least]
        if tensors and not func.is_view and "detach" not in str(func):
            self.full[str(func)] += 1
            alike = {x.stride() for x in tensors if x.shape == tensors[0].shape}
            self.mixed[str(func)] += len(alike) > 1
        return out


def counted(step: Callable[[], Tensor], least: int) -> Kernels:
    step().backward()  # gradients exist, as in every step but the first
    with Kernels(least) as kernels:
        step().backward()
    return kernels


def test_a_step_has_no_more_full_size_kernels_than_one_by_hand(images: Tensor, labels: Tensor) -> None:
    student, teacher = randomise(Tiny(), 1), randomise(Tiny(), 2)
    terms = objective(student, teacher)
    ask, distiller = kd.Teacher(teacher, terms), kd.Distiller(student, terms)
    ours = counted(lambda: distiller(images, ask(images) | {"@labels": labels}).loss, least=1000)
    hers = counted(lambda: by_hand(student, teacher, images, labels), least=1000)
    assert ours.full.total() <= hers.full.total(), ours.full - hers.full
    assert ours.mixed.total() <= hers.mixed.total(), ours.mixed - hers.mixed


def test_a_mean_over_elements_leaves_the_layout_of_the_backward_pass_alone(images: Tensor) -> None:
    student, teacher = randomise(Tiny(), 1), randomise(Tiny(), 2)
    terms = [kd.Term("block", FeatureMSE(), pairs=kd.pair(student, teacher, "stages.*.blocks.-1"))]
    distiller, targets = kd.Distiller(student, terms), kd.Teacher(teacher, terms)(images)
    kernels = counted(lambda: distiller(images, targets).loss, least=1000)
    assert kernels.full.total() > 20 and kernels.mixed.total() == 0, kernels.mixed


@pytest.mark.parametrize("name", ["feature_mse", "gram_relation", "cosine_distance", "pkd"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_features_gradient_is_laid_out_as_the_feature(name: str, memory: torch.memory_format) -> None:
    loss: nn.Module = LOSSES[name]()
    maps = [torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    student, teacher = (x.contiguous(memory_format=memory) for x in maps)
    views, images = loss.view, torch.Size((2, 3, 8, 8))
    seen: list[Tensor] = []
    student.requires_grad_().register_hook(seen.append)
    loss(view_as(student, views, "NCHW", images), view_as(teacher, views, "NCHW", images)).backward()
    assert seen[0].stride() == student.stride()
    plain = maps[0].detach().clone().requires_grad_()
    loss(*(x.flatten(2).mT if views == "tokens" else x for x in (plain, maps[1]))).backward()
    torch.testing.assert_close(seen[0], plain.grad)


def test_gradients_of_gradients_pass_through_a_view() -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    read = lambda x: view_as(x, "tokens", "NCHW", torch.Size((2, 3, 8, 8))).square().cumsum(1)  # noqa: E731
    assert torch.autograd.gradcheck(read, x) and torch.autograd.gradgradcheck(read, x)
