"""From the likeness of layers to pairs, and to lines that a recipe takes."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from conftest import Tiny, randomise

import kdlib as kd
from kdlib import yaml12
from kdlib.cka import linear_cka
from kdlib.pairs import alike, as_yaml, blocks, called, suggest


def test_blocks_of_the_usual_families() -> None:
    assert blocks(timm.create_model("vit_tiny_patch16_224", depth=3)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert blocks(timm.create_model("resnet18"))[:3] == ["layer1.0", "layer1.1", "layer2.0"]
    assert blocks(Tiny((6, 8), (1, 2))) == ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]
    assert len(blocks(timm.create_model("efficientnet_b0"))) == 16
    assert blocks(timm.create_model("regnety_002")) == ["stem", "s1", "s2", "s3", "s4", "head"], "no sequences"


class Trained(torch.nn.Module):
    """Blocks in a dictionary, and a head that is used in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({name: self.block(name == "a") for name in "abc"})
        self.aux = torch.nn.Sequential(self.block(False))

    def block(self, first: bool) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3 if first else 8, 8, 3, 1, 1), torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return self.aux(x) if self.training else x


def test_blocks_in_a_dictionary_are_found_and_a_head_for_training_is_left_out() -> None:
    model = Trained()
    found = blocks(model)
    assert found == ["layers.a", "layers.b", "layers.c", "aux.0"]
    assert called(model, torch.zeros(2, 3, 8, 8), [*found, "layers.b:input", "aux:input"]) == [
        *found[:3],
        "layers.b:input",
    ]
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_alike_is_cka_of_what_the_taps_see() -> None:
    student, teacher, images = randomise(Tiny((6, 8))), randomise(Tiny((10, 12)), 3), torch.randn(2000, 3, 8, 8)
    ours, theirs = ["stem", "stages.0.blocks.1"], ["stages.0.blocks.0", "stages.1.blocks.1", "norm"]
    student.train()
    found = alike(student, teacher, [(images, images)], ours, theirs)
    assert student.training and found.shape == (2, 3)
    with kd.Taps(student.eval(), ours) as a, kd.Taps(teacher.eval(), theirs) as b, torch.no_grad():
        student(images), teacher(images)
    plain = torch.tensor([[linear_cka(a[x], b[y]) for y in theirs] for x in ours], dtype=torch.float64)
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0)  # the definition is biased upwards
    assert (plain > found).all() and torch.equal(found.argsort(), plain.argsort())
    itself = alike(student, student, [(images, images)], ours, ours)
    torch.testing.assert_close(itself.diagonal(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (1, 4), (4, 6)])
def test_the_suggestion_is_the_best_of_all(shape: tuple[int, int]) -> None:
    for seed in range(5):
        values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        short = min(shape)
        options = itertools.product(
            itertools.combinations(range(shape[0]), short), itertools.combinations(range(shape[1]), short)
        )
        best = max(sum(float(values[i, j]) for i, j in zip(*o, strict=True)) for o in options)
        chosen = suggest(values)
        assert chosen == sorted(chosen) and len({i for i, _ in chosen}) == len({j for _, j in chosen}) == short
        assert all(a < b and c < d for (a, c), (b, d) in itertools.pairwise(chosen))
        assert sum(float(values[i, j]) for i, j in chosen) == pytest.approx(best)


def test_the_lines_to_paste_are_a_recipe() -> None:
    from kdlib.config import Document
    from kdlib.recipe import load

    pairs = [kd.Pair("layer1.0", "layer1.2"), kd.Pair("0.conv:input", "b.1")]
    text = as_yaml(pairs, teacher="big", layout=("NCHW", "NLC+1"))
    document = Document()
    document.overlay(yaml12.parse(text) | {"student": {"name": "resnet18"}}, "test")
    document.overlay({"teachers": {"big": {"name": "resnet34", "pretrained": True}}}, "test")
    terms = load(document).terms
    assert terms["alike"].student == ["layer1.0", "0.conv:input"]
    assert terms["alike"].teacher == ["big.layer1.2", "big.b.1"] and terms["alike"].adapter == "linear"
    assert terms["alike"].layout == ("NCHW", "NLC+1") and "layout" not in as_yaml(pairs)
