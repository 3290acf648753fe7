"""What a model is made of, and what a model may be called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import Tiny
from torch import Tensor, nn

import kdlib as kd
import recipes.riformer.model  # noqa: F401  registers the models
from kdlib.config import ConfigError
from kdlib.inspect import Node, inspect
from kdlib.models import find_model


def by_tap(model: nn.Module, images: Tensor, **named: object) -> dict[str, Node]:
    return {node.tap: node for node in inspect(model, images, **named)}  # type: ignore[arg-type]


def test_every_tap_is_told_with_what_it_returns_and_costs() -> None:
    model, images = Tiny((6, 8)), torch.randn(2, 3, 8, 8)
    model.train()
    nodes = by_tap(model, images)
    assert set(nodes) == {name for name, _ in model.named_modules() if name}
    assert all(module.training for module in model.modules())
    assert nodes["stages.1.blocks.0.mixer"] == Node(
        "stages.1.blocks.0.mixer", "Conv2d", (8, 4, 4), "NCHW", 8 * 8 * 9 + 8, 2 * 8 * 8 * 9 * 4 * 4, ""
    )
    assert nodes["stages.1.blocks.0"].flops == sum(
        nodes[f"stages.1.blocks.0.{part}"].flops for part in ("mixer", "mlp")
    )
    assert nodes["head"].layout == "NC" and nodes["head"].flops == 2 * 8 * 5
    assert nodes["stages"].note == "not called", "a list of modules returns nothing"
    taps = [tap for tap, node in nodes.items() if not node.note]
    with kd.Taps(model, taps) as seen, torch.no_grad():
        model(images)
    assert {tap: tuple(seen[tap].shape[1:]) for tap in taps} == {tap: nodes[tap].shape for tap in taps}


def test_layouts_of_tokens_and_of_channels_last() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    nodes = by_tap(vit, torch.randn(1, 3, 32, 32), pattern="blocks.*")
    assert [(node.tap, node.shape, node.layout) for node in nodes.values()] == [("blocks.0", (5, 192), "NLC+1")]
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1), num_heads=(1, 2))
    assert by_tap(swin, torch.randn(1, 3, 64, 64))["layers.0.blocks.0"].layout == "NHWC"


def test_what_cannot_be_tapped_says_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.split = nn.Conv2d(3, 3, 1), nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.split(self.twice(self.twice(x)).flatten(1, 2))[0]

    nodes = by_tap(Odd(), torch.randn(1, 3, 4, 4))
    assert nodes["twice"].note == "called 2 times; tap its parent"
    assert nodes["split"].note == "returns tuple; tap a submodule of it"
    assert by_tap(Tiny(), torch.randn(1, 3, 8, 8), depth=1).keys() == {"stem", "stages", "drop", "norm", "head"}
    with pytest.raises(ValueError, match="did you mean 'mixer'"):
        inspect(Tiny(), torch.randn(1, 3, 8, 8), pattern="stages.*.blocks.*.miixer")


def test_a_model_by_its_timm_name_and_with_arguments() -> None:
    found = find_model("{name: riformer_nano, in_chans: 1, num_classes: 7}")
    assert found.shape == (1, 28, 28) and found.model(found.noise(2)).shape == (2, 7) and len(found.mean) == 1
    assert find_model("resnet18", 64).shape == (3, 64, 64)
    assert not found.model.training
    images = found.prepared(torch.ones(2, 3, 28, 28))
    torch.testing.assert_close(images, torch.full((2, 1, 28, 28), (1 - found.mean[0]) / found.std[0]))


def test_a_model_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_test_inspect.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())\ndef no(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_model("mine_of_test_inspect:net", 8)
    assert found.shape == (1, 8, 8) and [node.tap for node in inspect(found.model, found.noise(1))] == ["0", "1"]
    with pytest.raises(ConfigError, match="returned int, not a model"):
        find_model("mine_of_test_inspect:no")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("riformer_nan0", "riformer_nan0: no timm model, no file and no folder; did you mean 'riformer_nano'"),
        ("nowhere:net", "nowhere:net: cannot be called (No module named 'nowhere'); write module:function"),
        ("{name: resnet18, depht: 3}", "resnet18: cannot be built (ResNet.__init__() got an unexpected keyword"),
        ("{resnet18}", "{resnet18}: a mapping for a model has a name"),
        ("{name: resnet18", "{name: resnet18: "),
        (".", ".: no run (config.yaml is missing); name the folder of a finished run"),
    ],
)
def test_what_is_no_model_is_one_line(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_model(text)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_model_that_cannot_take_the_images_says_so() -> None:
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224: cannot take images of 3×32×32 .*give --image-size"):
        find_model("vit_tiny_patch16_224", 32)


def test_a_run_is_a_model(small_run: Path, tmp_path: Path) -> None:
    found = find_model(str(small_run))
    top1 = json.loads((small_run / "summary.json").read_text())["result"]["top1"]
    assert found.data is not None and found.recipe is not None
    hits = sum(int((found.model(images).argmax(1) == labels).sum()) for images, labels in found.data.test.epoch(0))
    assert hits / 24 * 100 == pytest.approx(top1, abs=0.05)
    fused = find_model(str(small_run / "student_fused.safetensors"))
    images = found.noise(4)
    torch.testing.assert_close(fused.model(images), found.model(images), rtol=1e-4, atol=1e-5)
    (tmp_path / "config.yaml").write_bytes((small_run / "config.yaml").read_bytes())
    with pytest.raises(
        ConfigError, match=r"the run is not finished \(student.safetensors is missing\); finish it first"
    ):
        find_model(str(tmp_path))
