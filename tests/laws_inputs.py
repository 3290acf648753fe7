"""What every loss must make of the inputs that people have: mixed precisions, odd strides, extreme sizes.

Laws like those of laws.py, over the same subjects; test_losses_laws.py runs both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from laws import Law, Subject, each, finite, fresh, leaves
from torch import Tensor


def floats(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return each(x, lambda t: change(t.detach()) if t.is_floating_point() else t)


def measured(case: Subject, loss: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    """Value and the student's gradient, of a copy of the loss (one that remembers would change)."""
    student = each(inputs[0], lambda t: t.detach().requires_grad_())
    value = case.value(copy.deepcopy(loss), (student, *inputs[1:]))
    value.backward()
    grads = [leaf.grad for leaf in leaves(student)]
    assert all(grad is not None for grad in grads)
    return value.detach(), [grad for grad in grads if grad is not None]


def law_precision_is_the_students(case: Subject) -> None:
    """Whatever the precision of the teacher is."""
    inputs = case.inputs()
    loss = case.fitted(inputs)
    expected, _ = measured(case, loss, inputs)
    for dtype in (torch.float32, torch.float64):
        for other in (torch.float16, torch.float32, torch.float64):
            mixed = tuple(
                floats(x, partial(torch.Tensor.to, dtype=d))
                for x, d in zip(inputs, [dtype, other, other], strict=False)
            )
            value, grads = measured(case, loss, mixed)
            assert value.dtype == dtype, (dtype, other)
            assert all(grad.dtype == dtype for grad in grads)
            torch.testing.assert_close(value.float(), expected, rtol=0.02, atol=1e-4)


def law_teacher_may_come_from_inference_mode(case: Subject) -> None:
    inputs = case.inputs()
    loss = case.fitted(inputs)
    with torch.inference_mode():
        teachers = [floats(x, torch.clone) for x in inputs[1:]]
    expected, grads = measured(case, loss, inputs)
    value, again = measured(case, loss, (inputs[0], *teachers))
    assert torch.equal(value, expected)
    assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))


def law_integers_of_any_kind(case: Subject) -> None:
    """Labels and indices; and a label that is no class is an error, not a number."""
    inputs = case.inputs()
    whole = [i for i, x in enumerate(inputs) if not isinstance(x, list) and not x.is_floating_point()]
    loss = case.fitted(inputs)
    for i in whole:
        expected, _ = measured(case, loss, inputs)
        for dtype in (torch.uint8, torch.int32):
            value, _ = measured(case, loss, (*inputs[:i], inputs[i].to(dtype), *inputs[i + 1 :]))
            assert torch.equal(value, expected), dtype
    for i in whole if "labels" in case.against else []:
        for wrong in (case.classes, -1):
            labels = inputs[i].clone()
            labels[1] = wrong
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                loss(*inputs[:i], labels, *inputs[i + 1 :])


def law_inputs_are_left_alone(case: Subject) -> None:
    inputs = case.inputs()
    loss = case.fitted(inputs)
    before = [(t, t._version, t.detach().clone()) for x in inputs for t in leaves(x)]
    finite(case, loss, inputs)
    assert all(t._version == version and torch.equal(t, values) for t, version, values in before)


def law_strides_do_not_matter(case: Subject) -> None:
    """Slices of something larger, and transposed tensors."""

    def sliced(t: Tensor) -> Tensor:
        whole = torch.full((2 * t.shape[0], *t.shape[1:]), 7.0)
        whole[::2] = t
        return whole[::2]

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    inputs = case.inputs(batch=5)
    loss = case.fitted(inputs)
    expected, grads = measured(case, loss, inputs)
    for change in (sliced, transposed):
        value, again = measured(case, loss, tuple(floats(x, change) for x in inputs))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        for grad, other in zip(grads, again, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def law_autocast_changes_nothing(case: Subject) -> None:
    inputs = case.inputs()
    loss = case.fitted(inputs)
    expected, _ = measured(case, loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = measured(case, loss, inputs)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(value, expected)


def law_gradient_is_that_of_the_value(case: Subject) -> None:
    """By finite differences, in float64."""
    inputs = case.inputs(batch=3, dtype=torch.float64, grid=(2, 3), channels=4)
    loss = case.fitted(inputs).double()
    if hasattr(loss, "z"):
        loss.z.fill_(30.0)  # which the first batch would set, as a constant

    def value(*students: Tensor) -> Tensor:
        student = list(students) if case.lists else students[0]
        return case.value(copy.deepcopy(loss), (student, *inputs[1:]))

    assert torch.autograd.gradcheck(value, leaves(fresh(inputs[0])), eps=1e-6, atol=1e-6, rtol=1e-4)


def law_single_precision_is_enough(case: Subject) -> None:
    """At 1000 classes, or 32 channels of 14×14: within what the references allow."""
    case.classes = 1000
    sizes: dict[str, Any] = {} if case.view in ("logits", "embedding") else {"grid": (14, 14), "channels": 32}
    inputs = tuple(floats(x, torch.Tensor.float) for x in case.inputs(batch=16, seed=2, **sizes))
    loss = case.fitted(inputs)
    value, grads = measured(case, loss, inputs)
    exact, expected = measured(case, loss.double(), tuple(floats(x, torch.Tensor.double) for x in inputs))
    assert abs(value.item() - exact.item()) <= 1e-5 * abs(exact.item())
    for grad, other in zip(grads, expected, strict=True):
        assert (grad - other).abs().max() <= 1e-4 * other.abs().max()


def law_finite_at_any_scale(case: Subject) -> None:
    for scale in (1e-30, 1e-12, 1e-6, 1e4):
        tiny, usual = case.inputs(scale=scale, seed=3), case.inputs(seed=4)
        loss = case.fitted(usual)
        for student, against in ((tiny[0], tiny[1:]), (tiny[0], usual[1:]), (usual[0], tiny[1:])):
            finite(case, copy.deepcopy(loss), (fresh(student), *against))


def law_an_empty_batch_is_named(case: Subject) -> None:
    inputs = case.inputs()
    loss = case.fitted(inputs)
    with pytest.raises(ValueError, match=f"{type(loss).__name__} is given an empty batch"):
        loss(*(each(x, lambda t: t[:0]) for x in inputs))


LAWS: list[Law] = [law for name, law in list(globals().items()) if name.startswith("law_")]
