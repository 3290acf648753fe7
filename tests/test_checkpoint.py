"""A checkpoint exists whole or not at all; damage is noticed, told and passed over; reading runs no code."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from kdlib.training import checkpoint, sharding
from kdlib.training.checkpoint import MANIFEST, TENSORS, TREE, load_latest, save, save_weights, write_json
from kdlib.training.randomness import random_state, set_random_state
from tests.conftest import ROOT

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]
DTYPES += [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn]


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, types included."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or a != a)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def two(folder: Path) -> dict[int, dict[str, Any]]:
    """Two checkpoints of different content, by step."""
    states = {step: {"epoch": step, "weight": torch.randn(50, 3), "lr": 0.1 / step} for step in (8, 16)}
    for step, state in states.items():
        save(folder, step, state)
    return states


def latest(folder: Path) -> tuple[int, dict[str, Any], list[str]]:
    found = load_latest(folder)
    assert found is not None
    return found


# what is written is read back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (4, 5)])
def test_a_tensor_of_any_kind_comes_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    save(tmp_path, 1, {"x": tensor})
    assert same(latest(tmp_path)[1]["x"], tensor)


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    tree = {
        "nested": {"a": {"b": [1, 2.5, None, True, "text", [torch.ones(2), {}]]}, "empty": [], "a/b": weight.detach()},
        "state": {0: {"step": torch.tensor(3.0)}, 11: {"exp_avg": weight.detach().t()}},
        "numbers": [1e-323, 0.1, 1 / 3, float("inf"), float("nan"), 10**30, -0.0],
        "views": [weight.detach()[1:], weight.detach()[:, ::2], weight.detach()],
        "a": {"b": torch.zeros(1)},
        "é\n@": "\u2028",
    }
    save(tmp_path, 5, tree)
    step, found, notes = latest(tmp_path)
    assert (step, notes) == (5, []) and same(found, tree)


def test_paths_that_read_alike_are_two_tensors(tmp_path: Path) -> None:
    tree = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1)}
    save(tmp_path, 1, tree)
    assert same(latest(tmp_path)[1], tree)


@pytest.mark.parametrize("leaf", [object(), {1, 2}, b"bytes", {1: 0, "1": 0}, {"@tensor": "x"}, {(1, 2): 0}])
def test_what_json_cannot_say_is_our_own_mistake_and_leaves_nothing(leaf: object, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save(tmp_path, 1, {"x": leaf})
    assert not list(tmp_path.iterdir())


def test_the_two_newest_are_kept_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000):
        save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    assert latest(tmp_path)[0] == 100_000_000


def test_without_any_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nothing") is None
    (tmp_path / "step-text").mkdir()
    (tmp_path / ".tmp-8-1").mkdir()
    assert load_latest(tmp_path) is None


# random numbers and optimizers go on as if nothing had happened


def draws() -> list[Any]:
    return [torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()]


@pytest.mark.parametrize("odd", [0, 1])
def test_random_numbers_go_on_exactly(odd: int, tmp_path: Path) -> None:
    for _ in range(odd):  # a normal deviate is left over in numpy's and Python's generators
        np.random.standard_normal(1), random.gauss(0, 1), torch.randn(1)
    save(tmp_path, 1, {"random": random_state(CPU)})
    expected = draws()
    set_random_state(latest(tmp_path)[1]["random"], CPU)
    assert draws() == expected


def test_adamw_and_its_schedule_go_on_exactly(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, CosineLRScheduler]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        groups = [{"params": [*model[0].parameters()], "weight_decay": 0.1}, {"params": [*model[1:].parameters()]}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))
        schedule = CosineLRScheduler(optimizer, 12, lr_min=1e-4, warmup_t=3, warmup_lr_init=1e-5, t_in_epochs=False)
        return model, optimizer, schedule

    def steps(parts: tuple[nn.Module, torch.optim.Optimizer, CosineLRScheduler], first: int, last: int) -> list[float]:
        model, optimizer, schedule = parts
        rates = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(6, 4, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(step + 1)
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole = fresh()
    steps(whole, 0, 5)
    save(tmp_path, 5, {"model": whole[0].state_dict(), "optimizer": whole[1].state_dict()})
    expected = steps(whole, 5, 12)

    resumed = fresh()
    step, state, _ = latest(tmp_path)
    resumed[0].load_state_dict(state["model"])
    resumed[1].load_state_dict(state["optimizer"])
    resumed[2].step_update(step)
    assert steps(resumed, 5, 12) == expected
    assert same(dict(resumed[0].state_dict()), dict(whole[0].state_dict()))
    assert same(resumed[1].state_dict()["state"], whole[1].state_dict()["state"])


# damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link_away(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "another step's": lambda path: path.write_bytes((path.parent.parent / "step-00000008" / path.name).read_bytes()),
    "junk": lambda path: path.write_bytes(os.urandom(500)),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link": link_away,
}


@pytest.mark.fault("damage")
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [TENSORS, TREE, MANIFEST])
def test_a_damaged_checkpoint_is_told_and_the_older_one_is_taken(file: str, damage: str, tmp_path: Path) -> None:
    states = two(tmp_path)
    DAMAGE[damage](tmp_path / "step-00000016" / file)
    step, state, notes = latest(tmp_path)
    assert step == 8 and same(state, states[8])
    (note,) = notes
    assert note.startswith("checkpoint step-00000016 is damaged and was passed over: ") and "\n" not in note
    # and the run that goes on from there writes a whole one in its place
    save(tmp_path, 16, states[16])
    assert same(latest(tmp_path), (16, states[16], []))


@pytest.mark.fault("damage")
def test_a_checkpoint_under_another_number_is_damaged(tmp_path: Path) -> None:
    two(tmp_path)
    (tmp_path / "step-00000016").rename(tmp_path / "step-00000017")
    assert latest(tmp_path)[0] == 8 and "is of step 16" in latest(tmp_path)[2][0]


@pytest.mark.fault("damage")
def test_when_none_is_whole_one_error_lists_why(tmp_path: Path) -> None:
    two(tmp_path)
    flip(tmp_path / "step-00000016" / TENSORS)
    (tmp_path / "step-00000008" / TREE).unlink()
    with pytest.raises(ValueError, match=r"SHA-256 differs\); .*state.json is missing; delete the folder") as caught:
        load_latest(tmp_path)
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.fault("hostile weights")
@pytest.mark.parametrize("file", [TENSORS, TREE, MANIFEST])
def test_a_pickle_in_a_checkpoint_never_runs(file: str, tmp_path: Path) -> None:
    two(tmp_path / "run")
    mark = tmp_path / "ran"
    broken = tmp_path / "run" / "step-00000016" / file
    broken.write_bytes(pickle.dumps(Trap(mark)))
    if file != MANIFEST:  # even with a manifest that vouches for it
        manifest = json.loads((broken.parent / MANIFEST).read_text())
        manifest["files"][file] = {"bytes": broken.stat().st_size, "sha256": checkpoint._digest(broken)}
        (broken.parent / MANIFEST).write_text(json.dumps(manifest))
    assert latest(tmp_path / "run")[0] == 8
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap itself must work"


# writing that fails


@pytest.mark.fault("disk")
@pytest.mark.parametrize("after", ["nothing", "half"])
@pytest.mark.parametrize("target", ["checkpoint", "weights", "json"])
def test_a_write_that_fails_leaves_what_was_there_and_no_draft(
    target: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, model = two(tmp_path), nn.Linear(2, 2)
    save_weights(model, tmp_path / "w.safetensors")
    write_json(tmp_path / "s.json", {"a": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*args: Any) -> None:
        path = next(arg for arg in args if isinstance(arg, Path))
        if after == "half":
            path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(checkpoint, "_sync", full)
    write: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: save(tmp_path, 24, states[16]),
        "weights": lambda: save_weights(model, tmp_path / "w.safetensors"),
        "json": lambda: write_json(tmp_path / "s.json", {"a": 2}),
    }
    with pytest.raises(OSError, match="No space left"):
        write[target]()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert same(latest(tmp_path), (16, states[16], []))


FULL_DISK = """
import sys, torch
from pathlib import Path
from kdlib.training import checkpoint, sharding
folder = Path(sys.argv[1])
checkpoint.save(folder, 8, {"x": torch.zeros(100)})
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for save in (
    lambda: checkpoint.save(folder, 16, {"x": torch.zeros(100_000)}),
    lambda: checkpoint.save_weights(torch.nn.Linear(400, 400), folder / "w.safetensors"),
    lambda: checkpoint.write_json(folder / "s.json", "x" * 300_000),
):
    try:
        save()
    except OSError as error:
        print("refused:", error)
print(checkpoint.load_latest(folder)[0], sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.fault("disk")
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_when_the_disk_is_full_the_older_checkpoint_stays_and_no_draft(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: ") == 3
    assert done.stdout.splitlines()[-1] == "8 ['step-00000008']"


def test_a_draft_that_a_killed_process_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".tmp-8-123").mkdir(parents=True)
    (tmp_path / ".tmp-8-123" / TENSORS).write_bytes(b"half")
    save(tmp_path, 8, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_an_optimizers_state_comes_back_in_its_parameters_order_of_memory(device: str, tmp_path: Path) -> None:
    """A fused AdamW takes no step with a state that lies otherwise than a channels_last weight."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last)

    def begun() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.LazyLinear(2)).to(device)
        net(images)
        net.to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), fused=device == "cuda")

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    (net, optimizer), (again, other) = begun(), begun()
    step(net, optimizer)
    save(tmp_path, 1, {"optimizer": optimizer.state_dict(), "net": net.state_dict()})
    loaded = load_latest(tmp_path)
    assert loaded is not None
    again.load_state_dict(loaded[1]["net"])
    sharding.load_optimizer(other, loaded[1]["optimizer"])
    for parameter, values in other.state.items():
        assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == parameter.stride()
    step(net, optimizer)
    step(again, other)
    assert all(map(torch.equal, net.parameters(), again.parameters()))


def test_weights_of_tied_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "deep" / "w.safetensors")
    assert same(
        dict(checkpoint.load_file(tmp_path / "deep" / "w.safetensors")), dict(sorted(model.state_dict().items()))
    )
