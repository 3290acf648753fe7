"""What is built and installed is whole: the wheel holds every file that the code reads, and imports by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

READS = (
    "kdlib/py.typed", "kdlib/data/assets/fashion_mnist_5k.npz", "kdlib/data/assets/FASHION_MNIST_LICENSE",
    "kdlib/recipe/schema.json", "kdlib/report/page/report.html.jinja", "kdlib/report/page/report.css",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    shutil.copytree(ROOT / "kdlib", place / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import setuptools.build_meta as build; print(build.build_wheel({str(place)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return place / done.stdout.splitlines()[-1]


@pytest.mark.fault("install")
def test_the_wheel_holds_what_the_code_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert set(READS) <= names and any(name.endswith("licenses/LICENSE") for name in names)
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kdlib").rglob("*.py")}
    assert own == {name for name in names if name.endswith(".py")}


@pytest.mark.fault("install")
def test_what_was_installed_works_without_the_checkout_and_without_a_network(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import socket; socket.socket.connect = None\n"
        "import kdlib, kdlib.data, kdlib.recipe; print(kdlib.__file__, kdlib.data.load().train.samples)\n"
        "from kdlib.cli import main; main(['--version'])"
    )
    given = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": str(tmp_path / "site")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "site") in done.stdout and "4992" in done.stdout and "0.1.0" in done.stdout
