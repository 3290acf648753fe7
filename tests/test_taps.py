"""Taps: capture by name, silence outside the context, and every way in which a tap can be wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from conftest import Tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdlib.taps import Taps


def test_output_and_input_are_the_tensors_themselves(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student, ["stages.0.blocks.1", "stages.0.blocks.1:input", "stages.0.blocks.0"])
    with taps as seen:
        student(images)
    assert seen["stages.0.blocks.1:input"] is seen["stages.0.blocks.0"]
    torch.testing.assert_close(seen["stages.0.blocks.1"], student.stages[0].blocks[1](seen["stages.0.blocks.0"]))


def test_hooks_are_silent_outside_and_gone_after_remove(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student, ["stem"])
    with taps as seen:
        student(images)
    first = seen["stem"]
    student(images)
    assert seen["stem"] is first
    taps.remove()
    assert not student.stem._forward_hooks


def test_unknown_name_names_the_nearest(student: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"no tap 'stages.0.blocks.1.mixr' in Tiny; did you mean 'stages.0.blocks.1.mixer'"
    ):
        Taps(student, ["stages.0.blocks.1.mixr"])
    with pytest.raises(ValueError, match="only 'input'"):
        Taps(student, ["stem:inptu"])


class Odd(nn.Module):
    """Each way to be untappable."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.twice, self.pair = nn.Identity(), nn.Tanh(), Pair()
        self.changed, self.relu = nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a, _ = self.pair(x)
        return self.relu(self.changed(self.twice(self.twice(a))))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unused", "never fired in this forward: .'unused'"),
        ("twice", "'twice' fired twice"),
        ("pair", "'pair' gave tuple, not a tensor"),
        ("changed", "changed in place after their tap: .'changed'"),
    ],
)
def test_bad_taps_raise_and_name_themselves(name: str, message: str) -> None:
    model = Odd()
    with pytest.raises(RuntimeError, match=message), Taps(model, [name]):
        model(torch.randn(2, 3))


def test_an_error_of_the_model_passes_through(student: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="expected input"), Taps(student, ["head"]):
        student(torch.randn(4, 2, 8, 8))


def test_deepcopy_and_pickle_give_silent_independent_hooks(student: nn.Module, images: Tensor) -> None:
    student.taps = Taps(student, ["stem"])  # beside the model, as a Distiller holds it
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        with student.taps as seen:
            twin(images)
            assert not seen
            student(images)
        with twin.taps as seen:
            twin(images)
        assert seen["stem"].shape == (4, 6, 8, 8)


class Unusual(nn.Module):
    """Calls modules by keyword, and has one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(input=self.a(input=x))


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments_by_name_and_modules_of_two_names(compiled: bool) -> None:
    model, x = Unusual(), torch.randn(2, 3)
    taps = Taps(model, ["a:input", "b", "act:input"])
    look = torch.compile(taps.watch, fullgraph=True, backend="eager") if compiled else taps.watch
    _, seen = look(model, x)
    expected = {"a:input": x, "b": model.a(x), "act:input": model.a(x)}
    assert all(torch.equal(seen[name], value) for name, value in expected.items()) and len(seen) == 3


@pytest.mark.parametrize("stop", [False, True])
def test_early_stop_ends_the_forward_after_the_last_live_tap(student: nn.Module, images: Tensor, stop: bool) -> None:
    ran = []
    student.head.register_forward_hook(lambda *_: ran.append("head"))
    taps = Taps(student, ["stem", "stages.0.blocks.0", "stages.1.blocks.0"])
    taps.live = ("stem", "stages.0.blocks.0")
    answer, seen = taps.watch(student, images, stop_early=stop)
    assert (answer is None) == stop
    assert set(seen) == set(taps.live)
    assert ran == ([] if stop else ["head"])


def test_recomputation_under_checkpointing_leaves_the_capture_alone(student: nn.Module, images: Tensor) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = student

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model = Checkpointed().eval()
    with Taps(model, ["body.stages.0.blocks.0"]) as seen:
        out = model(images)
    captured = seen["body.stages.0.blocks.0"]
    (out.sum() + captured.square().sum()).backward()
    got = student.stem.weight.grad.clone()
    student.zero_grad()
    with Taps(student, ["stages.0.blocks.0"]) as seen:
        out = student(images)
    (out.sum() + seen["stages.0.blocks.0"].square().sum()).backward()
    assert torch.equal(got, student.stem.weight.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_set_before_compiling_fire_in_one_graph(student: nn.Module, images: Tensor, backend: str) -> None:
    taps = Taps(student.eval(), ["stages.0.blocks.0"])

    @torch.compile(fullgraph=True, backend=backend)
    def look(x: Tensor) -> Tensor:
        return taps.watch(student, x)[1]["stages.0.blocks.0"]

    for _ in range(2):
        torch.testing.assert_close(look(images), student.stages[0].blocks[0](student.stem(images)))


class InPlace(nn.Module):
    """Writes into what its norm returned, as ResNets do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(x))
        x += 1
        return x


def test_a_frozen_compiled_pass_keeps_what_is_changed_in_place_later(images: Tensor) -> None:
    model = InPlace().eval()
    taps = Taps(model, ["norm"])
    with pytest.raises(RuntimeError, match="changed in place after their tap"):
        taps.watch(model, images)
    _, plain = taps.watch(model, images, stop_early=True)
    look = torch.compile(lambda x: taps.watch(model, x)[1]["norm"], fullgraph=True, backend="aot_eager")
    look = torch.no_grad()(look)
    assert plain["norm"].min() < 0
    torch.testing.assert_close(look(images), plain["norm"])


def test_what_changes_between_two_taps_is_told_though_the_pass_ends_early(images: Tensor) -> None:
    model = InPlace().eval()
    with pytest.raises(RuntimeError, match=r"changed in place after their tap: .'norm'"):
        Taps(model, ["norm", "act"]).watch(model, images, stop_early=True)


def test_taps_fire_in_inference_mode(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student.eval(), ["stages.0.blocks.0"])
    with torch.inference_mode():
        _, seen = taps.watch(student, images)
    assert seen["stages.0.blocks.0"].is_inference()


def test_a_pass_that_ran_as_it_is_may_be_compiled_afterwards(student: nn.Module, images: Tensor) -> None:
    taps = Taps(student.eval(), ["stages.0.blocks.0"])
    _, plain = taps.watch(student, images)
    look = torch.compile(lambda x: taps.watch(student, x)[1]["stages.0.blocks.0"], fullgraph=True, backend="eager")
    torch.testing.assert_close(look(images), plain["stages.0.blocks.0"])


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_told_to_come_before(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Tiny()
    with pytest.raises(ValueError, match=r"no tap 'stem' in \w+, which wraps the model .*wrap or compile afterwards"):
        Taps(wrap(net), ["stem"])


def test_a_nested_tensor_is_told_how_to_come_undone() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    taps = Taps(model, ["layers.0"])
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with (
        pytest.raises(RuntimeError, match=r"gave a nested tensor, .*enable_nested_tensor=False"),
        torch.no_grad(),
        taps,
    ):
        model(torch.randn(2, 3, 8), src_key_padding_mask=mask)
