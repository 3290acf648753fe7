"""A compiled run is the plain one through schedules, accumulation and a new start, with as few graphs as can be.

With aot_eager, which traces, differentiates and replays as a compiled run does, but with the plain kernels: what
differs is the compiler's doing, and nothing may.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Tiny, randomise
from test_train import Batches
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import kdlib as kd
from kdlib.data import Data
from kdlib.losses import CrossEntropy, FeatureMSE, GramRelation, SoftTarget
from kdlib.training import compiling
from kdlib.training.train import Training

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
    assert run.mode == "default", "it was not compiled at all"
    # before the rehearsal, then at the beginning of each epoch
    assert seen == [0, 2, 2, 2, 4], "teacher and distiller once each, and once more when two terms end together"
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
        assert run.mode == "default"
        assert run.distiller.live() == ("label",)
    assert graphs() == 2 * (11 + 1), "of each run: the distiller eleven times, the teacher as long as it is run, once"


def test_a_compiled_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = training(tmp_path / "whole", "default", 2)
    whole.run()
    first = training(tmp_path / "stopped", "default", 2)
    plain = first._epoch

    def stops() -> None:
        if first.at.epoch == 2:
            raise RuntimeError("the machine is gone")
        plain()

    first._epoch = stops  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the machine is gone"):
        first.run()
    second = training(tmp_path / "stopped", "default", 2)
    second.run()
    assert second.mode == "default"
    for name, value in state(second).items():
        assert torch.equal(value, state(whole)[name]), name
