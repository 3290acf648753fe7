"""NaN and infinity: named by term and step, with their images; stopped for, skipped, or gone back from."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdlib.data.samplers import epoch_order
from tests.faults.harness import MEMORY, RICH, Run, check_as_if_nothing_had_been, left

PLACE, STEP = "1.5", 9
"""The epoch and batch, counted from 0, that go wrong, and the step in which they are."""
BLAME = {"nan": "term 'label'", "inf": "term 'label'", "gradient": "the gradient of term 'label'"}


def report(one: Run) -> list[dict[str, Any]]:
    return json.loads((one.output / "nonfinite.json").read_text())


def images_of(one: Run, epoch: int, batch: int) -> list[int]:
    return epoch_order(100, 8, seed=0, epoch=epoch)[batch].tolist()


def all_finite(one: Run) -> bool:
    return all(
        tensor.isfinite().all()
        for file in [*one.output.glob("*.safetensors"), one.checkpoints[-1] / "state.safetensors"]
        for tensor in load_file(file).values()
    )


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("what", BLAME)
def test_stop_names_the_term_and_the_step_and_keeps_the_checkpoint_before(what: str, run: Any) -> None:
    one = run(RICH)
    said = one.go(KDLIB_BREAK=f"{what}:{PLACE}", code=1)
    assert f"student: {BLAME[what]} was not finite at step {STEP} (epoch 2, batch 6; " in said
    assert "Traceback" not in said and all(path.name <= f"step-{STEP - 1:08d}" for path in one.checkpoints)
    (entry,) = report(one)
    assert (entry["step"], entry["epoch"], entry["batch"], entry["terms"]) == (STEP, 1, 5, ["label"])
    assert entry["images"] == images_of(one, 1, 5)
    assert "NaN" not in (one.output / "metrics.jsonl").read_text()
    one.go()  # what was wrong is mended: as if nothing had been
    check_as_if_nothing_had_been(one)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("what", BLAME)
def test_the_run_goes_on_without_the_step(what: str, policy: str, run: Any) -> None:
    one = run(RICH, on_nonfinite=policy)
    said = one.go(KDLIB_BREAK=f"{what}:{PLACE}")
    assert f"was not finite at step {STEP}; {policy}, images in " in said
    (entry,) = report(one)
    assert entry["step"] == STEP and entry["policy"] == policy
    assert set(images_of(one, 1, 5)) <= set(entry["images"])
    assert all_finite(one)
    # killed in the middle and started again it comes to the same
    other = run(RICH, on_nonfinite=policy)
    other.go(KDLIB_BREAK=f"{what}:{PLACE}", KDLIB_FAULT="step:11", code=-9)
    other.go(KDLIB_BREAK=f"{what}:{PLACE}")
    assert left(other.output) == left(one.output)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("recipe", [RICH, MEMORY], ids=["rich", "memory"])
def test_skip_changes_nothing_where_nothing_is_wrong(recipe: dict[str, Any], run: Any) -> None:
    plain, careful = run(recipe), run(recipe, on_nonfinite="skip")
    plain.go()
    careful.go()
    assert left(plain.output) == left(careful.output)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("place", ["0.0", "0.11"])
def test_skip_at_the_first_and_at_the_last_step_of_an_epoch(place: str, run: Any) -> None:
    one = run(RICH, on_nonfinite="skip")
    one.go(KDLIB_BREAK=f"nan:{place}")
    assert all_finite(one) and len(report(one)) == 1


@pytest.mark.fault("numbers")
def test_where_every_step_is_wrong_skipping_ends(run: Any) -> None:
    one = run(RICH, on_nonfinite="skip", data=RICH["data"] | {"limit": 1000}, log_every=15, save_every=0)
    every = ",".join(f"0.{batch}" for batch in range(125))
    said = one.go(KDLIB_BREAK=f"nan:{every}", code=1)
    assert "50 steps in a row were not finite" in said and "Traceback" not in said


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("value", [math.nan, 1e30], ids=["nan", "huge"])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_weights_that_are_not_finite_or_make_it_so(whose: str, value: float, run: Any) -> None:
    one = run(RICH)
    state = load_file(one.folder / "teacher.safetensors")
    mine = {name: tensor[:6, :6].clone() if tensor.ndim == 4 else tensor[:6].clone() for name, tensor in state.items()
            if tensor.ndim and tensor.shape[0] == 9}  # fmt: skip
    mine |= {"stem.weight": state["stem.weight"][:6].clone(), "head.weight": state["head.weight"][:, :6].clone()}
    mine |= {"head.bias": state["head.bias"], "norm.num_batches_tracked": state["norm.num_batches_tracked"]}
    wrong = state if whose == "teacher" else mine
    wrong["block.weight"] = torch.full_like(wrong["block.weight"], value)
    save_file(wrong, one.folder / "wrong.safetensors")
    key = "teachers.wide.weights" if whose == "teacher" else "student.weights"
    said = one.go(f"{key}=wrong.safetensors", code=2 if math.isnan(value) else 1)
    assert "Traceback" not in said
    if math.isnan(value):
        assert f"{key}: wrong.safetensors: block.weight holds NaN or infinity" in said
    else:
        assert "was not finite at step 1 (epoch 1, batch 1; " in said and "'block'" in said


@pytest.mark.fault("numbers")
def test_each_terms_share_of_the_gradient_is_told_and_changes_nothing(run: Any) -> None:
    plain, told = run(RICH), run(RICH, log_gradients=True)
    plain.go()
    told.go()
    lines = left(told.output)["lines"]
    shares = [line["gradient_shares"] for line in lines if "gradient_shares" in line]
    assert [set(share) for share in shares] == [{"block", "label", "learned", "soft"}] * 4 + [
        {"label", "learned", "soft"}
    ] * 4
    assert all(abs(sum(share.values()) - 1) < 1e-6 and min(share.values()) > 0 for share in shares)
    assert left(told.output)["weights"] == left(plain.output)["weights"]
