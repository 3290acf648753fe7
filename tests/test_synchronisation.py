"""Between two log lines no step asks the device for a value: counted on a CPU, forbidden on a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, Tiny, randomise
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdlib as kd
from kdlib import data
from kdlib.data.augment import Augment
from kdlib.losses import CRD, CrossEntropy, FeatureMSE, LearnableTemperature, SoftTarget
from kdlib.training.guard import Guard
from kdlib.training.journal import Journal
from kdlib.training.state import State
from kdlib.training.train import Training

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ASKING = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten.equal",
          "aten.unique_dim", "aten._unique2", "aten.unique_consecutive"}  # fmt: skip
"""Kernels whose result the host waits for: a value, or a shape that depends on values."""
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
HOST = ("kdlib/data/samplers.py", "kdlib/data/augment.py")
"""What draws from a generator of the host's own; its tensors never see the device."""


class Waits(TorchDispatchMode):
    """Lists each place that waits for the device, except where it is paused."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.entered: dict[str, list[int]] = {}
        """Where it was paused: after how many batches each method was entered."""
        self.steps, self._paused = 0, 0

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        self.entered.setdefault(name, []).append(self.steps)
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def note(self, what: str) -> None:
        here = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT / "kdlib"))]
        names = [str(Path(frame.filename).relative_to(ROOT)) for frame in here]
        if not self._paused and names and not set(names) & set(HOST):
            self.found.append(f"{what}: {names[-1]}:{here[-1].lineno} {here[-1].line}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        by_mask = name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or ()
        )
        if name in ASKING or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Counts all through a run but where a line, a checkpoint or an evaluation is due."""
    mode = Waits()

    def wrap(owner: type, name: str, around: Callable[[], Any]) -> None:
        plain = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            with around():
                return plain(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, names in {
        Training: ("_tell", "_conclude", "_begin"), Journal: ("read",), State: ("save", "load"), Guard: ("look",)
    }.items():  # fmt: skip
        for name in names:
            wrap(owner, name, partial(mode.paused, f"{owner.__name__}.{name}"))

    @contextmanager
    def counted() -> Iterator[None]:
        mode.steps += 1
        yield

    wrap(Training, "_step", counted)
    for name in METHODS:
        plain = getattr(Tensor, name)

        def asks(self: Tensor, *args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            mode.note(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, asks)
    return mode


def training(folder: Path, device: str, *, remembers: bool = False, **settings: Any) -> Training:
    """A run with everything in it: mixup, a learned temperature, a trained adapter, or CRD's memory."""
    torch.manual_seed(0)
    augment = Augment() if remembers else Augment(crop_padding=2, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    images = data.load(batch_size=16, limit=96, image_size=8, augment=augment, device=device)
    student, model = (randomise(grey(Tiny((6, 8), classes=10)), seed) for seed in (1, 2))
    wide = randomise(grey(Tiny((10, 12), classes=10)), 3)
    panel = kd.Panel({"same": model, "wide": wide})
    last = "stages.*.blocks.-1"
    terms = [
        kd.Term("soft", LearnableTemperature(SoftTarget()), pairs=[kd.Pair("@output", "same")]),
        kd.Term("block", FeatureMSE(), 0.1, schedule=kd.Ramp(start=0, until=2), adapter="linear",
                pairs=kd.pair(student, panel, last, f"wide.{last}")),
        kd.Term("label", CrossEntropy(), 0.5),
    ]  # fmt: skip
    if remembers:
        terms.append(kd.Term("memory", CRD(96, 16, 32), pairs=[kd.Pair("@output", "same")]))
    batch, targets = next(data.with_targets(images.train, ["@indices"]))
    del targets
    terms = list(kd.fit(terms, student, panel, batch[:4].cpu()).terms)
    ema = ModelEmaV3(student.to(device), 0.9)
    distiller = kd.Distiller(student, terms).to(device)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3, fused=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=100, t_in_epochs=False)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator, teacher = Accelerator(cpu=device == "cpu"), kd.Teacher(panel.to(device), terms)
    return Training(
        distiller, teacher, images, optimizer, scheduler, accelerator, folder, 2, ema=ema, clip_grad=1.0, **settings
    )


def grey(model: Tiny) -> Tiny:
    model.stem = torch.nn.Conv2d(1, model.stem.out_channels, 3, padding=1)
    return model


CASES = {
    "mixed images, guarded": {"on_nonfinite": "skip"},
    "memory, accumulated": {"remembers": True, "accumulate": 2},
}
SAVES = {"mixed images, guarded": (5, [5, 10]), "memory, accumulated": (2, [4, 8])}
"""Of each case, the steps between two checkpoints, and after which batches of twelve one is due within an epoch."""


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case: str, tmp_path: Path, waits: Waits) -> None:
    """And what may wait is entered where a line, a checkpoint or the end of an epoch of six batches is due, only."""
    save_every, within = SAVES[case]
    run = training(tmp_path, "cpu", log_every=3, save_every=save_every, **CASES[case])
    with waits:
        run.run()
    assert waits.steps == 12
    assert not waits.found, "\n".join(sorted(set(waits.found)))
    lines, ends = [3, 6, 9, 12], [6, 12]
    read = waits.entered.pop("Journal.read")
    assert sorted(set(read)) == sorted({*lines, *within}) and len(read) == len(lines + within) + 2 * len(ends)
    assert waits.entered == {
        "Training._begin": [0], "State.load": [0], "Training._tell": lines, "Training._conclude": ends,
        "State.save": sorted([0, *within, *ends]), "Guard.look": sorted({*lines, *within}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "asks",
    [lambda x: x.sum().item(), lambda x: float(x.mean()), lambda x: x[x > 0], lambda x: x.nonzero(),
     lambda x: bool(x.isfinite().all()), lambda x: x.cpu(), lambda x: x.tolist()],
)  # fmt: skip
def test_the_count_finds_what_waits(
    asks: Callable[[Tensor], Any], tmp_path: Path, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(tmp_path, "cpu", log_every=3)
    plain = run._step

    def step(images: Tensor, targets: dict[str, Tensor]) -> None:
        asks(images)
        plain(images, targets)

    monkeypatch.setattr(run, "_step", step)
    run.epochs = 1
    with waits:
        run.run()
    assert len(waits.found) >= 6


@gpu
@pytest.mark.parametrize("mode", ["off", "default", "graphs", "compiled-graphs"])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_never_waits_within_a_step(
    case: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: None
) -> None:
    """CUDA itself raises at any synchronisation, loading and averaging included, from the second step of each epoch to
    its last: what is compiled, recorded or allocated once has been by then."""
    run = training(tmp_path, "cuda", log_every=100, compile=mode, **CASES[case])
    plain, steps = run._step, []

    def step(images: Tensor, targets: dict[str, Tensor]) -> None:
        strict = run.at.batch >= 2 * run.accumulate
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        steps.append(strict)
        plain(images, targets)
        if run.at.batch + 1 == run.batches:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(run, "_step", step)
    try:
        run.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps.count(True) >= 4


@gpu
@pytest.mark.parametrize("case", CASES)
def test_a_run_in_the_compilers_own_graphs_is_the_compiled_run(case: str, tmp_path: Path, fresh_state: None) -> None:
    """``reduce-overhead`` through hooks, a term that ends, a learned loss, accumulation and a shield."""
    torch.backends.cudnn.deterministic = True
    found = {}
    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        run = training(tmp_path / mode, "cuda", log_every=100, compile=mode, **CASES[case])
        run.epochs = 3  # the block term is over after the second
        run.run()
        assert run.passes.mode == mode
        found[mode] = {name: value.detach().clone() for name, value in run.distiller.state_dict().items()}
    for name, value in found["default"].items():
        torch.testing.assert_close(found["reduce-overhead"][name], value, rtol=1e-3, atol=1e-4, msg=name)
