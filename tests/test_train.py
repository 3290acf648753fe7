"""The loop: what it logs, counts and skips. Stopping and going on is in test_runs.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import Tiny, randomise
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import kdlib as kd
from kdlib.data import Data
from kdlib.losses import CrossEntropy, SoftTarget
from kdlib.results import curves
from kdlib.train import Training, evaluate


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
    drawn = []
    monkeypatch.setattr("matplotlib.pyplot.close", drawn.append)
    curves({"student": tmp_path}, tmp_path / "curves.png")
    left, right = drawn[0].axes
    assert [list(line.get_xdata()) for line in left.lines] == [[2]]
    assert {line.get_label(): list(line.get_xdata()) for line in right.lines} == {"soft": [1], "label": [1, 2]}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
