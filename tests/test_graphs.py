"""CUDA graphs of a step: the plain step's numbers, to the last digit, through schedules and accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Tiny, randomise, strike_down
from test_synchronisation import CASES, training
from torch import Tensor

import kdlib as kd
from kdlib.distiller import Distilled
from kdlib.losses import CrossEntropy, FeatureMSE, SoftTarget
from kdlib.training import compiling
from kdlib.training.graphs import Graphs, try_graphs
from kdlib.training.train import Training

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def trained(graphs: bool, accumulate: int, dropout: float, steps: int = 12, compiled: bool = False) -> list[Tensor]:
    """Parameters and buffers after some steps, terms switching on and off on the way."""
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True
    device = torch.device("cuda")
    student, model = randomise(Tiny(), 1).to(device), randomise(Tiny(), 9).to(device)
    student.drop.p = dropout
    pairs = kd.pair(student, model, "stages.*.blocks.-1")
    terms = [
        kd.Term("soft", SoftTarget()),
        kd.Term("block", FeatureMSE(), 0.1, schedule=kd.Window(0, 2), pairs=pairs),
        kd.Term(
            "label", CrossEntropy(), 0.5, schedule=kd.Ramp(start=1, until=4), pairs=[kd.Pair("@output", "@labels")]
        ),
    ]
    distiller, teacher = kd.Distiller(student, terms).to(device), kd.Teacher(model, terms)
    if compiled:
        compiling.compile_whole([teacher, distiller], "default")
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2, fused=True)

    def backward(images: Tensor, targets: dict[str, Tensor]) -> Distilled:
        out: Distilled = distiller(images, targets | teacher(images))
        (out.loss / accumulate).backward()
        return out

    replayed = Graphs(backward, [distiller, teacher], distiller.live, accumulate) if graphs else None
    generator = torch.Generator().manual_seed(5)
    distiller.train()
    for step in range(steps):
        distiller.set_epoch(step // 3, 4)
        teacher.set_epoch(step // 3, 4)
        images = torch.randn(4, 3, 8, 8, generator=generator).to(device)
        labels = torch.randint(5, (4,), generator=generator).to(device)
        out = (replayed or (lambda i, t, _: backward(i, t)))(images, {"@labels": labels}, step % accumulate > 0)
        assert set(out.terms) == set(distiller.live())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            if replayed is None:
                optimizer.zero_grad()
    return [value.detach().clone() for value in distiller.state_dict().values()] + [out.loss.detach().clone()]


@gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_replayed_step_is_the_plain_one(accumulate: int, dropout: float) -> None:
    """Dropout and batch norm among them: random numbers and running means are those of the plain run."""
    for plain, replayed in zip(trained(False, accumulate, dropout), trained(True, accumulate, dropout), strict=True):
        assert torch.equal(plain, replayed)


@gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_compiled_step_is_the_compiled_one(accumulate: int) -> None:
    plain, replayed = (trained(graphs, accumulate, 0.0, compiled=True) for graphs in (False, True))
    for before, after in zip(plain, replayed, strict=True):
        assert torch.equal(before, after)


@gpu
def test_a_step_that_reads_a_value_back_runs_as_it_is() -> None:
    module = torch.nn.Linear(2, 2, device="cuda")

    def backward(images: Tensor, targets: dict[str, Tensor]) -> Distilled:
        loss = module(images).sum() * (1.0 if float(images.sum()) > 0 else 2.0)
        loss.backward()
        return Distilled(loss, loss, {})

    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    found, line = try_graphs(Graphs(backward, [module], tuple), torch.ones(1, 2, device="cuda"), {})
    assert found is None and line.startswith("runs without CUDA graphs, which cannot take its step: ")
    assert torch.equal(torch.rand(4, device="cuda"), expected)  # the step that runs as it is may draw


@gpu
@pytest.mark.parametrize("mode", ["graphs", "compiled-graphs"])
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_that_was_stopped_ends_as_one_that_was_not(
    case: str, mode: str, tmp_path: Path, fresh_state: None
) -> None:
    """From a checkpoint in the middle of the second of three epochs; a term is over, and the step recorded anew, after
    it."""
    torch.backends.cudnn.deterministic = True

    def begin(name: str) -> Training:
        torch.compiler.reset()
        run = training(tmp_path / name, "cuda", log_every=100, save_every=4, compile=mode, **CASES[case])
        run.epochs = 3
        return run

    (whole := begin("whole")).run()
    first = begin("stopped")
    strike_down(first, epoch=1, batch=4)
    assert first.passes.graphs is not None, "it was not recorded at all"
    second = begin("stopped")
    second.run()
    assert second.passes.graphs is not None
    for name, value in whole.distiller.state_dict().items():
        assert torch.equal(second.distiller.state_dict()[name], value), name


def test_without_a_gpu_it_says_so() -> None:
    Accelerator(cpu=True)
    found, line = try_graphs(Graphs(lambda i, t: None, [], tuple), torch.ones(1, 2), {})  # type: ignore[arg-type]
    assert found is None and line == "runs without CUDA graphs, which need a GPU and one process"
