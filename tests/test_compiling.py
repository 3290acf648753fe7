"""torch.compile of a run: each model whole or not at all, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch._dynamo.config as dynamo
import torch._functorch.config as functorch
from conftest import Tiny, randomise
from torch import Tensor, nn

import kdlib as kd
from kdlib.losses import FeatureMSE, GramRelation, SoftTarget
from kdlib.training import compiling

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


class Asks(nn.Module):
    """Looks at a value while it runs, which no whole graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else -x


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("out of numbers")


def pair_of(student: nn.Module) -> tuple[kd.Distiller, kd.Teacher]:
    model = randomise(Tiny(), 9)
    terms = [kd.Term("soft", SoftTarget()), kd.Term("mixer", FeatureMSE(), pairs=kd.pair(student, model, "stem"))]
    return kd.Distiller(student, terms), kd.Teacher(model, terms)


def step_of(distiller: kd.Distiller, teacher: kd.Teacher, images: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = distiller(images, teacher(images)).loss
        loss.backward()
        return loss

    return step


@pytest.mark.parametrize(
    ("mode", "on_cpu", "on_gpu"),
    [
        ("auto", None, "default"),
        ("off", None, None),
        ("default", "default", "default"),
        ("reduce-overhead", "reduce-overhead", "reduce-overhead"),
    ],
)
def test_auto_compiles_on_a_gpu_only(mode: str, on_cpu: str | None, on_gpu: str | None) -> None:
    assert compiling.resolve(mode, CPU) == on_cpu
    assert compiling.resolve(mode, torch.device("cuda")) == on_gpu


def parts(distiller: kd.Distiller, teacher: kd.Teacher) -> dict[str, nn.Module]:
    return {"teacher": teacher, "student": distiller}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph or none, by a backend that makes no kernels: inductor takes half a minute."""

    def compile_whole(modules: Sequence[nn.Module], mode: str | None) -> None:
        for module in modules:
            module._compiled_call_impl = None
            if mode is not None:
                module.compile(fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(compiling, "compile_whole", compile_whole)


@pytest.mark.parametrize("broken", [("student",), ("teacher",), ("teacher", "student")])
def test_what_cannot_be_compiled_whole_runs_as_it_is_and_one_line_says_why(
    broken: tuple[str, ...], images: Tensor, quick: None
) -> None:
    student = randomise(Tiny())
    student.drop = Asks() if "student" in broken else nn.Identity()
    distiller, teacher = pair_of(student)
    if "teacher" in broken:
        teacher.model.drop = Asks()
    step, modules = step_of(distiller, teacher, images), parts(distiller, teacher)
    plain = step()
    mode, line = compiling.rehearse(step, modules, "default", CPU)
    if len(broken) == 2:
        assert mode is None and line.startswith("runs without torch.compile, which cannot take it whole (teacher: ")
        assert "; student: " in line
    else:
        assert mode == "default" and line.startswith("compiled (default), first step ")
        assert f" s, but for what cannot be taken whole ({broken[0]}: " in line
    asked = 1 + Path(__file__).read_text().splitlines().index("        return x if float(x.detach().sum()) > 0 else -x")
    assert "\n" not in line and line.count(f", at test_compiling.py:{asked}") == len(broken)
    for name, module in modules.items():
        assert (module._compiled_call_impl is None) == (name in broken), name
    torch.testing.assert_close(step(), plain)


def test_a_student_that_changes_a_tap_in_place_is_refused_compiled_or_not(images: Tensor, quick: None) -> None:
    """A compiled pass cannot tell; the rehearsal takes one without the compiler."""
    student = randomise(Tiny())
    student.stem.register_forward_hook(lambda _, __, output: output.add_(1))  # before the tap's own
    distiller, teacher = pair_of(student)
    student.stages[0].down.register_forward_pre_hook(lambda _, given: (given[0].add_(1),))
    with pytest.raises(RuntimeError, match="tensors were changed in place after their tap: \\['stem'\\]"):
        compiling.rehearse(step_of(distiller, teacher, images), parts(distiller, teacher), "default", CPU)


def test_an_error_of_the_models_own_comes_through(images: Tensor) -> None:
    student = randomise(Tiny())
    student.drop = Fails()
    distiller, teacher = pair_of(student)
    with pytest.raises(ArithmeticError, match="out of numbers"):
        compiling.rehearse(step_of(distiller, teacher, images), parts(distiller, teacher), "default", CPU)


@pytest.mark.parametrize("breaks", [True, False])
def test_the_rehearsal_leaves_no_trace(images: Tensor, breaks: bool, quick: None) -> None:
    student = randomise(Tiny())
    student.train()
    if breaks:
        student.stages[1].blocks[1].mixer = Asks()
    distiller, teacher = pair_of(student)
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    drawn = torch.get_rng_state()
    compiling.rehearse(step_of(distiller, teacher, images), parts(distiller, teacher), "default", CPU)
    for name, value in distiller.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in distiller.parameters())


def test_the_compiler_is_left_as_it_was() -> None:
    def now() -> dict[str, object]:
        return {name: getattr(functorch, name) for name in compiling.BACKWARD}

    def fails() -> None:
        with compiling.set_up("default", 5):
            assert now() == compiling.BACKWARD
            assert dynamo.cache_size_limit == limit + 5
            compiling.compile_whole([], "default")
            raise ArithmeticError

    limit, usual = dynamo.cache_size_limit, dict.fromkeys(compiling.BACKWARD, "same_as_forward")
    with functorch.patch(usual):
        with pytest.raises(ArithmeticError):
            fails()
        assert now() == usual and dynamo.cache_size_limit == limit
        with compiling.set_up("graphs", 5):
            assert now() == usual


@pytest.mark.slow
def test_a_compiled_step_is_the_plain_one(images: Tensor) -> None:
    gradients = []
    for mode in (None, "default"):
        student = randomise(Tiny())
        student.drop.p = 0.0  # a compiled graph draws other random numbers
        distiller, teacher = pair_of(student)
        if mode is not None:
            found, line = compiling.rehearse(step_of(distiller, teacher, images), parts(distiller, teacher), mode, CPU)
            assert found == mode and line.startswith("compiled (default), first step ")
            assert distiller._compiled_call_impl is not None
        for weight in (1.0, 0.3, 0.0):  # a schedule that moves a weight and then switches its term off
            distiller.set_weights({"mixer": weight})
            loss = step_of(distiller, teacher, images)()
        gradients.append([loss, *(p.grad for p in student.parameters())])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not compiling.BACKWARD, reason="this torch compiles backward passes under autocast always")
def test_losses_keep_their_precision_backward_beside_autocast(images: Tensor) -> None:
    """The student's gradient of a Gram under autocast is that of the run that is not compiled."""
    model = randomise(Tiny(), 9)
    found = []
    for mode in (None, "aot_eager"):
        student = randomise(Tiny(), 1)
        student.drop.p = 0.0
        terms = [kd.Term("relation", GramRelation(), pairs=kd.pair(student, model, "stages.*.blocks.-1"))]
        distiller = kd.Distiller(student, terms)
        if mode is not None:
            distiller.compile(fullgraph=True, backend=mode)
        with compiling.set_up("default", 1):  # as in a run that is compiled
            with torch.autocast("cpu", torch.bfloat16):
                loss = distiller(images, kd.Teacher(model, terms)(images)).loss
            loss.backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in distiller.parameters()])
    assert any(plain.abs().max() > 0 for plain in found[0])
    for plain, compiled in zip(*found, strict=True):
        assert (plain - compiled).abs().max() <= 1e-5 * plain.abs().max()
