"""What is taken away from a finished run loads where it says, and answers as the run's student does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT
from timm.data.transforms_factory import create_transform
from timm.models import build_model_with_cfg, register_model
from torch import nn

import recipes.riformer.model  # noqa: F401  registers the models
from kdlib import cli, runs
from kdlib.cli.export import FORMATS as NAMES
from kdlib.config import ConfigError, read
from kdlib.export import FORMATS, compare, export, hub, probe_images
from kdlib.models import Found, find_model
from kdlib.recipe import load

PLAIN = str(ROOT / "recipes" / "riformer" / "configs" / "parts" / "plain.yaml")
FRESH = """
import sys
sys.modules["kdlib"] = sys.modules["recipes"] = None  # an import of either fails, though both are installed here
import torch
images = torch.load("images.pt")
{load}
torch.save(torch.as_tensor(logits), "logits.pt")
"""


@pytest.fixture(scope="module")
def riformer(small_run: Path) -> Found:
    return find_model(str(small_run))


@pytest.fixture(scope="module")
def timm_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A run whose student is an architecture of timm's."""
    folder = tmp_path_factory.mktemp("timm") / "run"
    data = f"data={{name: folder, root: '{small_run.parent / 'images'}', image_size: 32, batch_size: 16, workers: 0}}"
    made = [PLAIN, "student.name=test_vit", "student.img_size=32", data, "epochs=1", "threads=1", f"output={folder}"]
    runs.run(load(read([*made, "schedule.warmup_epochs=0"])))
    return find_model(str(folder))


def fresh(folder: Path, found: Found, load: str) -> torch.Tensor:
    """Logits of test images from a process without kdlib, started in ``folder``."""
    images = probe_images(found, 24)
    torch.save(images, folder / "images.pt")
    code = FRESH.format(load=load)
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), found.model(images), rtol=1e-4, atol=1e-5)
    return images


def test_the_formats_are_those_that_the_command_names() -> None:
    assert tuple(FORMATS) == NAMES


def test_a_timm_student_loads_with_timm_alone(timm_run: Found, tmp_path: Path) -> None:
    done = export(timm_run, "timm", tmp_path / "out")
    assert not done.fused and done.needs == "timm" and done.images == 24 and done.difference < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "test_vit" and config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32] and config["pretrained_cfg"]["mean"][0] == 0.485
    told = config["pretrained_cfg"]
    assert told["crop_pct"] == 0.875 and told["interpolation"] == "bicubic", "of the run's data, not of timm's weights"
    assert not {"license", "origin_url", "paper_ids", "test_input_size", "test_crop_pct", "pool_size"} & set(told)
    again = find_model(str(tmp_path / "out"))
    assert again.shape == (3, 32, 32) and again.trained
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlibrary_name: timm\n" in card
    told = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    size = create_transform(tuple(told["input_size"]), crop_pct=told["crop_pct"]).transforms[0].size
    assert f"the shorter side resized to {size} pixels ({told['interpolation']})" in card
    code = card.split("```python\n")[1].split("```")[0]
    fresh(tmp_path, timm_run, f"{code}\nlogits = model(images).detach()")


def test_the_folder_is_what_the_hub_serves(timm_run: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(timm_run, "hub", tmp_path / "out")

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "me/student"
        if not (tmp_path / "out" / filename).exists():
            from huggingface_hub.utils import EntryNotFoundError

            raise EntryNotFoundError(filename)
        return str(tmp_path / "out" / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = timm.create_model("hf-hub:me/student", pretrained=True).eval()
    images = timm_run.noise(4)
    torch.testing.assert_close(model(images), timm_run.model(images))


class Bare(nn.Module):
    """What a page of the docs registers: none of what timm's own models tell about themselves."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(in_chans, 8, 4, 4), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.stem(x).mean((2, 3)))
        return out


@register_model
def bare(pretrained: bool = False, **arguments: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(Bare, "bare", pretrained, **arguments)
    return model


def test_a_model_of_ones_own_becomes_a_folder_of_timms(small_run: Path, tmp_path: Path) -> None:
    data = f"data={{name: folder, root: '{small_run.parent / 'images'}', image_size: 32, batch_size: 16, workers: 0}}"
    made = [PLAIN, "student.name=bare", data, "epochs=1", "threads=1", "schedule.warmup_epochs=0"]
    runs.run(load(read([*made, f"output={tmp_path / 'run'}"])))
    done = export(find_model(str(tmp_path / "run")), "timm", tmp_path / "out")
    assert done.difference < 1e-5
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (told["architecture"], told["num_classes"], told["num_features"]) == ("bare", 3, None)


def test_an_argument_that_was_taken_away_is_not_written(timm_run: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """``channels: null`` over a base that has it: timm drops what is None when a run builds its model."""
    monkeypatch.setitem(timm_run.recipe.student.model_extra, "channels", None)
    assert "channels" in timm_run.recipe.student.arguments and "channels" not in hub.build_args(timm_run, {})


def test_a_riformer_is_fused_and_needs_its_module(riformer: Found, tmp_path: Path) -> None:
    done = export(riformer, "timm", tmp_path / "out")
    assert done.fused and done.difference < 1e-4 and done.agreement == 1 and "recipes.riformer.model" in done.needs
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["form"] == "full"
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert loaded.form == "full"
    images = riformer.noise(4)
    torch.testing.assert_close(loaded(images), riformer.model(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no weights are published"):
        timm.create_model("riformer_nano", pretrained=True)
    whole = export(riformer, "safetensors", tmp_path / "whole", fused=False)
    assert not whole.fused and whole.parameters > done.parameters


def test_torch_export_needs_torch_alone_and_takes_any_batch(riformer: Found, tmp_path: Path) -> None:
    done = export(riformer, "torch-export", tmp_path / "out")
    assert done.needs == "torch"
    load = 'model = torch.export.load("out/model.pt2").module()'
    halves = "logits = torch.cat([model(images[:23]), model(images[23:])]).detach()"
    fresh(tmp_path, riformer, f"{load}\n{halves}")
    fixed = export(riformer, "torch-export", tmp_path / "one", batch_size=1)
    assert fixed.images == 24
    assert "\nlibrary_name: pytorch\n" in (fixed.folder / "README.md").read_text(), "timm does not load it"


@pytest.mark.slow
def test_onnx_needs_onnxruntime_alone(riformer: Found, timm_run: Found, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    for number, found in enumerate((riformer, timm_run)):
        done = export(found, "onnx", tmp_path / str(number))
        assert done.needs == "onnxruntime" and done.difference < 1e-4
        assert {path.name for path in done.folder.iterdir()} == {"model.onnx", "README.md"}
        assert b".py" not in (done.folder / "model.onnx").read_bytes(), "no path of this machine"
        card = (done.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code = card.replace('"model.onnx"', f'"{number}/model.onnx"')
        fresh(tmp_path, found, f"images = images.numpy()\n{code}")


def test_an_export_that_answers_differently_leaves_nothing(
    riformer: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 0.5

    monkeypatch.setattr("kdlib.export.fuse", lambda model: (Shifted(model), {}))
    with pytest.raises(ConfigError, match=r"a logit by 5\.0e-01; nothing was kept"):
        export(riformer, "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    nan = lambda images: torch.full((len(images), 3), float("nan"))  # noqa: E731
    with pytest.raises(ConfigError, match="answers differently"):
        compare(riformer.model, nan, riformer.noise(3))


def test_what_cannot_be_exported_is_one_line(riformer: Found, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--to: no format 'onx' \(known: safetensors, onnx"):
        export(riformer, "onx", tmp_path / "a")
    with pytest.raises(ConfigError, match="resnet18: is no finished run"):
        export(find_model("resnet18", 64), "timm", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"--out: .* exists"):
        export(riformer, "timm", tmp_path)
    for count in (0, -1):
        with pytest.raises(ConfigError, match=f"--count: at least one test image is compared on, got {count}"):
            export(riformer, "timm", tmp_path / "a", count=count)
    assert not list(tmp_path.iterdir())


def test_the_command(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(small_run), "--to", "safetensors", "--out", str(out), "--count", "8"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "fused: " in told[0] and "compared on 8 test images: largest difference of a logit " in told[1]
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "README.md"}
    assert cli.main(["export", str(small_run), "--to", "timm", "--push", "me/x"]) == 2
    assert "--push goes with --to hub" in capsys.readouterr().err


def test_push_uploads_the_folder_and_only_on_request(
    timm_run: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, Any]] = []

    class Repository(str):
        repo_id = "me/student"

    class Hub:
        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, name: str, **named: Any) -> Repository:
            calls.append((name, named))
            return Repository("https://huggingface.co/me/student")

        def upload_folder(self, **named: Any) -> None:
            calls.append((named["repo_id"], sorted(path.name for path in Path(named["folder_path"]).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    run = str(timm_run.folder)
    assert cli.main(["export", run, "--to", "hub", "--out", str(tmp_path / "a")]) == 0 and not calls
    assert cli.main(["export", run, "--to", "hub", "--out", str(tmp_path / "b"), "--push", "student", "--private"]) == 0
    assert calls == [
        ("student", {"private": True, "exist_ok": True}),
        ("me/student", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert "pushed to https://huggingface.co/me/student" in capsys.readouterr().out

    def refuse(self: Hub, name: str, **_: Any) -> None:
        raise RuntimeError("401\nno token")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    assert cli.main(["export", run, "--to", "hub", "--out", str(tmp_path / "c"), "--push", "student"]) == 2
    assert capsys.readouterr().err == "--push student: refused (401 no token); `hf auth login` sets a token\n"
