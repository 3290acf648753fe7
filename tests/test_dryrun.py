"""A dry run: needs neither data nor weights, writes nothing, and what it tells is what the run then does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdlib import data, launch, runs
from kdlib.config import ConfigError, read
from kdlib.dryrun import _loss, dry_run
from kdlib.losses import SoftTarget, Standardized
from kdlib.recipe import load
from recipes.riformer.convert import convert
from recipes.riformer.gfnet import GFNetH
from tests.conftest import ROOT
from tests.test_runs import over

DEFAULT = ROOT / "recipes" / "riformer" / "configs" / "default.yaml"


def plan(*arguments: str) -> str:
    return dry_run(load(read([str(DEFAULT), *arguments])), convert)


def test_what_is_told_is_what_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = [
        "data.limit=256",
        "data.batch_size=64",
        "epochs=4",
        "schedule.warmup_epochs=1",
        "eval_every=4",
        "threads=1",
    ]
    short += [f"teachers.{name}.recipe.epochs=2" for name in ("wide", "twin")]
    told = plan(*short)
    assert not list(tmp_path.iterdir())
    outcome = runs.run(load(read([str(DEFAULT), *short])))
    folders = re.findall(r"^[\w ]+ → (\S+) \(to be trained\)$", told, re.M)
    assert sorted(folders) == sorted(f"runs/{folder.name}" for folder in (tmp_path / "runs").iterdir())
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    student = told.split("student → ")[1]
    assert "4 epochs × 4 steps of 64 images" in student and [line["step"] for line in lines] == [4, 8, 12, 16]
    for name in ("soft", "block", "mixer", "relation"):
        on = [line["epoch"] for line in lines if line["weights"][name] > 0]
        window = re.search(rf"{name}: .*?, (?:all (\d+) epochs|epochs (\d+) to (\d+))", student)
        assert window and [int(x) for x in window.groups() if x] == ([4] if name == "soft" else [on[0], on[-1]]), name
    rates = dict(reversed(pair.split(" at ")) for pair in re.search(r"rate +(.*) epochs", student)[1].split(", "))
    assert float(rates["1"]) == pytest.approx(lines[0]["lr"], rel=1e-2)
    assert float(rates["4"]) == pytest.approx(lines[-1]["lr"], rel=1e-2)
    assert f"{sum(p.numel() for p in outcome.student.parameters()):,} parameters" in student
    assert plan(*short).count("(finished, would be read)") == 4


@pytest.mark.parametrize(
    "config", sorted((ROOT / "recipes" / "resnet" / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_term_takes_one_line_whatever_its_loss_holds(config: Path) -> None:
    told = dry_run(load(read([str(config)]))).split("student → ")[1].splitlines()
    places = [i for i, line in enumerate(told) if line.startswith("  term       ")]
    assert len(places) == 2 and places[1] == places[0] + 1 and told[places[1] + 1].startswith("  term  "), told
    assert ("trained parameters, epochs 2 to 8" in told[places[1]]) == (config.stem == "review_kd")


def test_a_loss_that_holds_another_takes_one_line() -> None:
    assert _loss(Standardized(SoftTarget(2.0))).count("\n") == 0 and "SoftTarget" in _loss(
        Standardized(SoftTarget(2.0))
    )


def test_weights_are_named_where_they_are_missing_and_checked_where_they_are_there(tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    told = plan(f"teachers.wide.weights={there}", f"student.weights={there}")
    assert told.count(f"weights from {there}, which is MISSING") == 2 and "gfnet_h_nano-" not in told
    save_file(GFNetH((2, 2), (48, 96), 28, 10, in_chans=1).state_dict(), there)
    told = plan(f"teachers.wide.weights={there}")
    assert f"weights from {there}\n" in told and "MISSING" not in told
    save_file({"x": torch.zeros(1)}, there)
    with pytest.raises(ConfigError, match=r"teachers\.wide\.weights: .*there\.safetensors: unknown checkpoint"):
        plan(f"teachers.wide.weights={there}")


def test_pretrained_weights_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _builder

    monkeypatch.setattr(_builder, "load_pretrained", lambda *_, **__: pytest.fail("downloads"))
    arguments = ["teachers.wide={name: resnet18.a1_in1k, pretrained: true}", "data={name: folder, image_size: 32}"]
    told = plan(*arguments, "terms.soft={teacher: wide}", "teachers.twin=null", *NO_IMITATION)
    assert "wide: resnet18.a1_in1k (pretrained True), 11,689,512 parameters, timm's weights" in told
    assert "give data.root=…; ImageNet's numbers stand for it" in told and "10,009 steps" in told


NO_IMITATION = [
    "student.init=null",
    "baseline=null",
    *(f"terms.{name}=null" for name in ("block", "mixer", "relation")),
]


def test_a_folder_that_is_there_is_looked_into(tmp_path: Path) -> None:
    from tests.test_runs import make_images

    root = make_images(tmp_path / "images")
    told = plan(*over(root), "schedule.warmup_epochs=0")
    assert "folder, images 3×28×28, 3 classes\n" in told and "2 epochs × 4 steps of 16 images" in told


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("terms.mixer.student=stages.*.mixer", "terms.mixer: pattern 'stages.*.mixer' finds nothing"),
        ("student.num_clases=3", "student.num_clases: riformer_nano takes no such argument"),
        ("teachers.wide.num_classes=7", "teachers.wide.num_classes: the student and the data have 10 classes (got 7)"),
        ("data.batch_size=6000", "data: batch_size: 6000 on 1 processes makes 6000"),
        ("terms.block.teacher=wide.stages.*.blocks.-1", "terms.block: "),
        ("accumulate=99", "accumulate: an epoch has 39 batches (got 99)"),
    ],
)
def test_a_wrong_config_is_one_line_and_code_2(
    argument: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch.main(lambda _: pytest.fail("runs"), DEFAULT, ["--dry-run", argument]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not list(tmp_path.iterdir()), err


def test_an_outline_has_the_sizes_of_the_set() -> None:
    real, sketched = (data.load("fashion-mnist-5k", device=device, batch_size=64) for device in ("cpu", "meta"))
    for split in ("train", "test"):
        one, other = getattr(real, split), getattr(sketched, split)
        assert (len(one), one.samples) == (len(other), other.samples)
    assert [getattr(real, k) for k in ("classes", "mean", "std", "channels", "image_size")] == [
        getattr(sketched, k) for k in ("classes", "mean", "std", "channels", "image_size")
    ]
    with pytest.raises(ValueError, match="root: got"):
        data.load("fashion-mnist-5k", root="/nowhere", device="meta")


def test_the_folder_of_a_run_is_named_after_its_configs(tmp_path: Path) -> None:
    (tmp_path / "scale.yaml").write_text(
        f"base: {DEFAULT.parent / 'parts' / 'plain.yaml'}\nstudent: {{name: riformer_nano}}"
    )
    (tmp_path / "row.yaml").write_text("epochs: 2")
    files, seen = [str(tmp_path / "scale.yaml"), str(tmp_path / "row.yaml")], []
    assert launch.main(seen.append, DEFAULT, files) == launch.main(seen.append, DEFAULT, [*files, "output=x"]) == 0
    assert launch.main(seen.append, DEFAULT, []) == 0
    assert [str(recipe.output) for recipe in seen] == ["runs/scale-row", "x", "runs/riformer"]
