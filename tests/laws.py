"""What every loss must obey. ``LAWS`` are functions of a ``Subject``; test_losses_laws.py runs each over ``LOSSES``.

A subject is derived from what the loss declares (view, against, lists, soft_labels, floor). ``SPECIAL`` holds only what
cannot be derived: constructor arguments, and what is peculiar to a loss. A loss of one's own passes through the same
laws: ``for law in LAWS: law(Subject("mine", MyLoss))``.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlib import losses
from kdlib.losses import LOSSES
from kdlib.losses.base import ORDER
from kdlib.losses.learned import Learned

CLASSES = 7
SAMPLES = 40
"""Size of the data set that indices are drawn from."""

NEW_ENOUGH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
NO_DATA_ON = "cuda" if NEW_ENOUGH or torch.cuda.is_available() else "cpu"
"""Device of tensors without data: older releases need a GPU even for these."""

Law = Callable[["Subject"], None]


@dataclass
class Subject:
    """One loss under test."""

    name: str
    make: Callable[[], Any]
    twin: Callable[[Any], Any] = field(default=lambda teacher: teacher)
    """The student that agrees with a teacher."""
    ordered: bool = False
    """Depends on the order of the batch."""
    random: bool = False
    """Draws numbers at each call."""
    classes: int = CLASSES

    def __post_init__(self) -> None:
        declared = self.make()
        self.view: str = declared.view
        self.against: tuple[str, ...] = declared.against
        self.lists: bool = declared.lists
        self.soft_labels: bool = declared.soft_labels
        self.floor: float | None = declared.floor
        self.learned = any(isinstance(part, Learned) for part in declared.modules())

    def fitted(self, inputs: tuple[Any, ...]) -> Any:
        """A loss of the size of these inputs, the same at every call."""
        torch.manual_seed(0)
        loss = self.make()
        student, teacher = lift(inputs[0]), lift(inputs[1 if "teacher" in self.against else 0])
        last = teacher[-1] if self.lists else teacher
        loss.fit(student, teacher, head=nn.Linear(last.shape[1], 5))
        return loss

    def shapes(self, batch: int = 4, grid: tuple[int, int] = (5, 5), channels: int = 8) -> list[tuple[int, ...]]:
        h, w = grid
        if self.lists:
            return [(batch, channels // 2, 2 * h, 2 * w), (batch, channels, h, w)]
        return {
            "logits": [(batch, self.classes)],
            "embedding": [(batch, 12)],
            "tokens": [(batch, h * w, channels)],
            "map": [(batch, channels, h, w)],
            "raw": [(batch, channels, h, w)],
        }[self.view]

    def inputs(
        self, batch: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0, **sizes: Any
    ) -> tuple[Any, ...]:
        """What ``forward`` takes: the student, a leaf that requires a gradient, and what it is against."""
        drawn = torch.Generator().manual_seed(seed)
        shapes = self.shapes(batch, **sizes)

        def features() -> Any:
            made = [(torch.randn(shape, generator=drawn) * scale).to(dtype).requires_grad_() for shape in shapes]
            return made if self.lists else made[0]

        labels = torch.randint(self.classes, (batch,), generator=drawn)
        indices = torch.randperm(SAMPLES, generator=drawn)[:batch]
        given = {"teacher": features, "labels": lambda: labels, "indices": lambda: indices}
        return (features(), *(given[need]() for need in self.against))

    def value(self, loss: Any, inputs: tuple[Any, ...]) -> Tensor:
        torch.manual_seed(1)
        result: Tensor = loss(*inputs)
        return result


LOGITS = losses.SoftTarget
SPECIAL: dict[str, dict[str, Any]] = {
    "ttm": {"twin": lambda teacher: 0.25 * teacher},
    "wttm": {"twin": lambda teacher: 0.25 * teacher},
    "standardized": {"make": partial(losses.Standardized, LOGITS(2.0)), "twin": lambda teacher: 3 * teacher + 1},
    "learnable_temperature": {"make": partial(losses.LearnableTemperature, LOGITS())},
    "top_k": {"make": partial(losses.TopK, LOGITS(), 3)},
    "correlation_congruence": {"ordered": True},
    "mgd": {"random": True},
    "crd": {"make": partial(losses.CRD, SAMPLES, dim=6, negatives=10), "random": True},
}


def subject(name: str, **chosen: Any) -> Subject:
    special = {"make": LOSSES[name]} | SPECIAL.get(name, {})
    return Subject(name, **special | {"make": partial(special["make"], **chosen)})


def choices(name: str) -> list[dict[str, Any]]:
    """The defaults of a loss, and one after the other each choice that it offers besides."""
    hints = get_type_hints(LOSSES[name].__init__)
    found: list[dict[str, Any]] = [{}]
    for argument, parameter in inspect.signature(LOSSES[name]).parameters.items():
        kinds = [hints[argument], *get_args(hints[argument])]
        offered = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        found += [{argument: value} for value in offered if value != parameter.default]
    return found


CASES = [(name, chosen) for name in sorted(LOSSES) for chosen in choices(name)]
"""The whole catalogue in all its variants."""


def label(case: Any) -> str | None:
    """How a part of ``CASES`` is called in the names of tests."""
    return ",".join(f"{k}={v}" for k, v in case.items()) or "default" if isinstance(case, dict) else None


def each(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return [change(item) for item in x] if isinstance(x, list) else change(x)


def leaves(x: Any) -> list[Tensor]:
    return list(x) if isinstance(x, list) else [x]


def lift(x: Any) -> Any:
    return each(x, lambda t: t.detach().float() if t.is_floating_point() else t)


def fresh(x: Any, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """New leaves with the same values, or changed ones."""
    return each(x, lambda t: change(t.detach()).clone().requires_grad_(t.is_floating_point()))


def finite(case: Subject, loss: Any, inputs: tuple[Any, ...]) -> Tensor:
    """Runs forward and backward; value and every gradient must be finite."""
    value = case.value(loss, inputs)
    value.backward()
    assert value.isfinite(), f"value {value}"
    for leaf in leaves(inputs[0]):
        assert leaf.grad is not None, "no gradient"
        assert leaf.grad.isfinite().all(), "gradient is not finite"
    for name, parameter in loss.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"gradient of {name} is not finite"
    return value


def law_declares_itself(case: Subject) -> None:
    loss = case.make()
    assert isinstance(loss, losses.Loss)
    assert case.view in ("logits", "embedding", "tokens", "map", "raw")
    assert case.against == tuple(need for need in ORDER if need in case.against)
    for name, parameter in inspect.signature(type(loss)).parameters.items():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD, f"a recipe cannot give {name}"
    text = type(loss).__doc__ or ""
    for word in ("Shapes:", "Floor:", ">>>"):
        assert word in text, f"the docstring lacks {word!r}"
    assert "arXiv:" in text or "no arXiv version" in text, "no citation"
    assert "abels" in text, "the docstring does not say which labels it needs"
    assert "labels" not in case.against or "oft" in text, "the docstring does not say whether soft labels are allowed"


def law_scalar_of_float32_from_any_float(case: Subject) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        inputs = case.inputs(dtype=dtype)
        value = case.value(case.fitted(inputs), inputs)
        assert value.shape == ()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), dtype
        value.backward()
        assert all(leaf.grad is not None and leaf.grad.dtype == dtype for leaf in leaves(inputs[0]))


def law_floor_where_they_agree(case: Subject) -> None:
    inputs = case.inputs(dtype=torch.float64)
    loss = case.fitted(inputs)
    if case.floor is not None:
        assert case.value(loss, inputs).item() > case.floor, "not above the floor where the two differ"
    if case.floor is None or case.learned or "teacher" not in case.against:
        return
    agreeing = (fresh(inputs[1], case.twin), *inputs[1:])
    value = case.value(loss, agreeing)
    assert abs(value.item() - case.floor) < 1e-6, f"{value.item()} at equality, floor {case.floor}"
    value.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves(agreeing[0])), "gradient at equality is not finite"


def law_gradient_to_the_student_only(case: Subject) -> None:
    inputs = case.inputs()
    finite(case, case.fitted(inputs), inputs)
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves(inputs[0])), "no gradient to the student"
    for x in inputs[1:]:
        assert all(leaf.grad is None for leaf in leaves(x)), "the teacher got a gradient"


def law_order_of_the_batch(case: Subject) -> None:
    if case.random:
        return
    inputs = case.inputs(batch=6, dtype=torch.float64)
    loss = case.fitted(inputs)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    shuffled = tuple(fresh(x, lambda t: t[order]) for x in inputs)
    same = torch.allclose(case.value(loss, inputs), case.value(copy.deepcopy(loss), shuffled), rtol=1e-9)
    assert same != case.ordered


def law_finite_at_extreme_logits(case: Subject) -> None:
    if case.view != "logits":
        return
    for dtype in (torch.float32, torch.float16):
        for seed in range(3):
            inputs = case.inputs(dtype=dtype, seed=seed)
            extremes = tuple(fresh(x, lambda t: t.sign() * 1e4 if t.is_floating_point() else t) for x in inputs)
            finite(case, case.fitted(extremes), extremes)
    inputs = case.inputs(batch=2)
    one = torch.zeros(2, case.classes)
    one[:, 0] = 1e4
    for student, teacher in ((one, -one), (-one, one), (one, one), (one, one.roll(1, 1))):
        given = (student.clone().requires_grad_(), *(teacher if x.ndim == 2 else x for x in inputs[1:]))
        finite(case, case.fitted(given), given)


def law_finite_at_large_features(case: Subject) -> None:
    if case.view != "logits":
        inputs = case.inputs(scale=1e3)
        finite(case, case.fitted(inputs), inputs)


def law_finite_at_constant_and_zero_features(case: Subject) -> None:
    """Each side alone and both, on a grid with more positions than channels and on one with fewer."""
    for grid in ((5, 5), (1, 3)):
        inputs = case.inputs(grid=grid)
        for level in (0.0, 0.1, 3.0):
            flat = tuple(fresh(x, partial(_filled, level)) for x in inputs)
            finite(case, case.fitted(inputs), (fresh(flat[0]), *inputs[1:]))
            finite(case, case.fitted(inputs), (fresh(inputs[0]), *flat[1:]))
            finite(case, case.fitted(inputs), flat)


def _filled(level: float, t: Tensor) -> Tensor:
    return torch.full_like(t, level) if t.is_floating_point() else t


def law_batch_of_one(case: Subject) -> None:
    inputs = case.inputs(batch=1)
    finite(case, case.fitted(inputs), inputs)


def law_grids(case: Subject) -> None:
    if case.view in ("logits", "embedding"):
        return
    for grid in ((1, 1), (3, 7), (6, 2)):
        inputs = case.inputs(grid=grid)
        finite(case, case.fitted(inputs), inputs)


def law_half_precision_at_large_maps(case: Subject) -> None:
    """Under autocast and from half inputs, the value is that of the same numbers in float64."""
    sizes: dict[str, Any] = {} if case.view in ("logits", "embedding") else {"grid": (28, 28), "channels": 64}
    batch = 64 if case.view in ("logits", "embedding") else 2
    if case.lists:
        sizes = {"grid": (14, 14), "channels": 32}
    if case.name == "crd":
        batch = 8
    scale = {"logits": 1.0, "embedding": 3.0}.get(case.view, 40.0)  # of embeddings, fourth powers must fit into half
    for dtype in (torch.float16, torch.bfloat16):
        inputs = case.inputs(batch=batch, dtype=dtype, scale=scale, **sizes)
        loss = case.fitted(inputs)
        exact = copy.deepcopy(loss).double()
        with torch.autocast("cpu", dtype):
            value = finite(case, loss, inputs)
        lifted = tuple(fresh(x, lambda t: t.double() if t.is_floating_point() else t) for x in inputs)
        expected = case.value(exact, lifted)
        if not case.random or case.name == "crd":
            assert value.item() == pytest.approx(expected.item(), rel=2e-3, abs=1e-5), dtype


def law_compiles_whole(case: Subject) -> None:
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        inputs = case.inputs()
        loss = case.fitted(inputs)
        expected = finite(case, copy.deepcopy(loss), inputs)
        grads = [leaf.grad for leaf in leaves(inputs[0])]
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        again = (fresh(inputs[0]), *inputs[1:])
        value = finite(case, compiled, again)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        for leaf, grad in zip(leaves(again[0]), grads, strict=True):
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def law_runs_on_a_gpu_without_waiting_for_it(case: Subject) -> None:
    """On tensors that have no data: reading a number, a boolean index or a tensor left on the CPU would raise.
    (The backward pass of such tensors needs a GPU, the forward pass does not.)"""
    inputs = case.inputs()
    loss = case.fitted(inputs)

    def move(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device=NO_DATA_ON).requires_grad_(t.requires_grad)

    fake = copy.deepcopy(loss)
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in [*fake.modules(), *(held for m in fake.modules() for held in getattr(m, "held", ()))]:
            for name, parameter in part._parameters.items():
                part._parameters[name] = None if parameter is None else nn.Parameter(move(parameter))
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else move(buffer)
        value = fake(*(each(x, move) for x in inputs))
        assert value.device.type == NO_DATA_ON


def law_memory_layout_does_not_matter(case: Subject) -> None:
    if case.view not in ("map", "raw"):
        return
    inputs = case.inputs()
    loss = case.fitted(inputs)
    expected = case.value(copy.deepcopy(loss), inputs)
    last = tuple(each(x, lambda t: t.to(memory_format=torch.channels_last)) for x in inputs)
    torch.testing.assert_close(case.value(loss, last), expected, rtol=1e-5, atol=1e-6)


def law_survives_copies(case: Subject) -> None:
    inputs = case.inputs()
    loss = case.fitted(inputs)
    copies = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), case.fitted(case.inputs(seed=5))]
    copies[-1].load_state_dict(loss.state_dict())
    value = case.value(loss, inputs)
    for other in copies:
        assert type(other) is type(loss)
        torch.testing.assert_close(case.value(other, inputs), value, rtol=0, atol=0)


def law_learned_parts_exist_and_train(case: Subject) -> None:
    inputs = case.inputs()
    loss = case.fitted(inputs)
    if not case.learned:
        assert case.make().state_dict().keys() == loss.state_dict().keys()
    else:
        bare = case.make()
        with pytest.raises(ValueError, match="fit"):
            bare(*inputs)
        loss.fit(lift(inputs[0]), lift(inputs[1]))
        other = case.inputs(channels=16)
        if case.view != "embedding":
            with pytest.raises(ValueError, match="was built for"):
                loss.fit(lift(other[0]), lift(other[1]))
    finite(case, loss, inputs)
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
    assert {name for name, _ in loss.named_parameters()} <= loss.state_dict().keys()


def law_soft_labels(case: Subject) -> None:
    if "labels" not in case.against:
        return
    inputs = list(case.inputs())
    loss = case.fitted(tuple(inputs))
    where = 1 + case.against.index("labels")
    inputs[where] = torch.full((4, case.classes), 1 / case.classes)
    if case.soft_labels:
        finite(case, loss, tuple(inputs))
    else:
        with pytest.raises(ValueError, match="integer labels"):
            loss(*inputs)


def law_refuses_what_does_not_fit(case: Subject) -> None:
    """Batches that differ are an error that names the loss."""
    if "teacher" not in case.against:
        return
    inputs = case.inputs()
    loss = case.fitted(inputs)
    wrong = list(inputs)
    wrong[1] = fresh(inputs[1], lambda t: t[:3])
    name = type(loss.loss if hasattr(loss, "loss") else loss).__name__
    with pytest.raises(ValueError, match=rf"{name}|TopK|HierarchicalContext"):
        loss(*wrong)


LAWS: list[Law] = [law for name, law in list(globals().items()) if name.startswith("law_")]
