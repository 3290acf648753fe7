"""The loop: what it logs, counts and skips. Stopping and going on is in test_runs.py."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from conftest import Tiny, randomise
from matplotlib.figure import Figure
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import kdlib as kd
from kdlib.data import Data
from kdlib.losses import CrossEntropy, SoftTarget
from kdlib.results import curves
from kdlib.training import tracking
from kdlib.training.evaluation import evaluate, with_best
from kdlib.training.train import Training


class Batches:
    """Six fixed batches, the same in every epoch."""

    def __init__(self, sizes: tuple[int, ...] = (4,) * 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.given = [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 5) for n in sizes]
        self.samples = sum(sizes)
        self.batches = SimpleNamespace(images=self.samples)

    def __len__(self) -> int:
        return len(self.given)

    def epoch(self, epoch: int = 0, start: int = 0):
        yield from self.given[start:]


def training(folder: Path, student: nn.Module, **settings: object) -> Training:
    data = Data("toy", tuple("abcde"), (0.0,) * 3, (1.0,) * 3, 3, 8, Batches(), Batches((3, 5)))
    teacher = randomise(Tiny(), 9)
    terms = [
        kd.Term("soft", SoftTarget(), schedule=kd.Window(until=1)),
        kd.Term("label", CrossEntropy(), 0.5),
    ]
    distiller = kd.Distiller(student, terms)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    scheduler = CosineLRScheduler(optimizer, t_initial=1000, t_in_epochs=False)
    folder.mkdir(parents=True, exist_ok=True)
    return Training(
        distiller, kd.Teacher(teacher, terms), data, optimizer, scheduler, Accelerator(cpu=True), folder, 2, **settings
    )


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.fault("metrics")
def test_evaluate_counts_every_image_once(student: nn.Module) -> None:
    batches = Batches((3, 5, 1))
    result = evaluate(student.train(), batches, Accelerator(cpu=True))
    with torch.no_grad():
        logits = student.eval()(torch.cat([images for images, _ in batches.given]))
    labels = torch.cat([labels for _, labels in batches.given])
    assert result["top1"] == pytest.approx(100 * (logits.argmax(-1) == labels).float().mean().item())
    assert result["top5"] == pytest.approx(100.0), "there are five classes"
    assert result["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_metrics_hold_terms_before_weights_and_weights_in_force(tmp_path: Path, student: nn.Module) -> None:
    result = training(tmp_path, student, log_every=3).run()
    logged = lines(tmp_path)
    first, second = [line for line in logged if "top1" in line]
    assert [line["epoch"] for line in logged] == [0.5, 1.0, 1, 1.5, 2.0, 2]
    assert set(first["terms"]) == {"soft", "label"} and set(second["terms"]) == {"label"}
    assert first["weights"] == {"soft": 1.0, "label": 0.5} and second["weights"] == {"soft": 0.0, "label": 0.5}
    assert second["loss"] == pytest.approx(0.5 * second["terms"]["label"], rel=1e-5)
    assert second["top1"] == result["top1"] and second["step"] == 12


def test_an_epoch_without_evaluation_claims_no_accuracy(tmp_path: Path, student: nn.Module) -> None:
    training(tmp_path, student, eval_every=2).run()
    first, second = lines(tmp_path)
    assert "top1" not in first and second["top1"] >= 0


def test_accumulation_steps_once_for_several_batches(tmp_path: Path, images: Tensor) -> None:
    """Two batches of four accumulated are one batch of eight: same gradient, same step."""
    student = randomise(Tiny(), 1)
    student.drop.p, student.norm = 0.0, nn.GroupNorm(1, 8)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    run = training(tmp_path / "a", student, accumulate=2)
    run.run()
    assert lines(tmp_path / "a")[-1]["step"] == 6
    twin = randomise(Tiny(), 1)
    twin.drop.p, twin.norm = 0.0, nn.GroupNorm(1, 8)
    twin.load_state_dict(state)
    whole = training(tmp_path / "b", twin)
    merged = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(whole.data.train.given[::2], whole.data.train.given[1::2], strict=True)
    ]
    whole.data.train.given = merged
    whole.run()
    for mine, hers in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, hers, rtol=1e-4, atol=1e-5)


def test_metrics_do_not_repeat_what_a_stopped_epoch_wrote(tmp_path: Path, student: nn.Module) -> None:
    training(tmp_path, student, log_every=2).run()
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # a run that died in a third epoch, in the middle of a line
        file.write(json.dumps(whole[0] | {"epoch": 2.3, "step": 14}) + '\n{"epoch": 2.6, "st')
    again = training(tmp_path, randomise(Tiny(), 5), log_every=2)
    again.epochs = 3
    again.run()
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(steps) and steps.count(14) == 1 and steps[-1] == 18


def test_curves_show_accuracy_where_tested_and_terms_of_every_epoch(
    tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    training(tmp_path, student, eval_every=2).run()
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    monkeypatch.setattr("matplotlib.use", lambda *_: pytest.fail("a notebook's own figures would no longer show"))
    curves({"student": tmp_path}, tmp_path / "curves.png")
    left, right = drawn[0].axes
    assert [list(line.get_xdata()) for line in left.lines] == [[2]]
    assert {line.get_label(): list(line.get_xdata()) for line in right.lines} == {"soft": [1], "label": [1, 2]}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_average_is_timms_and_is_measured_and_kept(tmp_path: Path, student: nn.Module) -> None:
    ema = ModelEmaV3(student, 0.5)
    seen = []
    run = training(tmp_path, student, ema=ema, metric="ema_test_loss")
    run.scheduler.step_update = lambda step: (
        step and seen.append({n: t.clone() for n, t in student.state_dict().items()})
    )
    result = run.run()
    average = seen[0]
    for state in seen[1:]:
        average = {n: a.lerp(state[n], 0.5) if a.is_floating_point() else state[n] for n, a in average.items()}
    for name, tensor in ema.module.state_dict().items():
        torch.testing.assert_close(tensor, average[name])
    assert result["ema_top1"] == evaluate(ema.module, Batches((3, 5)), Accelerator(cpu=True))["top1"]
    losses = [line["ema_test_loss"] for line in lines(tmp_path) if "top1" in line]
    assert result["best_ema_test_loss"] == min(losses) and result["best_epoch"] == 1 + losses.index(min(losses))


def test_the_best_student_is_kept_beside_the_last(
    tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([30.0, 50.0, 40.0, 50.0])
    kept = []

    def score(model: nn.Module, *_: object) -> dict[str, float]:
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": next(scores), "top5": 0.0, "test_loss": 0.0}

    monkeypatch.setattr("kdlib.training.evaluation.evaluate", score)
    run = training(tmp_path, student)
    run.epochs = 4
    assert run.run() == {"top1": 50.0, "top5": 0.0, "test_loss": 0.0, "best_top1": 50.0, "best_epoch": 2}
    best = load_file(tmp_path / "student_best.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in kept[1].items())


def test_the_best_student_and_what_is_told_of_it_agree_after_a_rollback(
    tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints are seldom, and where a device adds in no fixed order the epochs come out otherwise the next time."""

    class Spoilt(Batches):
        def __init__(self) -> None:
            super().__init__()
            self.batches.rows = lambda epoch, rank: [torch.arange(4)] * 6

        def epoch(self, epoch: int = 0, start: int = 0):
            for number, (images, labels) in enumerate(self.given[start:], start):
                yield images * (nan if (epoch, number) == (2, 3) else 1.0), labels

    scores = iter([30.0, 50.0, 20.0, 10.0, 20.0])
    seen = []

    def score(model: nn.Module, *_: object) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"top1": next(scores), "top5": 0.0, "test_loss": 0.0}

    monkeypatch.setattr("kdlib.training.evaluation.evaluate", score)
    run = training(tmp_path, student, save_every=100, on_nonfinite="rollback")
    run.data, run.epochs = replace(run.data, train=Spoilt()), 4
    result = run.run()
    assert run.at.skipped == [[2, 3]]
    assert (result["best_top1"], result["best_epoch"], len(seen)) == (50.0, 2, 4)
    best = load_file(tmp_path / "student_best.safetensors")
    assert all(torch.equal(best[name], tensor) for name, tensor in seen[1].items())


@pytest.mark.parametrize("metric", ["top1", "test_loss"])
def test_what_is_not_a_number_is_never_the_best(
    metric: str, tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [nan, nan, 3.0, nan]
    left = iter(scores)
    kept = []

    def score(model: nn.Module, *_: object) -> dict[str, float]:
        kept.append((tmp_path / "student_best.safetensors").exists())
        return {"top1": 0.0, "top5": 0.0, "test_loss": 0.0, metric: next(left)}

    monkeypatch.setattr("kdlib.training.evaluation.evaluate", score)
    run = training(tmp_path, student, metric=metric)
    run.epochs = 4
    result = run.run()
    assert (result[f"best_{metric}"], result["best_epoch"]) == (3.0, 3)
    assert kept == [False, False, False, True] and run.at.stale == 1
    assert ["best_epoch" in line for line in lines(tmp_path)] == [False, False, True, True]
    # what a checkpoint of a release before may hold
    assert with_best({metric: 3.0}, {f"best_{metric}": nan, "best_epoch": 1}, metric, 2)[1]


def test_a_run_ends_early_where_nothing_gets_better(
    tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([30.0, 29.0, 31.0, 31.0, 5.0])
    monkeypatch.setattr(
        "kdlib.training.evaluation.evaluate", lambda *_: {"top1": next(scores), "top5": 0.0, "test_loss": 0.0}
    )
    run = training(tmp_path, student, patience=2)
    run.epochs = 9
    assert run.run()["best_epoch"] == 3
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    again = training(tmp_path, randomise(Tiny(), 5), patience=2)
    again.epochs = 9
    assert again.run()["best_epoch"] == 3, "started again it is still at its end"


def test_batches_that_do_not_fill_a_step_are_left_out(tmp_path: Path, student: nn.Module) -> None:
    training(tmp_path, student, accumulate=4, log_every=1).run()
    logged = lines(tmp_path)
    assert [line["epoch"] for line in logged] == [0.25, 0.5, 0.75, 1, 1, 1.25, 1.5, 1.75, 2, 2]
    assert [line["step"] for line in logged] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert logged[2]["gradient"] is None and logged[3]["gradient"] > 0


class Recorder(GeneralTracker):
    """What a tracker is told."""

    name = "tensorboard"
    requires_logging_directory = True
    told: ClassVar[list[object]] = []

    def __init__(self, run_name: str, logging_dir: str, **more: object) -> None:
        super().__init__()
        self.told.append((run_name, logging_dir, more))

    @property
    def tracker(self) -> None: ...

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, object], step: int | None = None, **more: object) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("end")


def test_trackers_are_told_flat_numbers_and_go_on_where_the_run_does(
    tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "told", told := [])
    config = {"terms": {"soft": {"weight": 1.0}}, "data": None, "betas": [0.9, 0.99]}
    training(tmp_path, student, trackers=["tensorboard"], config=config).run()
    made, known, (step, values), _, end = told
    assert made == ("tensorboard", str(tmp_path), {}) and end == "end" and step == 6
    assert known == {"terms/soft/weight": 1.0, "data": "None", "betas/0": 0.9, "betas/1": 0.99}
    assert {"loss", "terms/soft", "weights/soft", "lr", "images_per_second", "data_share"} <= set(values)
    told.clear()
    again = training(tmp_path, randomise(Tiny(), 5), trackers=["tensorboard"], config=config)
    again.epochs = 3
    again.run()
    assert told[0] == ("tensorboard", str(tmp_path), {"purge_step": 13}) and [t[0] for t in told[1:-1]] == [18]


@pytest.mark.parametrize("where", ["_set_out", "_epoch"])
def test_a_run_that_fails_leaves_no_tracker_open_and_nothing_with_the_accelerator(
    where: str, tmp_path: Path, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "told", told := [])
    run = training(tmp_path, student, trackers=["tensorboard"])
    plain = getattr(run, where)

    def fails() -> None:
        plain()
        assert run.accelerator._models and "end" not in told
        raise ArithmeticError("out of numbers")

    monkeypatch.setattr(run, where, fails)
    with pytest.raises(ArithmeticError):
        run.run()
    assert told[-1] == "end" and not run.accelerator._models and not run.accelerator._optimizers


def test_each_run_of_a_process_begins_with_the_loss_scale_of_the_first(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
    scales: list[list[float]] = []
    for number in range(2):
        run = training(tmp_path / str(number), randomise(Tiny(), 1), log_every=1)
        run.accelerator = accelerator
        tell, mine = run._tell, []

        def told(*batch: object, tell=tell, mine=mine) -> None:
            mine.append(accelerator.scaler.get_scale())
            tell(*batch)

        run._tell = told
        run.run()
        scales.append(mine)
    assert scales[0] == scales[1] == [8.0] * 3 + [16.0] * 4 + [32.0] * 4 + [64.0]
    tree = json.loads((tmp_path / "1" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert tree["scaler"]["scale"] == 64.0
    again = training(tmp_path / "1", randomise(Tiny(), 1))
    again.accelerator, again.epochs = accelerator, 3
    again._conclude, conclude = lambda: mine.append(accelerator.scaler.get_scale()) or conclude(), again._conclude
    again.run()
    assert mine[-1] == 128.0, "a run that goes on goes on with its own"


def test_a_tracker_that_is_not_installed_is_told() -> None:
    with pytest.raises(ValueError, match=r"^wandb is not installed; pip install wandb, or leave it out$"):
        tracking.choose(["wandb"])
    assert set(tracking.choose("auto")) <= {"tensorboard"}


def test_tensorboard_reads_what_was_written(tmp_path: Path, student: nn.Module) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training(tmp_path, student, trackers=["tensorboard"], log_every=3).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    told = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars("loss")]
    assert told == [(line["step"], line["loss"]) for line in lines(tmp_path)]
