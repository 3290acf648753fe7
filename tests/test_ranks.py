"""Two gloo processes through accelerate are one process with the whole batch, adapters present."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

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

    def main(out):
        accelerator = Accelerator(cpu=True)
        world, rank = accelerator.num_processes, accelerator.process_index
        student, teacher = randomise(Tiny((6, 8)), 1), randomise(Tiny((10, 12)), 2)
        student.drop.p = 0.0
        student.norm = torch.nn.GroupNorm(1, 8)  # batch statistics differ between half and whole batches
        pairs = kd.pair(student, teacher, "stages.*.blocks.-1")
        terms = [
            kd.Term("soft", SoftTarget(2.0), 1.0, kd.Window(until=4)),
            kd.Term("label", CrossEntropy(), 1.0, kd.Window(until=4)),
            kd.Term("block", FeatureMSE(), 0.5, kd.Window(until=2), pairs, adapter="linear"),
            kd.Term("relation", GramRelation(), pairs=pairs),
        ]
        torch.manual_seed(0)
        plan = kd.fit(terms, student, teacher, torch.randn(2, 3, 8, 8))
        torch.manual_seed(5 + rank)  # ranks must agree all the same: DDP broadcasts rank 0's weights
        for adapter in plan.terms[2].adapters.values():
            randomise(adapter, 7)
        distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(teacher, plan.terms)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
        engine, optimizer = accelerator.prepare(distiller, optimizer)
        data = torch.randn(6, 8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        labels = torch.arange(8) % 5
        gradients = []
        for step in range(6):  # the block term, and its adapters, fall silent after two steps, the head after four
            distiller.set_epoch(step, 6)
            ask.set_epoch(step, 6)
            images, mine = data[step].chunk(world)[rank], labels.chunk(world)[rank]
            accelerator.backward(engine(images, ask(images) | {{"@labels": mine}}).loss)
            gradients.append([p.grad.clone() for p in distiller.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        weights = dict(distiller.state_dict())
        torch.save({{"gradients": gradients, "weights": weights, "world": world}}, f"{{out}}.{{rank}}")

    if __name__ == "__main__":
        main(sys.argv[1])
    """
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, object]]]:
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


def test_both_ranks_were_one_group(outcomes: dict[int, list[dict[str, object]]]) -> None:
    assert [o["world"] for o in outcomes[2]] == [2, 2]


def test_ranks_stay_equal_to_the_last_bit(outcomes: dict[int, list[dict[str, object]]]) -> None:
    first, second = outcomes[2]
    assert any("adapters" in name for name in first["weights"])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_two_processes_give_the_gradients_and_weights_of_one(outcomes: dict[int, list[dict[str, object]]]) -> None:
    (one,), (two, _) = outcomes[1], outcomes[2]
    for step, (ours, theirs) in enumerate(zip(two["gradients"], one["gradients"], strict=True)):
        for mine, hers in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, hers, rtol=1e-4, atol=1e-5, msg=f"step {step}")
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
