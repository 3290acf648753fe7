"""A compiled run is the plain one through schedules, accumulation and a new start, with as few graphs as can be.

With aot_eager, which traces, differentiates and replays as a compiled run does, but with the plain kernels: what
differs is the compiler's doing, and nothing may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Tiny, randomise, strike_down
from test_train import Batches
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import kdlib as kd
from kdlib.data import Data
from kdlib.distiller import Distilled
from kdlib.losses import CrossEntropy, FeatureMSE, GramRelation, SoftTarget
from kdlib.training import compiling, passes
from kdlib.training.graphs import Graphs
from kdlib.training.train import Training
from kdlib.training.unchanged import unchanged

EPOCHS = 4


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(modules: Sequence[nn.Module], mode: str | None) -> None:
        compiled(modules, None)
        for module in modules if mode is not None else ():
            module.compile(fullgraph=True, dynamic=False, backend="aot_eager")

    compiled = compiling.compile_whole
    monkeypatch.setattr(compiling, "compile_whole", whole)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def training(folder: Path, mode: str, accumulate: int) -> Training:
    """One term moves each epoch, one ends for good after the second."""
    torch.manual_seed(0)
    data = Data("toy", tuple("abcde"), (0.0,) * 3, (1.0,) * 3, 3, 8, Batches(), Batches((3, 5)))
    student, model = randomise(Tiny(), 1), randomise(Tiny(), 9)
    student.drop.p = 0.0
    pairs = kd.pair(student, model, "stages.*.blocks.-1")
    terms = [
        kd.Term("soft", SoftTarget(), schedule=kd.Ramp(start=0, until=EPOCHS)),
        kd.Term("label", CrossEntropy(), 0.5),
        kd.Term("block", FeatureMSE(), 0.1, schedule=kd.Window(until=2), pairs=pairs),
        kd.Term("relation", GramRelation(), 0.1, schedule=kd.Window(until=2), pairs=pairs),
    ]
    distiller = kd.Distiller(student, terms)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2)
    scheduler = CosineLRScheduler(optimizer, t_initial=100, t_in_epochs=False)
    folder.mkdir(parents=True, exist_ok=True)
    teacher, accelerator = kd.Teacher(model, terms), Accelerator(cpu=True)
    return Training(
        distiller, teacher, data, optimizer, scheduler, accelerator, folder, EPOCHS, compile=mode, accumulate=accumulate
    )


def state(run: Training) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.distiller.state_dict().items()}


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("mode", "accumulate"), [("default", 1), ("default", 2), ("compiled-graphs", 2)])
def test_a_compiled_run_ends_as_the_plain_one_with_one_graph_more_when_terms_end(
    mode: str, accumulate: int, tmp_path: Path
) -> None:
    """Where there is no CUDA graph to record, it is compiled all the same."""
    plain = training(tmp_path / "plain", "off", accumulate)
    plain.run()
    assert graphs() == 0
    run = training(tmp_path / "compiled", mode, accumulate)
    seen: list[int] = []
    begin = run._set_epoch

    def told() -> None:
        seen.append(graphs())
        begin()

    run._set_epoch = told  # type: ignore[method-assign]
    run.run()
    assert run.passes.mode == "default", "it was not compiled at all"
    # at the beginning of each epoch, before what begins with it is tried out
    assert seen == [0, 2, 2, 4], "teacher and distiller once each, and once more when two terms end together"
    assert graphs() == 4
    for name, value in state(run).items():
        torch.testing.assert_close(value, state(plain)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teachers", [True, False])
def test_teachers_are_compiled_unless_they_are_left_out(teachers: bool, tmp_path: Path) -> None:
    run = training(tmp_path, "default", 1)
    run.compile_teacher = teachers
    run.run()
    assert run.distiller._compiled_call_impl is not None
    assert run.teacher is not None and (run.teacher._compiled_call_impl is not None) == teachers


def test_terms_may_end_one_after_the_other_and_runs_follow_each_other(tmp_path: Path) -> None:
    """Each time a term ends the distiller is compiled again, which torch by itself allows eight times a function."""
    for number in range(2):
        run = training(tmp_path / str(number), "default", 1)
        pairs = kd.pair(run.distiller.student, run.teacher.model, "stem")  # type: ignore[union-attr]
        ends = [kd.Term(f"until_{n}", FeatureMSE(), pairs=pairs, schedule=kd.Window(until=n)) for n in range(1, 11)]
        terms = [kd.Term("label", CrossEntropy()), *ends]
        run.distiller, run.teacher = kd.Distiller(run.distiller.student, terms), kd.Teacher(Tiny(), terms)
        run.optimizer, run.epochs = torch.optim.AdamW(run.distiller.parameters()), 11
        run.run()
        assert run.passes.mode == "default"
        assert run.distiller.live() == ("label",)
    assert graphs() == 2 * (11 + 1), "of each run: the distiller eleven times, the teacher as long as it is run, once"


class Asks(nn.Module):
    """Looks at a value while it runs, which no whole graph can."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean() * (1.0 if float(student.detach().sum()) > 0 else 2.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_term_that_begins_later_and_cannot_be_compiled_does_not_end_the_run(
    accumulate: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for mode in ("off", "default"):
        run = training(tmp_path / mode, mode, accumulate)
        assert run.teacher is not None
        late = kd.Term("late", Asks(), 0.1, schedule=kd.Window(start=2))
        student, model, terms = run.distiller.student, run.teacher.model, (*run.distiller.terms, late)
        student.drop.p = 0.1  # once it runs as it is, it draws what the plain one draws
        run.distiller, run.teacher = kd.Distiller(student, terms), kd.Teacher(model, terms)
        run.optimizer = torch.optim.AdamW(run.distiller.parameters(), lr=1e-2)
        run.scheduler = CosineLRScheduler(run.optimizer, t_initial=100, t_in_epochs=False)
        torch.manual_seed(0)
        run.run()
        runs.append(run)
    plain, compiled = runs
    assert compiled.passes.mode == "default", "the teacher is compiled still"
    assert compiled.teacher is not None and compiled.teacher._compiled_call_impl is not None
    assert compiled.distiller._compiled_call_impl is None and compiled.distiller.live() == ("soft", "label", "late")
    told = [line for line in capsys.readouterr().out.split("train: ") if line.startswith("compiled (default)")]
    assert ["cannot be taken whole (student: " in " ".join(line.split()) for line in told] == [False, True]
    for name, value in state(compiled).items():
        torch.testing.assert_close(value, state(plain)[name], rtol=1e-5, atol=1e-6)


def test_what_is_tried_out_for_terms_that_begin_leaves_no_trace(tmp_path: Path) -> None:
    run = training(tmp_path, "default", 1)
    tried: list[tuple[str, ...]] = []
    run._batches, batches = lambda start: tried.append(run.distiller.live()) or batches(start), run._batches  # type: ignore

    def step(images: Tensor, targets: dict[str, Tensor]) -> None:
        assert all(parameter.grad is None for parameter in run.distiller.parameters())
        assert torch.equal(torch.get_rng_state(), before)

    before = torch.get_rng_state()
    run._step = step  # type: ignore[method-assign]
    run.run()
    whole = ("soft", "label", "block", "relation")
    assert tried == [whole, whole, whole, whole[:2], whole[:2], whole[:2]], "each epoch, and where terms are new"
    assert torch.equal(run.distiller.student.norm.num_batches_tracked, torch.tensor(0))


class Recording(Graphs):
    """Stands for CUDA graphs where no GPU is: plays the plain step, but as a replay must be, for what was live when it
    was recorded, and in the memory of then."""

    def record(self, images: Tensor, targets: Mapping[str, Tensor]) -> None:
        for parameter in self._parameters():
            parameter.grad = None
        with unchanged(self.modules, images.device, gradients=False):
            self.step(images, dict(targets))
        self._key, self._memory = self._told(images, targets), self._places()

    def __call__(self, images: Tensor, targets: Mapping[str, Tensor], adds: bool) -> Distilled:
        assert self._told(images, targets) == self._key, "to be recorded in the middle of an epoch"
        assert self._places() == self._memory, "the recording reads and writes what is no longer the run's"
        for parameter in () if adds else self._parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        return self.step(images, dict(targets))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules for parameter in module.parameters()]

    def _places(self) -> list[int]:
        found = [*self._parameters(), *(buffer for module in self.modules for buffer in module.buffers())]
        return [one.data_ptr() for tensor in found for one in (tensor, tensor.grad) if one is not None]


def stand_in(monkeypatch: pytest.MonkeyPatch, fails: tuple[str, ...] | None = None) -> list[tuple[str, ...]]:
    """Puts ``Recording`` in the place of CUDA graphs; gives the list of what it is recorded for."""
    recorded: list[tuple[str, ...]] = []

    def record(graphs: Graphs, images: Tensor, targets: Mapping[str, Tensor]) -> tuple[Graphs | None, str]:
        recorded.append(graphs.live())  # type: ignore[arg-type]
        if graphs.live() == fails:
            return None, "runs without CUDA graphs"
        graphs.record(images, targets)
        return graphs, "recorded"

    monkeypatch.setattr(passes, "Graphs", Recording)
    monkeypatch.setattr(passes, "try_graphs", record)
    return recorded


@pytest.mark.parametrize("fails", [("soft", "label"), None])
def test_a_step_that_can_no_longer_be_recorded_runs_as_it_is(
    fails: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = stand_in(monkeypatch, fails)
    plain = training(tmp_path / "plain", "off", 2)
    plain.run()
    capsys.readouterr()
    run = training(tmp_path / "graphs", "graphs", 2)
    run.run()
    assert recorded == [("soft", "label", "block", "relation"), ("soft", "label")]
    assert (run.passes.graphs is None) == (fails is not None)
    assert ("train: runs without CUDA graphs" in capsys.readouterr().out) == (fails is not None)
    for name, value in state(run).items():
        assert torch.equal(value, state(plain)[name]), name


@pytest.mark.parametrize("mode", ["default", "graphs", "compiled-graphs"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of four epochs, after a checkpoint in its middle; graphs on a GPU: test_graphs.py."""
    stand_in(monkeypatch)
    whole = training(tmp_path / "whole", mode, 2)
    whole.run()
    first = training(tmp_path / "stopped", mode, 2)
    first.save_every = 2
    strike_down(first, epoch=1, batch=5)
    second, begun = training(tmp_path / "stopped", mode, 2), []
    go_on = second._set_out
    second._set_out = lambda: begun.append((second.at.epoch, second.at.batch)) or go_on()  # type: ignore
    second.run()
    assert begun == [(1, 2)], "step 4 of 12"
    assert second.passes.mode == (None if mode == "graphs" else "default")
    assert (second.passes.graphs is None) == (mode == "default")
    for name, value in state(second).items():
        assert torch.equal(value, state(whole)[name]), name
