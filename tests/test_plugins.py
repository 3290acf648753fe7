"""Losses and models of installed packages, by entry point; a plugin that fails is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm

from kdlib import launch, losses, plugins
from kdlib.cli import main

CODE = """
from torch import nn
from timm.models import register_model
from kdlib.losses import register

class FarAway(nn.Module):
    view = "logits"
    def forward(self, student, teacher):
        return (student - teacher).abs().mean()

@register_model
def far_net(pretrained=False, num_classes=10, in_chans=1, **more):
    return nn.Sequential(nn.Flatten(), nn.Linear(784 * in_chans, num_classes))

def begin():
    register(FarAway)
"""
RECIPE = """
student: {name: far_net}
teachers: {big: {name: far_net, recipe: {terms: {label: {loss: cross_entropy}}, epochs: 1}}}
terms: {far: {loss: far_away, teacher: big}}
data: {limit: 32, batch_size: 16, eval_batch_size: 4000}
epochs: 1
trackers: []
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a tiny distribution on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    before = set(losses.LOSSES)

    def put(code: str, value: str = "far_pack:begin", name: str = "far") -> None:
        info = tmp_path / "site" / "far_pack-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: far-pack\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[kdlib.plugins]\n{name} = {value}\n")
        (tmp_path / "site" / "far_pack.py").write_text(code)

    plugins.load_plugins.cache_clear()
    yield put
    plugins.load_plugins.cache_clear()
    sys.modules.pop("far_pack", None)
    for name in set(losses.LOSSES) - before:
        del losses.LOSSES[name]


def test_a_config_names_what_a_plugin_registered(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(CODE)
    (tmp_path / "far.yaml").write_text(RECIPE)
    assert launch.main(lambda recipe: None, tmp_path / "far.yaml", ["--dry-run"]) == 0, capsys.readouterr().err
    assert plugins.load_plugins() == ("far",) and "far_away" in losses.LOSSES and timm.is_model("far_net")
    assert main(["inspect", "{name: far_net, in_chans: 3}", "--image-size", "28", "--quiet"]) == 0


@pytest.mark.fault("hostile config")
@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("import no_such_module", "far_pack", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('two\\nlines')", "far_pack", "RuntimeError: two lines"),
        ("", "far_pack:begin", "AttributeError"),
        (
            CODE.replace("register(FarAway)", "register(FarAway, 'dkd')"),
            "far_pack:begin",
            "the name 'dkd' belongs to DKD",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_line_that_names_it(
    code: str, value: str, reason: str, install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(code, value)
    (tmp_path / "far.yaml").write_text(RECIPE)
    for run in (
        lambda: launch.main(lambda recipe: None, tmp_path / "far.yaml", []),
        lambda: main(["inspect", "resnet18"]),
    ):
        assert run() == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"plugin 'far' (far-pack 1.2, {value}) cannot be loaded (") and reason in said
        assert "\n" not in said and said.endswith("set KDLIB_PLUGINS=off")


def test_plugins_can_be_chosen_and_switched_off(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(CODE)
    monkeypatch.setenv("KDLIB_PLUGINS", "off")
    assert plugins.load_plugins() == () and "far_pack" not in sys.modules
    plugins.load_plugins.cache_clear()
    monkeypatch.setenv("KDLIB_PLUGINS", "other")
    assert main(["inspect", "resnet18"]) == 2
    assert capsys.readouterr().err == "KDLIB_PLUGINS: no plugin 'other' is installed (known: far)\n"
    monkeypatch.setenv("KDLIB_PLUGINS", "far")
    assert plugins.load_plugins() == ("far",)
