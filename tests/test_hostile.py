"""Configs that want to run code, read what they should not, or write elsewhere: lines, at once, and nothing happens."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kdlib import launch
from kdlib.recipe import Recipe
from kdlib.training.runfolder import beside

GOOD = "student: {name: resnet18}\nterms: {label: {loss: cross_entropy}}\n"


def loss(text: str) -> str:
    return f"student: {{name: resnet18}}\nterms: {{label: {{loss: {text}}}}}\n"


HOSTILE: dict[str, tuple[str, str]] = {
    "a tag that calls": ("student: !!python/object/apply:os.system ['touch bomb']\n", "tag"),
    "a tag that imports": ("student: !!python/module:bomb\n", "tag"),
    "_target_": (loss("{name: cross_entropy, _target_: os.system}"), "_target_"),
    "an import path as a loss": (loss("os.system"), "no loss 'os.system'"),
    "an import path as a model": ("student: {name: os.system}\nterms: {label: {loss: cross_entropy}}\n", "no model"),
    "module:function as a model": ("student: {name: 'bomb:go'}\nterms: {label: {loss: cross_entropy}}\n", "no model"),
    "a local folder as a model": (
        "student: {name: 'local-dir:.'}\nterms: {label: {loss: cross_entropy}}\n", "no model"
    ),
    "a file of timm's own": (
        "student: {name: resnet18, checkpoint_path: bomb.pth}\nterms: {label: {loss: cross_entropy}}\n",
        "is not taken from a config",
    ),
    "a file behind timm's own": (
        "student: {name: resnet18, pretrained_cfg_overlay: {file: bomb.pth}}\nterms: {label: {loss: cross_entropy}}\n",
        "is not taken from a config",
    ),
    "a name that leaves": (GOOD + "teachers: {'../x': {name: resnet18, recipe: {}}}\n", "a teacher's name is"),
    "a term that leaves": ("student: {name: resnet18}\nterms: {'../x': {loss: cross_entropy}}\n", "a term's name is"),
    "a zero in a path": (GOOD + 'output: "x\\0y"\n', "should be the path of a file or folder"),
    "ten megabytes": ("x: " + "y" * 10_000_000, "larger than 100,000 bytes"),
    "a very long key": (GOOD + "? " + "k" * 50_000 + "\n: 1\n", "unknown key"),
    "3,000 deep": (GOOD + "data: " + "[" * 3000 + "]" * 3000, "nested"),
    "a device as a base": ("base: /dev/zero\n" + GOOD, "/dev/zero"),
    "a folder as a base": ("base: /proc/self\n" + GOOD, "/proc/self"),
}  # fmt: skip


@pytest.mark.fault("hostile config")
@pytest.mark.parametrize("what", HOSTILE)
def test_it_is_refused_at_once_and_nothing_happens(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = HOSTILE[what]
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bomb.py").write_text(
        "import pathlib; pathlib.Path('bomb').touch()\ndef go(): pathlib.Path('bomb').touch()\n"
    )
    Path("x.yaml").write_text(text)
    began = time.process_time()
    assert launch.main(lambda recipe: None, Path("x.yaml"), ["x.yaml"]) == 2
    assert time.process_time() - began < 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said and max(map(len, said.splitlines())) < 500
    assert sorted(os.listdir()) == ["x.yaml"] and not (tmp_path / "__pycache__").exists()


@pytest.mark.fault("hostile config")
@pytest.mark.parametrize("text", ["${HOME}/x", "$HOME", "%(here)s", "{0.__class__}", "`id`", "$(id)"])
def test_nothing_in_a_text_is_replaced(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(GOOD + f"output: '{text}'\n")
    accepted: list[Recipe] = []
    assert launch.main(accepted.append, Path("x.yaml"), ["x.yaml"]) == 0
    assert accepted[0].output == Path(text)


@pytest.mark.fault("hostile config")
@pytest.mark.parametrize("name", ["hf-hub:../../x", "hf-hub:/etc/x", "hf-hub:a/b@../c"])
def test_the_folder_of_a_child_lies_beside_its_parents(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(GOOD.replace("resnet18", f"'{name}'") + f"output: {tmp_path}/runs/x\n")
    accepted: list[Recipe] = []
    assert launch.main(accepted.append, Path("x.yaml"), [str(tmp_path / "x.yaml")]) == 0
    folder = beside(accepted[0], accepted[0]).output
    assert folder.parent == tmp_path / "runs" and folder.resolve().parent == (tmp_path / "runs").resolve()
