"""README is true: its tree has a caption for every file, its snippets run, its numbers are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Tiny
from torch import Tensor, nn

import kdlib as kd
from kdlib import config, recipe, yaml12
from kdlib.losses import LOSSES
from recipes.riformer import gfnet, model  # noqa: F401  registers the models

README = (ROOT / "README.md").read_text()
SHOWN = ("kdlib", "recipes", "benchmarks", "docs", "tests")


def tree() -> dict[str, str]:
    """Path to caption, from README."""
    block = README.split("<!-- tree -->\n```text\n")[1].split("```")[0]
    captions, folders = {}, []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, caption = line.strip().partition(" ")
        folders = [*folders[:depth], name.rstrip("/")]
        captions["/".join(folders)] = caption.strip()
    return captions


def test_every_file_has_a_caption_and_every_caption_a_file() -> None:
    captions = tree()
    for top in SHOWN:
        for path in (ROOT / top).rglob("*"):
            place = path.relative_to(ROOT)
            hidden = {"__pycache__", "goldens", "results", "runs", "rows"} & set(place.parts)
            if path.suffix in (".py", ".yaml", ".md") and not hidden:
                assert captions.get(str(place)) or place.name == "__init__.py", (
                    f"{place} has no caption in README's tree"
                )
    for place in captions:
        assert (ROOT / place).exists(), f"README's tree names {place}, which is not there"


def snippet(name: str) -> str:
    found = re.search(rf"<!-- snippet: {name} -->\n```\w+\n(.*?)```", README, re.S)
    assert found, name
    return found[1]


class MixerBlock(nn.Module):
    """A block with the names that README's snippets tap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_mixer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.token_mixer(x)


def mixed(width: int = 6) -> nn.Module:
    net = Tiny((width, 8))
    for stage, channels in zip(net.stages, (width, 8), strict=True):
        stage.blocks = nn.ModuleList(MixerBlock(channels) for _ in range(2))
    return net


@pytest.mark.parametrize("name", ["loss", "engine", "own"])
def test_snippets_run_as_written(name: str) -> None:
    images, labels, logged = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), []
    teacher = mixed(10 if name == "engine" else 6)
    space = {
        "torch": torch, "nn": nn, "F": F, "kd": kd, "images": images, "labels": labels,
        "student": mixed(), "teacher_model": teacher, "loader": [(images, labels)] * 2, "log": logged.append,
        "logits": torch.randn(4, 5, requires_grad=True), "teacher_logits": torch.randn(4, 5),
    }  # fmt: skip
    try:
        exec(snippet(name), space)
    finally:
        LOSSES.pop("cosine_gap", None)
    if name == "loss":
        assert space["loss"].requires_grad
    if name == "engine":
        assert [set(terms) for terms in logged] == [{"soft", "mixer"}] * 2
    if name == "own":
        assert space["term"].view == "tokens"


def test_the_recipe_snippet_is_a_recipe() -> None:
    document = config.Document()
    document.overlay(yaml12.parse(snippet("recipe")), "README")
    assert set(recipe.load(document).terms) == {"soft", "block", "mixer", "relation"}


def test_the_number_of_losses_is_right() -> None:
    ours = [loss for loss in LOSSES.values() if loss.__module__.startswith("kdlib.")]  # other tests register theirs
    assert f"catalogue of {len(ours)} distillation losses" in README


def test_the_error_line_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from kdlib import launch

    command, line = re.search(r"\$ python recipes/riformer/run.py (.*)\n(.*)\n", README).groups()
    default = ROOT / "recipes" / "riformer" / "configs" / "default.yaml"
    assert launch.main(lambda _: None, default=default, arguments=command.split()) == 2
    assert capsys.readouterr().err.strip() == line


def test_contributing_names_every_floor() -> None:
    from test_rules import FLOORS

    text = (ROOT / "CONTRIBUTING.md").read_text()
    missing = [
        name for name in FLOORS if name not in ("__init__", "__main__", "progress", "usage") and f"`{name}" not in text
    ]
    assert not missing


def test_no_machine_path_and_no_empty_promise() -> None:
    for path in [*ROOT.glob("*.md"), *Path(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]:
        text = path.read_text()
        assert not re.search(r"\b(TODO|TBD|FIXME|TABLE|ERRORLINE)\b", text), path
