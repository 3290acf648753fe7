"""Numbers that are not finite: who is blamed, which images are named, and a step that is undone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, nan
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import Tiny, randomise
from timm.optim import Lion
from torch import Tensor, nn

import kdlib as kd
from kdlib.data.samplers import EpochBatches
from kdlib.training import gradients
from kdlib.training.guard import Guard, find, images
from kdlib.training.journal import GRADIENT, LOSS, Row
from kdlib.training.shield import Shield


@pytest.mark.parametrize(
    ("ranks", "text", "guilty"),
    [
        ([{LOSS: nan, "a": nan, "b": 1.0, GRADIENT: nan}], "term 'a'", (0,)),
        ([{LOSS: 1.0, "a": 1.0, "b": 1.0, GRADIENT: nan}] * 2, "the gradient", (0, 1)),
        ([{LOSS: inf, "a": 1e38, "b": 3e38, GRADIENT: inf}], "the sum of the terms", (0,)),
        ([{LOSS: 1.0, "a": 1.0, GRADIENT: nan}, {LOSS: -inf, "a": -inf, GRADIENT: nan}], "term 'a'", (1,)),
        ([{LOSS: nan, "a": nan, "b": inf, GRADIENT: nan}], "term 'a', 'b'", (0,)),
    ],
)
def test_the_earliest_wrong_number_is_blamed(ranks: list[dict[str, float]], text: str, guilty: tuple[int, ...]) -> None:
    good = [dict.fromkeys(values, 1.0) for values in ranks]
    (bad,) = find([(6, good), (7, ranks)], epoch=3)
    assert (str(bad), bad.epoch, bad.batch, bad.ranks) == (text, 3, 7, guilty)
    assert not find([(6, good)], epoch=3)


def test_images_are_those_of_the_batch_or_of_the_whole_step() -> None:
    batches = EpochBatches(100, 4, train=True, seed=5, rank=0, world_size=2)
    other = EpochBatches(100, 4, train=True, seed=5, rank=1, world_size=2)
    (bad,) = find([(5, [{"a": 1.0}, {"a": nan}])], epoch=2)
    assert images(bad, batches, 2) == other.rows(2)[5].tolist()
    (bad,) = find([(5, [{GRADIENT: nan}] * 2)], epoch=2)
    whole = [*batches.rows(2)[4], *batches.rows(2)[5], *other.rows(2)[4], *other.rows(2)[5]]
    assert images(bad, batches, 2) == [int(image) for image in whole]


@pytest.mark.fault("numbers")
@pytest.mark.parametrize(("accumulate", "read"), [(1, 50), (1, 7), (2, 7), (4, 50)])
def test_skipping_gives_up_after_so_many_bad_steps_in_a_row_however_they_are_read(
    accumulate: int, read: int, tmp_path: Path
) -> None:
    def rows(first: int, last: int, wrong: Callable[[int], bool]) -> list[Row]:
        return [(batch, [{LOSS: nan if wrong(batch) else 1.0}]) for batch in range(first, min(last, count))]

    def look(epoch: int, wrong: Callable[[int], bool]) -> None:
        for first in range(0, count, read):
            guard.look(rows(first, first + read, wrong), epoch)

    count = 30 * accumulate  # batches of an epoch: the limit is reached over several
    data = SimpleNamespace(batches=EpochBatches(4 * count, 4, train=True, seed=5))
    guard = Guard("skip", tmp_path, "toy", data, accumulate, Accelerator(cpu=True))
    guard.report = lambda bad: None  # type: ignore[method-assign]  # a file for each would take seconds
    look(0, lambda batch: batch != count - 1)  # one good batch does not make a step good
    assert guard.in_a_row == (30 if accumulate > 1 else 0)
    look(1, lambda batch: batch // accumulate != 15)
    assert guard.in_a_row == 14, "a good step begins the count anew"
    look(2, lambda batch: batch % accumulate == 0)
    with pytest.raises(FloatingPointError, match=r"^toy: 50 steps in a row were not finite, the last by the sum"):
        look(3, lambda batch: batch % accumulate == 0)


def made(kind: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = randomise(Tiny(), 1)
    model.drop.p = 0.0
    more = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
    return model, kind(model.parameters(), lr=0.1, weight_decay=0.1, **more)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, shield: Shield | None = None) -> None:
    if shield is not None:
        shield.remember()
    loss = model(images).square().mean()
    loss.backward()
    if shield is not None:
        shield.see(loss.detach()[None])
        shield.disarm()
    optimizer.step()
    optimizer.zero_grad()
    if shield is not None:
        shield.settle()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value.clone() for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    return [*(tensor.clone() for tensor in model.state_dict().values()), *state]


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("wrong", [nan, inf])
def test_a_shielded_step_leaves_no_trace_where_it_is_bad_and_is_the_plain_one_where_it_is_good(
    kind: type[torch.optim.Optimizer], wrong: float, images: Tensor
) -> None:
    (plain, theirs), (shielded, ours) = made(kind), made(kind)
    shield = Shield(shielded, ours, Accelerator(cpu=True))
    for scale in (1.0, wrong, 2.0):
        before = snapshot(shielded, ours)
        step(shielded, ours, images * scale, shield)
        if not isfinite(scale):
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(shielded, ours), strict=True))
        else:
            step(plain, theirs, images * scale)
        assert all(torch.equal(a, b) for a, b in zip(snapshot(plain, theirs), snapshot(shielded, ours), strict=True))


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, Lion])
def test_a_bad_first_step_leaves_the_optimizer_as_new(kind: type[torch.optim.Optimizer], images: Tensor) -> None:
    """Its state is made in that step: moments, momenta, and how many steps there were."""
    (plain, theirs), (shielded, ours) = made(kind), made(kind)
    shield = Shield(shielded, ours, Accelerator(cpu=True))
    for scale in (nan, inf, 1.0, 2.0):
        step(shielded, ours, images * scale, shield)
        if isfinite(scale):
            step(plain, theirs, images * scale)
            assert all(map(torch.equal, snapshot(plain, theirs), snapshot(shielded, ours)))


def test_gradients_term_by_term_are_those_of_each_term_alone(images: Tensor, labels: Tensor) -> None:
    student, teacher = randomise(Tiny(), 1), randomise(Tiny(), 2)
    student.drop.p = 0.0
    pairs = kd.pair(student, teacher, "stages.*.blocks.-1")
    terms = [
        kd.Term("soft", kd.losses.SoftTarget(2.0), 0.3),
        kd.Term("label", kd.losses.CrossEntropy(), 2.0),
        kd.Term("block", kd.losses.FeatureMSE(), 0.5, pairs=pairs),
    ]
    distiller = kd.Distiller(student.eval(), terms)
    targets = kd.Teacher(teacher, terms)(images) | {"@labels": labels}
    norms = gradients.by_term(distiller, images, targets, student.parameters())
    assert list(norms) == list(distiller.weights_in_force()) and all(p.grad is None for p in student.parameters())
    for name, norm in norms.items():
        distiller.set_weights({term.name: term.weight * (term.name == name) for term in terms})
        distiller(images, targets).loss.backward()
        found = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
        student.zero_grad()
        torch.testing.assert_close(norm, found)
