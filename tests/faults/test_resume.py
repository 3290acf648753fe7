"""Stopped anywhere and started again, a run ends as one that was not: by place, by what it is made of, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import FILES, PATIENCE, RICH, SHARDS, check_as_if_nothing_had_been

PLACES = {
    1: ("step:1", "step:3", "step:6", "evaluate:1", "step:9"),
    2: ("step:1", "step:2", "step:3", "evaluate:1", "step:5"),
}
"""After the first step, in the first epoch, at its last batch, at its end, in the second; by batches a step."""


@pytest.mark.fault("resume")
@pytest.mark.parametrize("place", range(5), ids=["first step", "in an epoch", "last batch", "boundary", "second epoch"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_from_any_place(workers: int, accumulate: int, place: int, run: Any) -> None:
    one = run(FILES, data=FILES["data"] | {"workers": workers}, accumulate=accumulate)
    one.go(KDLIB_FAULT=f"{PLACES[accumulate][place]}:TERM", code=143)
    assert "goes on after epoch " in one.go()
    check_as_if_nothing_had_been(one)


def objective(**terms: Any) -> dict[str, Any]:
    return {"terms": {name: term for name, term in (RICH["terms"] | terms).items() if term}}  # type: ignore[operator]


MADE_OF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": (RICH, {"optimizer": {"name": "sgd", "momentum": 0.9, "lr": 0.01}}),
    "lamb": (RICH, {"optimizer": {"name": "lamb"}}),
    "average with warm-up": (RICH, {"ema": {"decay": 0.9, "warmup": True}, "metric": "ema_top1"}),
    "mixup or cutmix": (RICH, {"data": RICH["data"] | {"augment": {"mixup": 0.2, "cutmix": 1.0, "mixup_prob": 0.8}}}),
    "random augment": (FILES, {"data": FILES["data"] | {"augment": {"rand_augment": "rand-m9-mstd0.5-inc1"}}}),
    "learned temperature": (
        RICH, objective(soft={"loss": {"name": "learnable_temperature", "loss": {"name": "soft_target"}}})
    ),
    "skip": (RICH, {"on_nonfinite": "skip"}),
    "shards": (SHARDS, {}),
    "shards, one worker": (SHARDS, {"data": SHARDS["data"] | {"workers": 0}}),
}  # fmt: skip


@pytest.mark.fault("resume")
@pytest.mark.parametrize("made_of", MADE_OF)
def test_whatever_it_is_made_of(made_of: str, run: Any) -> None:
    recipe, changes = MADE_OF[made_of]
    one = run(recipe, **changes)
    one.go(KDLIB_FAULT="step:4:TERM", code=143)
    assert "goes on after epoch 0 of 2, batch " in one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("resume")
@pytest.mark.parametrize(("place", "kept", "epoch"), [("step:6", [0], 0), ("batch:14", [0], 0), ("step:9", [0, 7], 1)])
def test_where_checkpoints_are_further_apart_than_epochs(place: str, kept: list[int], epoch: int, run: Any) -> None:
    one = run(RICH, save_every=7)
    one.go(KDLIB_FAULT=place, code=-9)
    assert [path.name for path in one.checkpoints] == [f"step-{step:08d}" for step in kept]
    assert ("goes on after epoch 1 of 2, batch 2" in one.go()) == bool(epoch)
    assert [path.name for path in one.checkpoints] == ["step-00000007", "step-00000012"]
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("resume")
def test_a_signal_at_the_end_of_an_epoch_without_a_checkpoint(run: Any) -> None:
    one = run(RICH, save_every=7)
    one.go(KDLIB_FAULT="evaluate:1:TERM", code=143)
    assert [path.name for path in one.checkpoints] == ["step-00000000", "step-00000006"]
    assert "goes on after epoch 1 of 2" in one.go()
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("resume")
@pytest.mark.parametrize("place", ["step:1", "step:2", "evaluate:1", "step:5"])
@pytest.mark.parametrize("recipe", [RICH, FILES, SHARDS], ids=["memory", "files", "shards"])
def test_on_two_ranks(recipe: dict[str, Any], place: str, run: Any) -> None:
    one = run(recipe)
    job = one.start_two(of={rank: {"KDLIB_FAULT": place} for rank in (0, 1)})
    for process in job:
        process.join(PATIENCE)
    assert -9 in [process.exitcode for process in job] and None not in [process.exitcode for process in job]
    for process, name in zip(one.start_two(), ("said", "said1"), strict=True):
        one.end(process, 0, name)
    check_as_if_nothing_had_been(one, ranks=2)
