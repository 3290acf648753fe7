"""Whole runs over a handful of images: what is there is reused, what was stopped goes on exactly, what is wrong is told
before anything is made."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kdlib import Renormalize, runs
from kdlib.conclude import conclude
from kdlib.config import ConfigError, read
from kdlib.doctor import doctor
from kdlib.dryrun import dry_run
from kdlib.recipe import Recipe, load
from kdlib.report.opened import open_run
from kdlib.report.verdict import verdict
from kdlib.report.view import look
from kdlib.results import table, throughput
from kdlib.study.run import _finished
from kdlib.teacher import Teacher
from kdlib.training import checkpoint
from kdlib.training.place import channels_last
from recipes.riformer import gfnet, model  # noqa: F401  registers the models
from recipes.riformer import run as riformer
from recipes.riformer.convert import convert
from tests.conftest import ROOT, Tiny

DEFAULT = str(ROOT / "recipes" / "riformer" / "configs" / "default.yaml")
PLAIN = str(ROOT / "recipes" / "riformer" / "configs" / "parts" / "plain.yaml")


def make_images(root: Path) -> Path:
    """Three classes of noise with a colour, 24 images each to train on and 8 to test on."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 8)):
        for number, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 120, (28, 28, 3), generator=generator, dtype=torch.uint8)
                pixels[..., number] += 80
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


def over(root: Path, epochs: int = 2) -> list[str]:
    """Arguments of a run over these images, with much that is random, so that a wrong generator shows."""
    augment = "{crop_scale: [0.5, 1], mixup: 0.2, random_erasing: 0.2}"
    data = f"data={{name: folder, root: '{root}', image_size: 28, batch_size: 16, workers: 0, augment: {augment}}}"
    return [data, f"epochs={epochs}", "threads=1", "student.drop_path_rate=0.2", "schedule.warmup_epochs=0", "seed=5"]


def whole(root: Path, output: Path, *more: str) -> Recipe:
    """RIFormer's objective: two teachers, a baseline, four terms."""
    children = [f"{child}.schedule.warmup_epochs=0" for child in CHILDREN]
    children += [f"teachers.{name}.recipe.epochs=1" for name in ("wide", "twin")]
    soft = ["teachers.wide.recipe.terms.label.loss=cross_entropy", f"output={output}"]
    return load(read([DEFAULT, *over(root), *children, *soft, *more]))


CHILDREN = ("teachers.wide.recipe", "teachers.twin.recipe", "baseline")


def plain(root: Path, output: Path, *more: str, epochs: int = 2) -> Recipe:
    """A student that learns from the labels alone."""
    return load(read([PLAIN, "student.name=riformer_nano", *over(root, epochs), f"output={output}", *more]))


def files(folder: Path) -> dict[str, int]:
    """When each file below was last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def lines(call: Any, *arguments: Any, **named: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **named)
    assert not any("\n" in line for line in caught.value.lines)
    return caught.value.lines


Stop = Callable[..., None]


class Killed(BaseException):
    """What no handler expects, as a power cut is."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """Ends the process, as far as the run can tell, once so many checkpoints of steps are written."""
    save = checkpoint.save

    def arm(number: int, within: str = "") -> None:
        written = 0

        def save_and_die(place: Path, step: int, *arguments: Any, **named: Any) -> Path:
            nonlocal written
            made = save(place, step, *arguments, **named)
            written += within in str(place) and step > 0
            if written == number:
                raise Killed
            return made

        monkeypatch.setattr(checkpoint, "save", save_and_die)

    return arm


# the whole objective, made once for several tests


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.Outcome]:
    output = tmp_path_factory.mktemp("runs") / "student"
    torch.set_num_threads(1)
    return output, runs.run(whole(folder, output), convert=convert)


def test_a_run_leaves_its_config_its_weights_and_its_numbers(finished: tuple[Path, runs.Outcome], folder: Path) -> None:
    output, outcome = finished
    assert set(outcome.teachers) == {"wide", "twin"} and outcome.baseline is not None
    runs_made = sorted(path.name.rpartition("-")[0] or path.name for path in output.parent.iterdir())
    assert runs_made == ["gfnet_h_nano", "metaformer_pool_nano", "riformer_nano", "student"]
    for made in output.parent.iterdir():
        names = {path.name for path in made.iterdir()}
        weights = {"student.safetensors", "student_best.safetensors"}
        assert names - {"tensorboard"} == weights | {
            "config.yaml",
            "metrics.jsonl",
            "summary.json",
            "checkpoints",
            ".lock",
        }
        assert json.loads((made / "summary.json").read_text())["result"]["top1"] >= 0
    again = load(read([str(output / "config.yaml")]))
    assert again == whole(folder, output)
    state = load_file(output / "student.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in outcome.student.state_dict().items())


def test_a_finished_run_is_read_back_and_nothing_is_written(
    finished: tuple[Path, runs.Outcome],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, first = finished
    before = files(output.parent)
    monkeypatch.setattr(runs, "_train", lambda *_: pytest.fail("trained again"))
    # what changes nothing in the result may differ
    second = runs.run(whole(folder, output, "threads=2", "log_every=7"))
    said = capsys.readouterr().out
    assert said.count("finished before, read from") == 4
    assert files(output.parent) == before and second.result == first.result
    assert 0.5 * first.seconds < second.seconds <= first.seconds, "what making it took, not what reading it took"
    mine, theirs = first.student.state_dict(), second.student.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_teachers_are_trained_once_and_reused_by_another_run(
    finished: tuple[Path, runs.Outcome], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    other = output.parent / "other"
    runs.run(whole(folder, other, "terms.soft.weight=0.5", "epochs=1"))
    said = capsys.readouterr().out
    assert said.count("finished before") == 2 and "teacher wide: finished before" in said
    assert "baseline: riformer_nano →" in said, "the baseline has as many epochs as the student, so it is another run"
    assert len(list(output.parent.glob("gfnet*"))) == 1
    for made in [other, *output.parent.glob("riformer_nano-*")]:
        if "epochs: 1\n" in (made / "config.yaml").read_text():
            shutil.rmtree(made)


def test_the_teacher_that_was_trained_is_the_one_that_teaches(
    finished: tuple[Path, runs.Outcome], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, outcome = finished
    seen: list[runs.Ready] = []
    monkeypatch.setattr(runs, "_train", lambda ready, _: seen.append(ready) or ({"top1": 0.0}, ready.student, None))
    again = output.parent / "once more"
    runs.run(whole(folder, again))
    (ready,) = seen
    for name, pattern in (("wide", "gfnet*"), ("twin", "metaformer*")):
        (made,) = output.parent.glob(pattern)
        state = load_file(made / "student.safetensors")
        for taught in (outcome.teachers[name].student, ready.panel[name]):
            assert all(torch.equal(state[key], value) for key, value in taught.state_dict().items())
    mine = ready.student.state_dict()
    inherited = [key for key in mine if "token_mixer" not in key]
    assert len(inherited) == 48 and all(torch.equal(mine[key], state[key]) for key in inherited)
    shutil.rmtree(again)


def test_teachers_without_autocast_are_in_bfloat16_and_what_is_kept_of_them_is_not(
    folder: Path, tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Teacher] = []
    monkeypatch.setattr(
        "kdlib.engine.Teacher", lambda *given, **named: made.append(Teacher(*given, **named)) or made[-1]
    )
    settings = ["precision=bf16", "teacher_autocast=false", "epochs=1", "baseline=null"]
    outcome = runs.run(whole(folder, tmp_path / "run", *settings))
    (teacher,) = made
    for name, pattern in (("wide", "gfnet*"), ("twin", "metaformer*")):
        (trained,) = tmp_path.glob(pattern)
        kept, taught = load_file(trained / "student.safetensors"), teacher.members[name].state_dict()
        assert {value.dtype for value in kept.values()} == {torch.float32}
        assert kept and all(torch.equal(taught[key], value.bfloat16()) for key, value in kept.items())
        assert {value.dtype for value in taught.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in outcome.student.parameters()} == {torch.float32}
    assert outcome.result["test_loss"] < 5


@pytest.mark.parametrize("settings", [[], ["precision=bf16", "teacher_autocast=false"]], ids=["plain", "in bfloat16"])
def test_a_given_teacher_of_other_images_is_measured_on_its_own(
    settings: list[str], folder: Path, tmp_path: Path, fresh_state: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net = timm.create_model("gfnet_h_nano", img_size=32, num_classes=3).eval()
    save_file(net.state_dict(), tmp_path / "big.safetensors")
    given = f"weights: '{tmp_path}/big.safetensors', mean: [0.2, 0.3, 0.4], std: [0.5, 0.6, 0.7]"
    teacher = f"teachers={{big: {{name: gfnet_h_nano, img_size: 32, size: 32, {given}}}}}"
    last = "{loss: feature_mse, student: stages.-1.blocks.-1, teacher: big.stages.-1.blocks.-1, adapter: linear}"
    terms = f"terms={{soft: {{loss: soft_target, teacher: big}}, block: {last}}}"
    outcome = runs.run(plain(folder, tmp_path / "run", teacher, terms, *settings, epochs=1))
    anew = "normalised anew: mean (0.2, 0.3, 0.4), std (0.5, 0.6, 0.7)"
    said = capsys.readouterr().out
    assert f"student: teacher big sees images {anew}, 28 → 32 px" in said
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in outcome.teachers["big"].student.modules()]
    assert len(hooks) > 9 and not any(hooks), "it is timed as it came"
    rows = {row.what: row for row in conclude(outcome)}

    images, labels = zip(*outcome.data.test.epoch(0), strict=True)
    bridge = Renormalize(outcome.data.mean, outcome.data.std, (0.2, 0.3, 0.4), (0.5, 0.6, 0.7), size=(32, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(settings)):
        right = net(bridge(torch.cat(images))).argmax(1) == torch.cat(labels)
    assert rows["teacher big"].top1 == pytest.approx(100 * right.float().mean().item())
    assert rows["teacher big"].images_per_second > 0
    assert ("teacher big is right on" in said) == (rows["teacher big"].top1 <= 100 / 3)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("classes", [12, 2, None], ids=["more", "fewer", "untrained"])
def test_a_given_teacher_of_other_classes_has_no_accuracy_anywhere(
    classes: int | None, folder: Path, tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are read and its answer is not: one over 12 or 2 classes, or by a head that nobody has trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # no download
    given = "pretrained: true"
    if classes is not None:
        given = f"num_classes: {classes}, weights: big.safetensors"
        save_file(timm.create_model("test_resnet", num_classes=classes).state_dict(), "big.safetensors")
    features = "{loss: similarity_preserving, student: stages.1, teacher: big.layer4}"
    recipe = plain(folder, tmp_path / "run", f"teachers={{big: {{name: test_resnet, {given}}}}}",
                   f"terms={{soft: null, label: {{loss: cross_entropy}}, features: {features}}}", epochs=1)  # fmt: skip
    (examined,) = doctor(recipe, batches=1, backend=None).teachers
    assert examined.top1 is None and not examined.by_chance
    outcome = runs.run(recipe)
    rows = {row.what: row for row in conclude(outcome)}
    assert math.isnan(rows["teacher big"].top1) and rows["student"].top1 == outcome.result["top1"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher_top1"] is None and summary["rows"][0]["top1"] is None
    assert summary["student_top1"] == summary["rows"][-1]["top1"] == outcome.result["top1"]
    assert next(iter(table([*rows.values()], "t").columns[2].cells)) == "–"
    view = look(open_run(tmp_path / "run", torch.device("cpu")), 0, True)
    row = view.row("teacher big")
    assert row.top1 is row.ece is None and "tell other classes apart" in row.note and row.parameters
    assert verdict(view.rows, view.images).endswith("test images."), "no word of the teacher"
    assert not view.agreement and view.notes["agreement"].startswith("No teacher's answers can be compared")
    assert [one["what"] for one in view.calibration] == ["student"] and not view.by_class[0].agree
    assert {one["teacher"] for one in view.alike} == {"teacher big"}, "its features are looked at all the same"


def test_throughput_runs_in_eval_mode_and_leaves_each_module_as_it_was() -> None:
    """A frozen norm, in eval mode within a model that trains, stays frozen."""
    seen: list[bool] = []
    tiny, other = Tiny().train(), Tiny().eval()
    tiny.norm.eval()
    tiny.head.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    modes = [[module.training for module in net.modules()] for net in (tiny, other)]
    speeds = throughput([tiny, other], torch.randn(2, 3, 8, 8), rounds=1)
    assert all(speed > 0 for speed in speeds) and seen == [False] * 2
    assert [[module.training for module in net.modules()] for net in (tiny, other)] == modes


def test_fused_and_unfused_are_compared_in_float32_throughout(folder: Path, tmp_path: Path, fresh_state: None) -> None:
    asked: list[str] = []

    class Told(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append(torch.get_float32_matmul_precision())
            return super().forward(images.flatten(1)[:, :4])

    student, fused = Told(4, 3), Told(4, 3)
    batches = SimpleNamespace(epoch=lambda _: [(torch.ones(2, 1, 2, 2), None)])
    seat = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: value)
    outcome: Any = SimpleNamespace(student=student, data=SimpleNamespace(test=batches), accelerator=seat)
    torch.set_float32_matmul_precision("high")
    assert riformer.largest_difference(outcome, fused) > 0
    assert asked == ["highest"] * 2 and torch.get_float32_matmul_precision() == "high"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 needs a GPU, and here is one")
def test_a_precision_that_a_cpu_does_not_have_is_refused(folder: Path, tmp_path: Path, fresh_state: None) -> None:
    found = lines(runs.run, plain(folder, tmp_path / "run", "precision=fp16"))
    assert found == ["precision: fp16 needs a GPU, and there is none; say bf16 or none"]


def test_a_teacher_that_insists_on_float32_is_told_before_anything_is_made(
    folder: Path, tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gfnet.GlobalFilter.forward
    monkeypatch.setattr(gfnet.GlobalFilter, "forward", lambda self, x: plain(self, x) @ torch.eye(x.shape[-1]))
    (line,) = lines(runs.run, whole(folder, tmp_path / "run", "precision=bf16", "teacher_autocast=false"))
    assert line.startswith("teacher_autocast: teachers.wide does not compute in bfloat16 throughout: expected")
    assert line.endswith("; say teacher_autocast: true") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=6", "already holds a run with another seed (5 there, 6 here); choose another output=… or delete it"),
        ("terms.soft.weight=0.5", "another terms (soft: weight: 1.0 there, soft: weight: 0.5 here)"),
        ("terms.soft.until=1", "another terms (soft: until: 1.0 there, soft: until: 1 here)"),
        ("baseline=null", "another baseline ("),
        ("teachers.wide.recipe.optimizer.lr=0.1", "another teachers (wide: recipe: optimizer: lr: 0.008 there"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(
    change: str, says: str, finished: tuple[Path, runs.Outcome], folder: Path
) -> None:
    output, _ = finished
    before = files(output.parent)
    (line,) = lines(runs.run, whole(folder, output, change))
    assert line.startswith(f"output: {output} ") and says in line
    assert files(output.parent) == before


# what was stopped goes on


def test_a_run_stopped_between_epochs_ends_bit_identical_to_one_that_was_not(
    folder: Path,
    tmp_path: Path,
    stop_after: Stop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = runs.run(plain(folder, tmp_path / "straight" / "r", epochs=3))
    stop_after(1)
    with pytest.raises(Killed):
        runs.run(plain(folder, tmp_path / "stopped" / "r", epochs=3))
    monkeypatch.undo()
    stop_after(1)
    with pytest.raises(Killed):
        runs.run(plain(folder, tmp_path / "stopped" / "r", epochs=3))
    monkeypatch.undo()
    torch.randn(7)  # whatever happened in this process in between
    resumed = runs.run(plain(folder, tmp_path / "stopped" / "r", epochs=3))
    assert "goes on after epoch 2 of 3" in capsys.readouterr().out
    one, other = (tmp_path / name / "r" / "student.safetensors" for name in ("straight", "stopped"))
    assert one.read_bytes() == other.read_bytes() and resumed.result == straight.result


def test_the_whole_objective_stopped_anywhere_ends_bit_identical(
    finished: tuple[Path, runs.Outcome],
    folder: Path,
    tmp_path: Path,
    stop_after: Stop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for within in ("gfnet", "metaformer", "riformer_nano-", "student"):
        stop_after(1, within)
        with pytest.raises(Killed):
            runs.run(whole(folder, tmp_path / "student"))
        monkeypatch.undo()
    runs.run(whole(folder, tmp_path / "student"))
    output, _ = finished
    compare(output.parent, tmp_path)
    # nor does it matter whether the children were trained in the same process
    shutil.rmtree(tmp_path / "student")
    runs.run(whole(folder, tmp_path / "student"))
    compare(output.parent, tmp_path)


def compare(some: Path, others: Path) -> None:
    """All runs of two folders, bit for bit."""
    for made in some.glob("*/student.safetensors"):
        assert (others / made.parent.name / made.name).read_bytes() == made.read_bytes(), made.parent.name


def test_a_damaged_checkpoint_costs_an_epoch_and_nothing_else(
    folder: Path,
    tmp_path: Path,
    stop_after: Stop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs.run(plain(folder, tmp_path / "straight" / "r"))
    stop_after(2)
    with pytest.raises(Killed):
        runs.run(plain(folder, tmp_path / "r" / "r"))
    monkeypatch.undo()
    newest = max((tmp_path / "r" / "r" / "checkpoints").iterdir()) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    runs.run(plain(folder, tmp_path / "r" / "r"))
    assert f"checkpoint {newest.parent.name} is damaged and was passed over" in capsys.readouterr().out
    one, other = (tmp_path / name / "r" / "student.safetensors" for name in ("straight", "r"))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_stopped_before_its_summary_is_finished_without_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runs.run(plain(folder, tmp_path / "r", epochs=1))
    (tmp_path / "r" / "summary.json").unlink()
    monkeypatch.setattr("kdlib.training.train.Training._epoch", lambda *_: pytest.fail("trained again"))
    assert runs.run(plain(folder, tmp_path / "r", epochs=1)).result == first.result


# a folder that is damaged or somebody else's


def test_a_damaged_folder_is_told_and_what_to_delete(folder: Path, tmp_path: Path) -> None:
    recipe = plain(folder, tmp_path / "r", epochs=1)
    runs.run(recipe)
    weights = tmp_path / "r" / "student.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    mend = f"; delete {tmp_path / 'r' / 'summary.json'} to finish the run again from its checkpoint"
    (line,) = lines(runs.run, recipe)
    assert "student.safetensors is corrupt" in line and line.endswith(mend)
    weights.unlink()
    (line,) = lines(runs.run, recipe)
    assert "no file" in line and line.endswith(mend)
    weights.write_bytes(good)
    for text in ("{", "[]", '{"result": {}, "seconds": 1}'):
        (tmp_path / "r" / "summary.json").write_text(text)
        for reader in (runs.run, dry_run, lambda _: open_run(tmp_path / "r", torch.device("cpu"))):
            assert "summary.json is damaged; delete it to finish the run again" in lines(reader, recipe)[0]
        assert _finished(recipe) is None, "for a study it is a run to make, which will say so"
    for text in ("{", "- 1", "a: 1\na: 1", "\0"):
        (tmp_path / "r" / "config.yaml").write_text(text)
        assert lines(runs.run, recipe)[0].startswith("output: ")


def test_a_folder_that_is_no_run_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    said = {name: lines(runs.run, plain(folder, tmp_path / name)) for name in ("full", "file", "file/below")}
    assert "is not empty and holds no run; choose another output=…" in said["full"][0]
    assert "is a file; name a folder" in said["file"][0]
    assert "is not a folder that you may write to" in said["file/below"][0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "full", "thesis.tex"]
    accelerator = runs.start(plain(folder, tmp_path / "empty"))
    assert runs.get_ready(plain(folder, tmp_path / "empty"), accelerator).title == "student"


# everything is checked, in every child, before anything is made


def broken_folder(kind: str, folder: Path, at: Path) -> Path:
    """A copy of the images with something wrong."""
    shutil.copytree(folder, at)
    if kind == "one class":
        for split in ("train", "val"):
            shutil.rmtree(at / split / "red")
            shutil.rmtree(at / split / "green")
    elif kind == "no val":
        shutil.rmtree(at / "val")
    elif kind == "other classes":
        (at / "val" / "red").rename(at / "val" / "rot")
    elif kind == "an empty class":
        shutil.rmtree(at / "train" / "red")
        (at / "train" / "red").mkdir()
    elif kind == "corrupt images":
        for path in (at / "train").rglob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
    return at


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("one class", "one class (blue), expected at least two"),
        ("no val", "val: missing (in "),
        ("other classes", "lacks red and has rot besides; both must have the same classes"),
        ("an empty class", "a class without images"),
        ("corrupt images", ".png: cannot be read (OSError: "),
    ],
)
def test_image_folders_that_are_wrong_are_told_and_nothing_is_made(
    kind: str, says: str, folder: Path, tmp_path: Path
) -> None:
    root = broken_folder(kind, folder, tmp_path / "images")
    (line,) = lines(runs.run, whole(root, tmp_path / "runs" / "r"))
    assert line.startswith("data: ") and str(root) in line and says in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["teachers.wide.num_classes=7"], "teachers.wide.num_classes: the student and the data have 3 classes (got 7)"),
        (["teachers.twin.num_classes=7"], "teachers.twin.num_classes: the student and the data have 3 classes (got 7)"),
        (["student.num_classes=7"], "student.num_classes: the data have 3 classes (got 7)"),
        (["student.num_classes=0"], "student.num_classes: the data have 3 classes (got "),
        (["student.name=vit_tiny_patch16_224"], "student: the model cannot take images of 3×28×28: "),
        (["student.in_chans=1"], "student: the model cannot take images of 3×28×28: "),
        (["student.weights=nowhere.pth"], "student.weights: no file nowhere.pth"),
        (["teachers.twin.weights=nowhere.pth"], "teachers.twin.weights: no file nowhere.pth"),
        (["teachers.wide={mean: [0.5], std: [1]}"], "teachers.wide.mean: mean and std need 3 numbers each"),
        (["teachers.wide={mean: [0, 0, 0], std: [0, 1, 1]}"], "teachers.wide.mean: mean and std need 3 numbers each"),
        (["teachers.wide.size=20"], "teachers.wide: the model cannot take images of 3×20×20: "),
        (["terms.block.student=stages.*.blok.-1"], "terms.block: pattern 'stages.*.blok.-1' finds nothing at 'blok'"),
        (["terms.block={student: stages.*.blocks.*, teacher: twin.stages.0.blocks.*}"], "terms.block: groups do not m"),
        (["terms.block.teacher=twin.stages.0.blocks.-1"], "terms.block: the teacher's group has 1 blocks"),
        (["terms.block.student=stages.0.blocks.-1", "terms.block.teacher=wide.stages.1.blocks.-1"], "terms.block: "),
        (["terms.block.layout=QQ"], "terms.block: student: no layout 'QQ'; known: NC, NLC"),
        (["terms.block.view=logits"], "terms.block: "),
        (["terms.soft.teacher=twin.nothing"], "terms: no tap 'nothing' in MetaFormer; did you mean "),
        (["accumulate=100"], "accumulate: an epoch has 4 batches (got 100); lower it"),
        (["data.batch_size=500"], "data: batch_size: 500 on 1 processes makes 500 images a step"),
        (["data.limit=100"], "data: limit: got 100, but 'folder' has 72 training images"),
        (["baseline.data.limit=7"], "baseline.data: batch_size: 16 on 1 processes makes 16 images a step, but"),
        (["teachers.wide.recipe.accumulate=9"], "teachers.wide.recipe.accumulate: an epoch has 4 batches (got 9)"),
        (["teachers.wide.recipe.student.weights=no.pth"], "teachers.wide.recipe.student.weights: no file no.pth"),
        (["baseline.terms.label.student=head.nothing"], "baseline.terms"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_is_made(
    arguments: list[str], line: str, folder: Path, tmp_path: Path
) -> None:
    recipe = whole(folder, tmp_path / "runs" / "r", *arguments)
    (found,) = lines(runs.run, recipe, convert=convert)
    assert found.startswith(line), found
    assert not (tmp_path / "runs").exists()


def test_a_layout_that_cannot_be_told_is_asked_for(folder: Path, tmp_path: Path) -> None:
    # 28 px through a stem of stride 4 gives 7 × 7 positions; with 7 channels all three sides are 7
    narrow = ["student.name=riformer_nano", "student.dims=[7, 96]", "student.init=null", "teachers.twin.dims=[7, 96]"]
    first = ["terms.block.student=stages.0.blocks.-1", "terms.block.teacher=twin.stages.0.blocks.-1"]
    recipe = whole(folder, tmp_path / "runs" / "r", *narrow, *first, "terms.mixer=null", "terms.relation=null")
    (found,) = lines(runs.run, recipe)
    assert found.startswith("terms.block: ") and "layout" in found
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_model_are_refused_and_right_ones_teach(
    finished: tuple[Path, runs.Outcome], folder: Path, tmp_path: Path
) -> None:
    output, outcome = finished
    (twin,) = output.parent.glob("metaformer*/student.safetensors")
    common = ["baseline=null", "epochs=1", "teachers.twin.recipe=null", f"teachers.twin.weights={twin}"]
    wrong = whole(folder, tmp_path / "runs" / "r", *common, f"teachers.wide.weights={twin}")
    (line,) = lines(runs.run, wrong)
    assert line.startswith(f"teachers.wide.weights: {twin} holds another model: ")
    state = load_file(twin)
    state["head.weight"] = state["head.weight"][:2]
    save_file(state, tmp_path / "cut.safetensors")
    (line,) = lines(
        runs.run, whole(folder, tmp_path / "runs" / "r", f"teachers.twin.weights={tmp_path}/cut.safetensors")
    )
    assert "head.weight is (2, 96), the model's is (3, 96); choose the model that it was saved from" in line
    assert not (tmp_path / "runs").exists()

    (wide,) = output.parent.glob("gfnet*/student.safetensors")
    right = runs.run(whole(folder, tmp_path / "runs" / "r", *common, f"teachers.wide.weights={wide}"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]
    assert right.teachers["wide"].result["top1"] == outcome.teachers["wide"].result["top1"]


def test_several_processes_that_do_not_know_of_each_other_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("kdlib.training.place.Accelerator", lambda **_: type("Alone", (), {"num_processes": 1})())
    assert lines(runs.start, plain(folder, tmp_path / "r"))[0].startswith("launch: 2 processes were started, but each")


@pytest.mark.parametrize("tf32", [True, False])
def test_products_are_in_tf32_where_the_recipe_says_so(
    tf32: bool, monkeypatch: pytest.MonkeyPatch, fresh_state: None
) -> None:
    """Both begin with the opposite value, so that what is left as it was shows."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    torch.set_float32_matmul_precision("highest" if tf32 else "high")
    try:
        runs.start(load(read([PLAIN, f"tf32={str(tf32).lower()}", f"threads={threads}", "student.name=riformer_nano"])))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")  # linears, attention, losses
        assert torch.backends.cudnn.allow_tf32 == tf32  # convolutions
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("student", "device", "fsdp", "expected"),
    [
        ("riformer_nano", "cuda", False, True),
        ("riformer_nano", "cpu", False, False),
        ("riformer_nano", "cuda", True, False),
        ("vit_tiny_patch16_224", "cuda", False, False),
    ],
)
def test_convolutions_get_their_layout_on_a_gpu(student: str, device: str, fsdp: bool, expected: bool) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device(device), is_fsdp2=fsdp)
    net = timm.create_model(student)
    assert channels_last("auto", net, accelerator) == expected
    assert all(channels_last(asked, net, accelerator) == asked for asked in (True, False))
