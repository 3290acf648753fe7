"""Shared by all tests: one thread, two tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.matrix import pytest_runtest_setup, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"


class Block(nn.Module):
    """Two convolutions with a residual, so that there is something to tap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = nn.Conv2d(width, width, 3, padding=1)
        self.mlp = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(torch.tanh(self.mixer(x)))


class Tiny(nn.Module):
    """Stages of blocks over 8 px images, a small stand-in for a vision backbone."""

    def __init__(self, widths: tuple[int, ...] = (6, 8), depths: tuple[int, ...] = (2, 2), classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = nn.Module()
            stage.down = nn.Conv2d(widths[max(i - 1, 0)], width, 2, 2) if i else nn.Identity()
            stage.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            self.stages.append(stage)
        self.drop = nn.Dropout(0.1)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage.down(x)
            for block in stage.blocks:
                x = block(x)
        return self.head(self.drop(self.norm(x).mean((2, 3))))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: fresh initialisation (ones, zeros) hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def strike_down(run: Any, epoch: int, batch: int) -> None:
    """Runs a ``Training`` until it fails before a batch, as where a machine is gone."""
    plain = run._step

    def step(*given: Any) -> None:
        if (run.at.epoch, run.at.batch) == (epoch, batch):
            raise RuntimeError("the machine is gone")
        plain(*given)

    run._step = step
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run.run()


def interpreted(script: str) -> str:
    """What a script prints in a process of its own, in which Triton's kernels run on the CPU.

    The script is given the folders to import from as ``{root!r}`` and ``{tests!r}``.
    """
    pytest.importorskip("triton")
    script = script.format(root=str(ROOT), tests=str(ROOT / "tests"))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this release of Triton interprets no loop beside NumPy from 2.4 on")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """A process in which accelerate has chosen no device and no precision yet, before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def student() -> nn.Module:
    return randomise(Tiny((6, 8)), seed=1)


@pytest.fixture
def teacher() -> nn.Module:
    return randomise(Tiny((6, 8)), seed=2)


@pytest.fixture
def wide() -> nn.Module:
    return randomise(Tiny((10, 12), (2, 4)), seed=3)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 3])


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of RIFormer's first run, made small: 72 images of noise, one epoch of each model."""
    from kdlib import launch
    from recipes.riformer import run as riformer
    from tests.test_runs import make_images

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("small")
    folder = place / "riformer"
    data = f"{{name: folder, root: '{make_images(place / 'images')}', image_size: 28, batch_size: 16, workers: 0}}"
    children = ("teachers.wide.recipe", "teachers.twin.recipe", "baseline")
    changes = [f"{child}.schedule.warmup_epochs=0" for child in children]
    changes += [f"{child}.epochs=1" for child in children[:2]]
    changes += [f"data={data}", "data.eval_batch_size=24", "epochs=1", "threads=1", "schedule.warmup_epochs=0"]
    default = ROOT / "recipes" / "riformer" / "configs" / "default.yaml"
    assert launch.main(riformer.main, default, [*changes, f"output={folder}"]) == 0
    return folder
