"""What losses learn is found where it must be: among the distiller's parameters, in checkpoints, and it trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, randomise
from laws import subject
from torch import Tensor, nn

import kdlib as kd
from kdlib.losses import LOSSES
from kdlib.training import checkpoint

LEARN = sorted(name for name in LOSSES if subject(name).learned or name == "learnable_temperature")


class Headed(Tiny):
    def get_classifier(self) -> nn.Module:
        return self.head


def build(name: str, seed: int = 1) -> tuple[kd.Teacher, kd.Distiller]:
    student, teacher = randomise(Headed((6, 8)), seed), randomise(Headed((10, 12)), 2)
    loss = subject(name).make()
    pairs: list[Any] = []
    if loss.lists:
        pairs = [kd.Pair(f"stages.{i}.blocks.1", f"stages.{i}.blocks.1") for i in (0, 1)]
    elif loss.view != "logits":
        pairs = [kd.Pair("stages.1.blocks.1", "stages.1.blocks.1")]
    torch.manual_seed(seed)
    term = kd.Term("it", loss, pairs=pairs)
    terms = kd.fit([term], student, teacher, torch.randn(4, 3, 8, 8)).terms
    return kd.Teacher(teacher, terms), kd.Distiller(student, terms)


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    return torch.randn(4, 3, 8, 8), {"@labels": torch.arange(4), "@indices": torch.tensor([3, 1, 9, 5])}


def value(ask: kd.Teacher, distiller: kd.Distiller) -> Tensor:
    images, extra = batch()
    return distiller(images, ask(images) | extra).loss


def test_the_losses_that_learn_are_these():
    assert len(LEARN) == 9, LEARN


@pytest.mark.parametrize("name", LEARN)
def test_found_by_the_optimizer_and_trained(name):
    ask, distiller = build(name)
    mine = {name: p for name, p in distiller.named_parameters() if name.startswith("losses.it.")}
    assert mine and all(p.requires_grad for p in mine.values())
    before = {name: p.detach().clone() for name, p in mine.items()}
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    value(ask, distiller).backward()
    assert all(p.grad is not None for p in mine.values())
    optimizer.step()
    assert any(not torch.equal(p, before[name]) for name, p in mine.items())
    heads = [p for p in distiller.parameters() if p.shape == (5, 12)]
    assert not heads, "the teacher's classifier is not trained"


@pytest.mark.parametrize("name", LEARN)
def test_checkpoints_hold_it(name, tmp_path: Path):
    ask, distiller = build(name)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    value(ask, distiller).backward()
    optimizer.step()
    checkpoint.save(tmp_path, 1, {"distiller": distiller.state_dict()})
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    again, other = build(name, seed=8)
    missing = other.load_state_dict(found[1]["distiller"])
    assert not missing.missing_keys and not missing.unexpected_keys
    for key, parameter in distiller.named_parameters():
        assert torch.equal(other.get_parameter(key), parameter), key
    kept = copy.deepcopy(distiller)
    assert torch.equal(value(again, other), value(ask, kept))
