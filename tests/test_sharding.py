"""FSDP2 over two gloo processes: what one process computes, the files that DDP leaves, exact resumption."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import kdlib as kd
from kdlib.training import sharding
from tests.faults.harness import MEMORY, RICH, SHARDED, Run, check_as_if_nothing_had_been, left

SCRIPT = textwrap.dedent(
    """
    import sys, torch
    sys.path[:0] = [{root!r}, {tests!r}]
    torch.set_num_threads(1)
    from accelerate import Accelerator
    from copy import deepcopy
    from timm.optim import create_optimizer_v2
    from torch.distributed.tensor import DTensor
    from conftest import Tiny, randomise
    import kdlib as kd
    from kdlib.losses import CRD, VID, CrossEntropy, FeatureMSE, GramRelation, InfoNCE, LearnableTemperature, SoftTarget
    from kdlib.training import gradients, sharding

    def build(rank):
        student, teacher = randomise(Tiny((6, 8)), 1), randomise(Tiny((10, 12)), 2)
        student.drop.p = 0.0
        student.norm = torch.nn.GroupNorm(1, 8)  # batch statistics differ between half and whole batches
        pairs = kd.pair(student, teacher, "stages.*.blocks.-1")
        inputs = [kd.Pair("stages.1.blocks.0:input", "stages.1.blocks.0:input")]
        last = [kd.Pair("stages.1.blocks.1", "stages.1.blocks.1")]
        terms = [
            kd.Term("soft", LearnableTemperature(SoftTarget())),
            kd.Term("label", CrossEntropy()),
            kd.Term("block", FeatureMSE(), 0.5, kd.Window(until=2), pairs, adapter="linear"),
            kd.Term("input", FeatureMSE(), pairs=inputs, adapter="linear"),
            kd.Term("mixer", GramRelation(), pairs=kd.pair(student, teacher, "stages.*.blocks.*.mixer")),
            kd.Term("learned", VID(), 0.1, kd.Window(start=1), last),
            kd.Term("contrast", InfoNCE(0.2, symmetric=True), pairs=last, adapter="linear"),
        ]
        torch.manual_seed(0)
        plan = kd.fit(terms, student, teacher, torch.randn(2, 3, 8, 8))
        distiller = kd.Distiller(student, plan.terms)
        torch.manual_seed(7)
        for module in (distiller.adapters, distiller.losses):
            for parameter in module.parameters():
                parameter.data.copy_(0.3 * torch.randn(parameter.shape))
        if rank:
            randomise(distiller, 9)  # all begin as the main process
        return distiller, kd.Teacher(teacher, plan.terms)

    def train(accelerator, name, accumulate, **more):
        world, rank = accelerator.num_processes, accelerator.process_index
        distiller, ask = build(rank)
        if world == 1 and name == "sgd":
            more = {{}}  # its fused kernel wants all parameters from the first step on; sharding takes it off
        optimizer = create_optimizer_v2(distiller, opt=name, lr=0.01, weight_decay=0.05, **more)
        if world > 1:
            sharding.shard(accelerator, distiller, optimizer)
        engine, prepared = accelerator.prepare(distiller, optimizer)
        accelerator.gradient_accumulation_steps, accelerator.step = accumulate, 0
        data = torch.randn(4, 8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        labels, told = torch.arange(8) % 5, {{"gradients": [], "norms": []}}
        for step in range(4):  # a block term falls silent after two steps, a learned loss begins after one
            distiller.set_epoch(step, 4)
            ask.set_epoch(step, 4)
            images, mine = data[step].chunk(world)[rank], labels.chunk(world)[rank]
            batch = images, ask(images) | {{"@labels": mine}}
            with accelerator.accumulate(engine):
                accelerator.backward(engine(*batch).loss)
                told["norms"].append(gradients.norm(accelerator, distiller, 1.0 if step else None))
                if accelerator.sync_gradients:
                    found = [p.grad for p in distiller.parameters()]
                    told["gradients"].append([torch.zeros(()) if g is None else sharding.full(g) for g in found])
                prepared.step()
                prepared.zero_grad()
        with torch.no_grad():
            told["answer"] = engine(data[0], None).logits if accumulate == 1 else torch.zeros(())
        sharding.release(distiller)
        state = distiller.state_dict()
        told["sharded"] = {{n: list(sharding.local(v).shape) for n, v in state.items() if isinstance(v, DTensor)}}
        told["own"] = sorted(n for n, m in distiller.named_modules() if isinstance(m, sharding.FSDPModule))
        told["weights"] = sharding.whole(state)
        if name == "sgd":
            plain, _ = build(0)
            plain.set_epoch(3, 4)
            plain.load_state_dict(told["weights"])
            told["shares"] = [gradients.mean_by_term(accelerator, model, *batch, model) for model in (distiller, plain)]
        told["state"] = sharding.whole(optimizer.state_dict())["state"]
        accelerator.free_memory()
        return told

    def main(out):
        accelerator = Accelerator(cpu=True)
        sharding.begin(accelerator)
        told = {{name: train(accelerator, name, 1) for name in ("sgd", "adam", "adamw", "nadamw", "lamb", "lion")}}
        told |= {{f"fused {{name}}": train(accelerator, name, 1, fused=True) for name in ("sgd", "adam", "adamw")}}
        told["accumulated"] = train(accelerator, "momentum", 2)
        torch.save(told | {{"world": accelerator.num_processes}}, f"{{out}}.{{accelerator.process_index}}")

    if __name__ == "__main__":
        main(sys.argv[1])
    """
)
BY_CLASS = SHARDED | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
BLOCKS = [f"student.stages.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]
OPTIMIZERS = ("sgd", "adam", "adamw", "nadamw", "lamb", "lion")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process of one and of two told."""
    folder = tmp_path_factory.mktemp("sharding")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        of_rank = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)} | BY_CLASS if world > 1 else {}
        command = [sys.executable, str(script), str(folder / f"w{world}")]
        started.append(subprocess.Popen(command, env=shared | of_rank, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, error = process.communicate(timeout=600)
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in started:
            process.kill()
    return {
        world: [torch.load(f"{folder}/w{world}.{rank}", weights_only=True) for rank in range(world)] for world in (1, 2)
    }


def test_everything_that_trains_is_sharded_and_blocks_by_themselves(outcomes: Any) -> None:
    (one,), ranks = outcomes[1], [told["sgd"] for told in outcomes[2]]
    assert outcomes[2][0]["world"] == 2 and not one["sgd"]["sharded"]
    assert ranks[0]["own"] == ["", *BLOCKS]
    held = {name for name, value in one["sgd"]["weights"].items() if "lambda_" not in name}
    assert set(ranks[0]["sharded"]) == held
    assert any("adapters" in name for name in held) and "losses.learned.rho" in held and "losses.soft.theta" in held
    for name in held:
        whole = one["sgd"]["weights"][name].shape[0]
        assert [told["sharded"][name][0] for told in ranks] == [(whole + 1) // 2, whole // 2], name


def test_two_processes_give_the_gradients_of_one(outcomes: Any) -> None:
    (one,), ranks = outcomes[1], outcomes[2]
    for told in ranks:
        for ours, theirs in zip(told["sgd"]["gradients"], one["sgd"]["gradients"], strict=True):
            for mine, hers in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, hers, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(told["sgd"]["norms"], one["sgd"]["norms"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(told["sgd"]["answer"], one["sgd"]["answer"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "fused sgd", "fused adam", "fused adamw", "accumulated"])
def test_two_processes_give_the_weights_and_optimizer_state_of_one(name: str, outcomes: Any) -> None:
    (one,), ranks = outcomes[1], outcomes[2]
    for told in ranks:
        assert list(told[name]["weights"]) == list(one[name]["weights"])
        for part in ("weights", "state"):
            torch.testing.assert_close(told[name][part], one[name][part], rtol=1e-3, atol=3e-5)
    moved = one[name]["weights"]["adapters.block.stages/0/blocks/1.linear.weight"]
    assert not torch.equal(moved, outcomes[1][0]["sgd" if name != "sgd" else "lion"]["weights"]["student.head.bias"][0])
    for first, second in zip(*(told[name]["weights"].values() for told in ranks), strict=True):
        assert torch.equal(first, second)


def test_gradient_norms_by_term_are_those_of_whole_parameters(outcomes: Any) -> None:
    for told in outcomes[2]:
        sharded, whole = told["sgd"]["shares"]
        assert list(sharded) == list(whole) and "block" not in whole and "learned" in whole
        assert sharded == pytest.approx(whole, rel=1e-5) and min(whole.values()) > 0


# runs


@pytest.fixture
def run() -> Iterator[Any]:
    made: list[Run] = []

    def make(recipe: dict[str, Any], **changes: Any) -> Run:
        made.append(Run(recipe, **changes))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def end(one: Run, job: list[Any], *codes: int) -> list[str]:
    return [one.end(process, code, name) for process, code, name in zip(job, codes, ("said", "said1"), strict=True)]


def tensors(one: Run) -> dict[str, torch.Tensor]:
    return load_file(one.checkpoints[-1] / "state.safetensors")


def check_alike(sharded: Run, whole: Run) -> None:
    """The same files, names and shapes as under DDP, the same numbers up to rounding, the same images counted."""
    ours, theirs = left(sharded.output), left(whole.output)
    assert ours["weights"].keys() == theirs["weights"].keys() and ours["state"][0] == theirs["state"][0]
    found, expected = tensors(sharded), tensors(whole)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for file in ours["weights"]:
        torch.testing.assert_close(
            load_file(sharded.output / file), load_file(whole.output / file), rtol=1e-3, atol=1e-5
        )
    assert ours["result"] == pytest.approx(theirs["result"], rel=1e-4)
    for mine, hers in zip(ours["lines"], theirs["lines"], strict=True):
        assert mine.get("gradient_shares", {}) == pytest.approx(hers.get("gradient_shares", {}), rel=1e-3, abs=1e-6)
        assert mine["terms"] == pytest.approx(hers["terms"], rel=1e-4)
        assert mine["gradient"] == pytest.approx(hers["gradient"], rel=1e-4)


@pytest.mark.parametrize("kind", ["rich", "memory"])
def test_a_run_leaves_what_it_leaves_under_ddp(kind: str, run: Any) -> None:
    """Clipping, accumulation, EMA, an adapter that falls silent, a learned loss; a memory of images and bad steps."""
    # Adam would make steps of what rounding leaves of a gradient that is zero, that of the bias before the batch norm
    sgd = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "clip_grad": 1.0}}
    if kind == "rich":
        recipe, broken = RICH | sgd | {"log_gradients": True}, {}
    else:
        recipe, broken = MEMORY | sgd | {"on_nonfinite": "skip", "precision": "bf16"}, {"KDLIB_BREAK": "nan:0.2,1.1"}
    jobs = [(one := run(recipe), one.start_two(**broken, **more)) for more in (SHARDED, {})]
    for one, job in jobs:
        said = end(one, job, 0, 0)
        assert ("was not finite at step 3" in said[0]) == bool(broken)
    check_alike(jobs[0][0], jobs[1][0])


def test_a_stopped_run_goes_on_bit_for_bit(run: Any) -> None:
    """By a signal in the middle of an epoch, then by kill -9 of one process, each time under accumulation and EMA."""
    one = run(RICH)
    end(one, one.start_two(**SHARDED, of={1: {"KDLIB_FAULT": "step:1:TERM"}}), 143, 143)
    assert one.checkpoints[-1].name == "step-00000003" and "everything is saved" in one.said()
    end(one, one.start_two(**SHARDED, of={1: {"KDLIB_FAULT": "step:2"}}), 1, -9)
    assert "another process of this job ended" in one.said()
    end(one, one.start_two(**SHARDED), 0, 0)
    check_as_if_nothing_had_been(one, ranks=2, sharded=True)


def test_a_run_begun_under_ddp_may_go_on_sharded(run: Any) -> None:
    one = run(RICH | {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}, "channels_last": True})
    end(one, one.start_two(of={1: {"KDLIB_FAULT": "step:1:TERM"}}), 143, 143)
    end(one, one.start_two(**SHARDED), 0, 0)
    whole = run(one.recipe)
    end(whole, whole.start_two(), 0, 0)
    check_alike(one, whole)


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_gradient_that_is_not_finite_is_blamed_on_its_term(policy: str, run: Any) -> None:
    """The run goes back to the last checkpoint, and takes the gradient apart term by term."""
    one = run(RICH, on_nonfinite=policy)
    job = one.start_two(**SHARDED, KDLIB_BREAK="gradient:0.4", KDLIB_BREAK_RANKS="1")
    said = end(one, job, *((1, 1) if policy == "stop" else (0, 0)))
    assert "the gradient of term 'label' was not finite at step 3" in said[0]
    (entry,) = json.loads((one.output / "nonfinite.json").read_text())
    assert entry["terms"] == ["label"] and entry["step"] == 3


REFUSED = {
    "version": (
        SHARDED | {"FSDP_VERSION": "1"},
        {},
        "launch: FSDP of version 1 is not taken; launch with --fsdp_version 2",
    ),
    "again": (
        SHARDED | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {},
        "launch: FSDP2 is taken without activation chec",
    ),
    "offload": (SHARDED | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "launch: FSDP2 is taken without parameters on the CPU"),
    "optimizer": (SHARDED, {"optimizer": {"name": "muon"}}, "launch: FSDP2 was not tried with the optimizer Muon"),
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "launch: DeepSpeed is not taken; launch with --use_fsdp"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_taken_is_refused_in_one_line(why: str, run: Any) -> None:
    environment, changes, line = REFUSED[why]
    one = run(RICH, **changes)
    for said in end(one, one.start_two(**environment), 2, 2):
        assert line in said and "Traceback" not in said
    assert not one.checkpoints


def test_a_parameter_without_dimensions_is_refused_by_its_term() -> None:
    class Scaled(torch.nn.Module):
        view = "logits"

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return (self.scale * student - teacher).square().mean()

    distiller = kd.Distiller(torch.nn.Linear(2, 2), [kd.Term("mine", Scaled())])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"cannot shard losses.mine.scale of term 'mine', a parameter without dimensions"
    ):
        sharding.check(distiller, optimizer)
