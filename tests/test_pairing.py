"""Patterns to pairs."""

from __future__ import annotations

import pytest
from torch import nn

from kdlib import Pair, Panel, pair


def test_last_block_of_each_stage(student: nn.Module, teacher: nn.Module) -> None:
    assert pair(student, teacher, "stages.*.blocks.-1.mixer") == (
        Pair("stages.0.blocks.1.mixer", "stages.0.blocks.1.mixer"),
        Pair("stages.1.blocks.1.mixer", "stages.1.blocks.1.mixer"),
    )


def test_a_deeper_teacher_is_sampled_and_its_last_block_taken(student: nn.Module, wide: nn.Module) -> None:
    pairs = pair(student, wide, "stages.1.blocks.*")
    assert pairs == (Pair("stages.1.blocks.0", "stages.1.blocks.1"), Pair("stages.1.blocks.1", "stages.1.blocks.3"))


def test_a_star_in_a_name_finds_what_begins_so_and_is_a_group() -> None:
    net = nn.ModuleDict(
        {f"layer{i}": nn.Sequential(nn.Identity(), nn.Identity()) for i in (1, 2)} | {"fc": nn.Identity()}
    )
    assert pair(net, net, "layer*") == (Pair("layer1", "layer1"), Pair("layer2", "layer2"))
    assert pair(net, net, "layer*.-1") == (Pair("layer1.1", "layer1.1"), Pair("layer2.1", "layer2.1"))
    deep = nn.ModuleDict({f"layer{i}": nn.Sequential(*(nn.Identity() for _ in range(4))) for i in (1, 2)})
    assert [p.teacher for p in pair(net, deep, "layer*.*")] == ["layer1.1", "layer1.3", "layer2.1", "layer2.3"]
    with pytest.raises(ValueError, match=r"finds nothing at 'stage\*': ModuleDict has layer1, layer2, fc"):
        pair(net, net, "stage*")


def test_input_taps_and_panels(student: nn.Module, teacher: nn.Module) -> None:
    pairs = pair(student, Panel({"twin": teacher}), "stages.0.blocks.-1:input", "twin.stages.0.blocks.-1:input")
    assert pairs == (Pair("stages.0.blocks.1:input", "twin.stages.0.blocks.1:input"),)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("stages.*.block.-1",),
            r"'stages.\*.block.-1' finds nothing at 'block': 'stages.0' has down, blocks; did you mean 'blocks'",
        ),
        (("stage.0",), "finds nothing at 'stage': Tiny has stem, stages, drop, norm, head; did you mean 'stages'"),
        (("stages.-3.blocks.0",), "finds nothing at '-3'"),
        (("stages.*.blocks.0", "stem"), "groups do not match|blocks"),
        (("stages.*.blocks.*", "stages.0.blocks.*"), r"groups do not match: .* finds 2 .* finds 1"),
    ],
)
def test_what_does_not_match_says_so(
    student: nn.Module, teacher: nn.Module, patterns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pair(student, teacher, *patterns)


def test_a_shallower_teacher_is_an_error(student: nn.Module, wide: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"the teacher's group has 2 blocks .* the student's 4"):
        pair(wide, student, "stages.1.blocks.*")
