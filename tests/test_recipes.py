"""The other recipes: each config as shipped fits its data, and trains a few steps from end to end."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from kdlib import Distiller, conclude, launch, runs
from kdlib.config import read
from kdlib.recipe import load
from tests.conftest import ROOT
from tests.test_runs import make_images

CONFIGS = sorted(path for name in ("resnet", "deit", "hetero") for path in (ROOT / "recipes" / name).glob("configs/*"))
IDS = [f"{path.parts[-3]}/{path.stem}" for path in CONFIGS]
TERMS = {
    "resnet/default": {"label", "soft"},
    "resnet/dkd": {"label", "soft"},
    "resnet/dist": {"label", "soft"},
    "resnet/review_kd": {"label", "review"},
    "deit/default": {"label", "hard"},
    "hetero/default": {"label", "soft", "token"},
    "hetero/swin_to_riformer": {"label", "soft", "block"},
}


def ready(config: Path, tmp_path: Path) -> runs.Ready:
    """Everything built and checked as shipped, over the embedded images; nothing is written."""
    importlib.import_module(f"recipes.{config.parts[-3]}.run")  # registers what the recipe needs
    recipe = load(read([str(config), f"output={tmp_path / 'run'}", "threads=1"]))
    return runs.get_ready(recipe, runs.start(recipe))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that configs share teachers and baselines."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_config_trains_from_teacher_to_table(
    config: Path, images: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{config.parts[-3]}/{config.stem}"
    importlib.import_module(f"recipes.{config.parts[-3]}.run")
    data = f"data={{name: folder, root: '{images}', image_size: 28, workers: 0, batch_size: 16}}"
    teacher = next(iter(load(read([str(config)])).teachers))
    epochs = 2 if config.stem == "review_kd" else 1  # that term begins with weight 0
    quick = [f"epochs={epochs}", "schedule.warmup_epochs=0", "threads=1", f"teachers.{teacher}.recipe.epochs=1"]
    quick += [f"{child}.schedule.warmup_epochs=0" for child in (f"teachers.{teacher}.recipe", "baseline")]
    run = output / name.replace("/", "-")
    assert launch.main(conclude.make, config, [str(config), data, *quick, f"output={run}"]) == 0, capsys.readouterr()
    assert {row["what"] for row in json.loads((run / "summary.json").read_text())["rows"]} == {
        f"teacher {teacher}",
        "baseline",
        "student",
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]["terms"]) == TERMS[name] and all(value == value for value in lines[-1]["terms"].values())
    assert (run / "curves.png").stat().st_size > 1000


def test_every_config_is_named_here() -> None:
    assert set(IDS) == set(TERMS)


def test_configs_of_one_recipe_share_their_teacher_and_their_baseline(tmp_path: Path) -> None:
    shared = {
        (made.teachers["big"].recipe.output, made.baseline.recipe.output)
        for made in (ready(path, tmp_path) for path in CONFIGS if path.parts[-3] == "resnet")
    }
    assert len(shared) == 1


def test_each_head_of_deit_has_its_own_task_and_the_answer_is_their_mean(tmp_path: Path) -> None:
    made = ready(next(path for path in CONFIGS if path.parts[-3] == "deit"), tmp_path)
    student, batch = made.student, next(made.data.train.epoch(0))
    distiller = Distiller(student, made.plan.terms)
    targets = {"@labels": batch[1], "cnn": torch.randn(len(batch[1]), 10)}
    touched = {}
    for name in ("label", "hard"):
        distiller.set_weights({"label": 0.0, "hard": 0.0} | {name: 1.0})
        student.zero_grad()
        distiller(batch[0], targets).loss.backward()
        gradients = {head: student.get_submodule(head).weight.grad for head in ("head", "head_dist")}
        touched[name] = {head for head, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert touched == {"label": {"head"}, "hard": {"head_dist"}}
    seen = {}
    for head in ("head", "head_dist"):
        student.get_submodule(head).register_forward_hook(lambda m, i, o, head=head: seen.__setitem__(head, o))
    for mode in (True, False):
        answer = student.train(mode)(batch[0])
        torch.testing.assert_close(answer, (seen["head"] + seen["head_dist"]) / 2)


def test_maps_of_swin_and_tokens_of_vit_are_told_apart_and_adapted(tmp_path: Path) -> None:
    vit, swin = (ready(path, tmp_path) for path in CONFIGS if path.parts[-3] == "hetero")
    (token,) = (row for row in vit.plan.rows if row.term == "token")
    assert token.layouts == ("NCHW", "NLC+1") and token.shapes == ((2, 4, 64), (2, 16, 96)) and token.parameters
    blocks = [row for row in swin.plan.rows if row.term == "block"]
    assert [row.layouts for row in blocks] == [("NCHW", "NHWC")] * 2
    assert [row.shapes for row in blocks] == [((2, 49, 48), (2, 49, 64)), ((2, 16, 96), (2, 16, 128))]
    assert all(row.adapter == "Project" for row in blocks)
