"""A loss that remembers each training image: the loop tells it which images a batch holds, a checkpoint keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recipes.riformer.gfnet
import recipes.riformer.model  # noqa: F401  registers the models
from kdlib import data, runs
from kdlib.config import ConfigError, read
from kdlib.data import Data, with_targets
from kdlib.recipe import Recipe, load
from kdlib.training import checkpoint
from tests.conftest import ROOT
from tests.test_data import write_images

DEFAULT = str(ROOT / "recipes" / "riformer" / "configs" / "default.yaml")
STILL = data.Augment(flip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.2, 1.2))  # all of each image, which is 24 × 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def opened(kind: str, folder: Path, **given: Any) -> Data:
    if kind == "memory":
        return data.load(limit=24, batch_size=4, augment=data.Augment(flip=0.0), **given)
    where: dict[str, Any] = {"root": folder, "image_size": 20, "workers": 0}
    return data.load("folder", limit=24, batch_size=4, augment=STILL, **where, **given)


def batches(found: Data, epoch: int, start: int = 0) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return list(with_targets(found.train, ["@labels", "@indices"], epoch, start))


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_an_index_is_the_same_image_in_every_epoch_on_every_rank_and_after_a_new_start(kind: str, folder: Path) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        found = opened(kind, folder, rank=rank, world_size=world)
        for epoch, start in ((0, 0), (1, 0), (1, 2)):
            for images, targets in batches(found, epoch, start):
                assert targets["@indices"].dtype == torch.int64 and targets["@indices"].shape == (4,)
                for index, image, label in zip(targets["@indices"].tolist(), images, targets["@labels"], strict=True):
                    first, name = seen.setdefault(index, (image, label))
                    assert torch.equal(first, image) and torch.equal(name, label), index
    assert sorted(seen) == list(range(24))


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_the_middle_of_an_epoch_is_that_of_the_whole_one(kind: str, folder: Path) -> None:
    found = opened(kind, folder)
    whole, rest = batches(found, 3), batches(found, 3, 2)
    assert [t["@indices"].tolist() for _, t in whole[2:]] == [t["@indices"].tolist() for _, t in rest]


def test_ranks_share_an_epoch(folder: Path) -> None:
    numbers = [
        t["@indices"] for rank in range(2) for _, t in batches(opened("memory", folder, rank=rank, world_size=2), 5)
    ]
    assert sorted(torch.cat(numbers).tolist()) == list(range(24))


def test_nobody_asks_nothing_is_sent(folder: Path) -> None:
    found = opened("memory", folder)
    for (images, targets), (same, labels) in zip(
        with_targets(found.train, ["@labels"]), found.train.epoch(), strict=True
    ):
        assert targets.keys() == {"@labels"}
        assert torch.equal(images, same) and torch.equal(targets["@labels"], labels)


# in a recipe


def remembering(root: Path, output: Path, *more: str, epochs: int = 3) -> Recipe:
    """A student and its teacher, on 24 images; the memory's size is nowhere said."""
    crd = "crd: {loss: {name: crd, dim: 4, negatives: 10}, teacher: twin, weight: 0.1}"
    terms = f"terms={{{crd}, label: {{loss: cross_entropy}}}}"
    children = ["baseline=null", "teachers={wide: null}", "teachers.twin.recipe.epochs=1"]
    drop = [f"terms.{name}=null" for name in ("soft", "block", "mixer", "relation")]
    of = f"data={{name: folder, root: '{root}', image_size: 28, limit: 24, batch_size: 8, workers: 0}}"
    settings = [of, f"epochs={epochs}", "threads=1", f"output={output}"]
    warm = ["schedule.warmup_epochs=0", "teachers.twin.recipe.schedule.warmup_epochs=0"]
    return load(read([DEFAULT, *drop, terms, *children, *settings, *warm, *more]))


def memory(folder: Path) -> dict[str, Tensor]:
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None
    return {name: x for name, x in found[1]["distiller"].items() if name.startswith("losses.crd.")}


def test_a_recipe_sizes_the_memory_and_stopped_it_ends_bit_identical(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = runs.run(remembering(folder, tmp_path / "a" / "r"))
    kept = memory(tmp_path / "a" / "r")
    assert {name: tuple(x.shape) for name, x in kept.items() if "memory" in name} == {
        "losses.crd.memory_student": (24, 4),
        "losses.crd.memory_teacher": (24, 4),
    }
    assert (kept["losses.crd.z"] > 0).all()
    save = checkpoint.save

    def once(place: Path, *arguments: Any, **named: Any) -> Path:
        made = save(place, *arguments, **named)
        if place.parent.name == "r":
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(checkpoint, "save", once)
    with pytest.raises(KeyboardInterrupt):
        runs.run(remembering(folder, tmp_path / "b" / "r"))
    monkeypatch.undo()
    torch.randn(3)
    middle = memory(tmp_path / "b" / "r")
    resumed = runs.run(remembering(folder, tmp_path / "b" / "r"))
    again = memory(tmp_path / "b" / "r")
    assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    assert not torch.equal(middle["losses.crd.memory_student"], kept["losses.crd.memory_student"]), "it moves"
    assert resumed.result == straight.result


def test_a_memory_of_another_size_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        runs.run(remembering(folder, tmp_path / "r", "terms.crd.loss.samples=9"))
    assert caught.value.lines == ["terms.crd.loss.samples: the data train on 24 images (got 9); leave it out"]
    assert not list(tmp_path.iterdir())
