"""Two gloo processes through accelerate are one process with the whole batch, adapters present."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

SCRIPT = textwrap.dedent(
    """
    import sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from conftest import Tiny, randomise
    import kdlib as kd
    from kdlib.losses import CrossEntropy, FeatureMSE, GramRelation, SoftTarget
    from kdlib.training.passes import Passes

    def main(out):
        accelerator = Accelerator(cpu=True)
        told = {{how: train(accelerator, how) for how in ("by hand", "passes", "compiled")}}
        told["world"] = accelerator.num_processes
        torch.save(told, f"{{out}}.{{accelerator.process_index}}")

    def train(accelerator, how):
        world, rank = accelerator.num_processes, accelerator.process_index
        student, teacher = randomise(Tiny((6, 8)), 1), randomise(Tiny((10, 12)), 2)
        student.drop.p = 0.0
        student.norm = torch.nn.GroupNorm(1, 8)  # batch statistics differ between half and whole batches
        pairs = kd.pair(student, teacher, "stages.*.blocks.-1")
        terms = [
            kd.Term("soft", SoftTarget(2.0), 1.0, kd.Window(until=4)),
            kd.Term("label", CrossEntropy(), 1.0, kd.Window(until=4)),
            kd.Term("block", FeatureMSE(), 0.5, kd.Window(until=2), pairs, adapter="linear"),
            kd.Term("late", FeatureMSE(), 0.5, kd.Window(start=3), pairs[:1], adapter="linear"),
            kd.Term("relation", GramRelation(), pairs=pairs[:1]),
        ]
        torch.manual_seed(0)
        plan = kd.fit(terms, student, teacher, torch.randn(2, 3, 8, 8))
        torch.manual_seed(5 + rank)  # ranks must agree all the same: DDP broadcasts rank 0's weights
        for term in plan.terms[2:4]:
            for adapter in term.adapters.values():
                randomise(adapter, 7)
        distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(teacher, plan.terms)
        if how == "compiled":
            modules = type(distiller), type(ask)
            for module in modules:
                module.compile = lambda self, **_: torch.nn.Module.compile(self, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        engine, optimizer = accelerator.prepare(distiller, optimizer)
        passes = Passes(engine, distiller, ask, accelerator, "default" if how == "compiled" else None)
        data = torch.randn(6, 8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        labels = torch.arange(8) % 5
        gradients = []
        for step in range(6):
            # the block term, and its adapters, fall silent after two steps, the head after four, and with it all behind
            # the first stage
            distiller.set_epoch(step, 6)
            ask.set_epoch(step, 6)
            images, given = data[step].chunk(world)[rank], {{"@labels": labels.chunk(world)[rank]}}
            if how == "by hand":
                accelerator.backward(engine(images, ask(images) | given).loss)
                for parameter in distiller.idle():
                    parameter.grad = None
            else:
                passes.try_out(lambda: (images, given))
                passes(images, given, adds=False)
            for parameter in student.parameters():  # behind the last tap: None in one process, zero beside others
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append({{n: p.grad.clone() for n, p in distiller.named_parameters() if p.grad is not None}})
            optimizer.step()
            optimizer.zero_grad()
        assert passes.mode == ("default" if how == "compiled" else None)
        return {{"gradients": gradients, "weights": dict(distiller.state_dict())}}

    if __name__ == "__main__":
        main(sys.argv[1])
    """
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    results = {}
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = os.environ | {
            "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        runs = []
        for rank in range(world):
            of_rank = {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            command = [sys.executable, str(script), str(folder / f"w{world}")]
            runs.append(subprocess.Popen(command, env=shared | of_rank, stderr=subprocess.PIPE, text=True))
        for run in runs:
            _, error = run.communicate(timeout=180)
            assert run.returncode == 0, error[-3000:]
        results[world] = [torch.load(Path(f"{folder}/w{world}.{rank}"), weights_only=True) for rank in range(world)]
    return results


def test_both_ranks_were_one_group(outcomes: dict[int, list[dict[str, Any]]]) -> None:
    assert [o["world"] for o in outcomes[2]] == [2, 2]


HOW = ["by hand", "passes", "compiled"]


@pytest.mark.parametrize("how", HOW)
def test_ranks_stay_equal_to_the_last_bit(how: str, outcomes: dict[int, list[dict[str, Any]]]) -> None:
    first, second = (outcome[how]["weights"] for outcome in outcomes[2])
    assert any("adapters" in name for name in first)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize("how", HOW)
def test_two_processes_give_the_gradients_and_weights_of_one(
    how: str, outcomes: dict[int, list[dict[str, Any]]]
) -> None:
    """With momentum and weight decay: what is off has no gradient, where DDP gives it one of zero."""
    one, two = outcomes[1][0][how], outcomes[2][0][how]
    for step, (ours, theirs) in enumerate(zip(two["gradients"], one["gradients"], strict=True)):
        assert set(ours) == set(theirs), f"step {step}"
        for name, mine in ours.items():
            torch.testing.assert_close(mine, theirs[name], rtol=1e-4, atol=1e-5, msg=f"step {step}, {name}")
    lacking = [len(one["weights"]) - len(gradients) for gradients in one["gradients"]]
    assert lacking == [1, 1, 3, 2, 2, 2], "adapters alone"
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
