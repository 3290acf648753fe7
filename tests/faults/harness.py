"""Starts runs, does things to them, and compares what they leave with what an undisturbed run leaves."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from kdlib.training.journal import TIMES
from tests.tars import make_shards

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.faults.child"])
PATIENCE = float(os.environ.get("KDLIB_PATIENCE", "60"))
"""Seconds after which a run has ended, or hangs; more where the machine is busy with other things."""

RICH = {
    "student": {"name": "fault_toy"},
    "teachers": {"wide": {"name": "fault_toy", "width": 9, "weights": "teacher.safetensors"}},
    "terms": {
        "label": {"loss": "brittle"},
        "soft": {"loss": "soft_target", "slope": {"first": 1.0, "last": 0.2, "shape": "cosine"}},
        "block": {
            "loss": "feature_mse", "student": "block", "teacher": "wide.block", "adapter": "linear", "until": 1
        },
        "learned": {"loss": "vid", "student": "block", "teacher": "wide.block"},
    },
    "data": {"limit": 100, "batch_size": 8, "eval_batch_size": 1000, "augment": {"mixup": 0.2, "random_erasing": 0.3}},
    "epochs": 2,
    "schedule": {"warmup_epochs": 0.5, "cooldown_epochs": 0.25},
    "optimizer": {"clip_grad": 1.0},
    "ema": {"decay": 0.8},
    "accumulate": 2,
    "log_every": 3,
    "save_every": 2,
    "threads": 1,
    "trackers": [],
    "output": "runs/r",
}  # fmt: skip
"""Mixup, erasing, dropout, batch statistics, an adapter that falls silent, a learned loss, a slope, warm-up and
cool-down, EMA, accumulation and an epoch with a batch left over: 12 batches, 6 steps, 2 epochs."""

MEMORY = RICH | {
    "terms": {
        "label": {"loss": "brittle"},
        "crd": {"loss": {"name": "crd", "dim": 4, "negatives": 8}, "view": "embedding", "student": "block",
                "teacher": "wide.block"},
    },
    "data": RICH["data"] | {"augment": {"random_erasing": 0.3}},  # type: ignore[dict-item]
    "accumulate": 1,
    "log_every": 5,
    "save_every": 3,
}  # fmt: skip
"""CRD's memory of every image."""


FILES: dict[str, Any] = {
    "student": {"name": "fault_toy"},
    "terms": {"label": {"loss": "brittle"}},
    "data": {
        "name": "folder", "root": "images", "image_size": 28, "batch_size": 6, "workers": 2,
        "augment": {"crop_scale": [0.5, 1.0], "color_jitter": 0.2},
    },
    "epochs": 2, "log_every": 2, "save_every": 2, "threads": 1, "trackers": [], "output": "runs/r",
}  # fmt: skip
"""Image files, read by two workers: 6 batches, 2 epochs."""

SHARDS = FILES | {
    "data": FILES["data"] | {"name": "wds/", "root": "shards", "shuffle": 8},
    "epochs": 2,
}
"""The same from tar files, which can only be read from one end to the other."""


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "20",
}
"""The environment of FSDP2, each layer of the toy gathered by itself."""


class Run:
    """A recipe in a folder of its own, and the processes that were started for it."""

    def __init__(self, recipe: dict[str, Any], **changes: Any) -> None:
        self.recipe, self.folder = recipe | changes, Path(tempfile.mkdtemp(prefix="kdlib-fault-"))
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self.recipe))
        generator = torch.Generator().manual_seed(3)
        if recipe["data"].get("name") == "wds/":
            make_shards(self.folder / "shards", {"train": (11, 17, 9), "validation": (5, 8)})
        if recipe["data"].get("name") == "folder":
            for split, count in (("train", 12), ("val", 4)):
                for number, name in enumerate(("red", "green", "blue")):
                    (self.folder / "images" / split / name).mkdir(parents=True)
                    for i in range(count):
                        pixels = torch.randint(0, 120, (28, 28, 3), generator=generator, dtype=torch.uint8)
                        pixels[..., number] += 80
                        picture = Image.fromarray(pixels.numpy())
                        picture.save(self.folder / "images" / split / name / f"{i}.png")
        shapes = {"stem.weight": (9, 1, 4, 4), "stem.bias": (9,), "norm.weight": (9,), "norm.bias": (9,)}
        shapes |= {"norm.running_mean": (9,), "block.weight": (9, 9, 3, 3), "block.bias": (9,)}
        shapes |= {"head.weight": (10, 9), "head.bias": (10,)}
        state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        state |= {"norm.running_var": torch.ones(9), "norm.num_batches_tracked": torch.tensor(1)}
        save_file(state, self.folder / "teacher.safetensors")

    @property
    def output(self) -> Path:
        return self.folder / self.recipe["output"]

    @property
    def checkpoints(self) -> list[Path]:
        """Whole or not, oldest first."""
        return sorted((self.output / "checkpoints").glob("step-*"))

    def start(self, *arguments: str, limit: int = 0, said: str = "said", **environment: str) -> BaseProcess:
        """One process. ``limit`` is the largest file that it may write, in bytes; environment names are upper case."""
        from tests.faults import child

        given = (list(arguments), str(self.folder), environment, limit, str(self.folder / said))
        process = processes.Process(target=child.main, args=given)
        process.start()
        return process

    def start_two(
        self,
        *arguments: str,
        of: dict[int, dict[str, str]] | None = None,
        said: tuple[str, str] = ("said", "said1"),
        limit: int = 0,
        **environment: str,
    ) -> list[BaseProcess]:
        """Two ranks of a gloo group; ``of`` is the environment of single ranks besides."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        ranks = [
            group | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (of or {}).get(rank, {})
            for rank in (0, 1)
        ]
        return [
            self.start(*arguments, said=name, limit=limit, **given) for name, given in zip(said, ranks, strict=True)
        ]

    def go(self, *arguments: str, code: int | None = 0, **more: Any) -> str:
        """Starts it, waits, and tells what it said."""
        return self.end(self.start(*arguments, **more), code)

    def end(self, process: BaseProcess, code: int | None = 0, said: str = "said") -> str:
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"still running after {PATIENCE} s: {self.said(said)}")
        assert code is None or process.exitcode == code, f"ended with {process.exitcode}: {self.said(said)}"
        return self.said(said)

    def said(self, file: str = "said") -> str:
        return (self.folder / file).read_text() if (self.folder / file).exists() else ""

    def wait_for(self, ready: Callable[[], object]) -> None:
        """Until something is so."""
        started = time.monotonic()
        while not ready():
            assert time.monotonic() - started < PATIENCE, self.said()
            time.sleep(0.01)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def left(output: Path) -> dict[str, Any]:
    """What a finished run comes to: the bytes of its weights, every line without its times, the last checkpoint."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    newest = max((output / "checkpoints").glob("step-*"))
    place = json.loads((newest / "state.json").read_text())["place"]
    return {
        "weights": {path.name: _digest(path) for path in sorted(output.glob("*.safetensors"))},
        "state": (newest.name, _digest(newest / "state.safetensors")),
        "lines": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "place": {key: value for key, value in place.items() if key not in ("seconds", "waited")},
        "result": json.loads((output / "summary.json").read_text())["result"],
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def undisturbed(recipe: str, ranks: int = 1, sharded: bool = False) -> dict[str, Any]:
    """What a run of ``recipe`` (YAML) leaves if nothing happens to it; made once."""
    run = Run(yaml.safe_load(recipe))
    try:
        if ranks == 1:
            run.go()
        else:
            for rank, process in enumerate(run.start_two(**(SHARDED if sharded else {}))):
                run.end(process, said="said" if not rank else "said1")
        return left(run.output)
    finally:
        run.remove()


def check_as_if_nothing_had_been(run: Run, ranks: int = 1, sharded: bool = False) -> None:
    """Every weight, line and number is that of the undisturbed run, bit for bit."""
    expected, found = undisturbed(yaml.safe_dump(run.recipe), ranks, sharded), left(run.output)
    for part, value in expected.items():
        assert found[part] == value, part
    assert not list(run.output.rglob(".tmp-*"))
