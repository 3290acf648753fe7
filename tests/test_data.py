"""Data sets: what they hold, that batches are exact, what augmentation does, and what bad input is told."""

import gzip
import hashlib
import importlib.resources
import multiprocessing
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import kdlib.data.fashion
from kdlib.data import Data, load
from kdlib.data.augment import Augment, crop_flip, crop_flip_draws
from kdlib.data.fashion import DEBIAN, Arrays, embedded, read_idx
from kdlib.data.few import few_images
from kdlib.data.from_memory import ArrayLoader
from kdlib.data.loader import Normalise
from kdlib.data.samplers import EpochBatches
from kdlib.data.sources import TimmFiles, image_folder
from kdlib.data.workers import arrived, by_workers

CLASSES = ("10", "2", "b é")  # lexicographic; a natural order would begin with 2
TRAIN, VAL = 9, 5  # images of each class
RICH = Augment(rand_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5, mixup=0.8, cutmix=1.0)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def write_images(root: Path, classes: tuple[str, ...] = CLASSES, train: int = TRAIN, val: int = VAL) -> Path:
    numbers = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = numbers.integers(0, 256, (20, 24, 3), np.uint8)
                pixels[..., 0] = 80 * label
                Image.fromarray(pixels).save(root / split / name / f"{image}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def write_idx(root: Path, *, packed: bool = True, count: int = 40) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(1)
    for split, n in (("train", count), ("t10k", count // 2)):
        images = numbers.integers(0, 256, (n, 28, 28), np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for name, values in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = b"".join(part.to_bytes(4, "big") for part in (0x800 + values.ndim, *values.shape))
            content = header + values.tobytes()
            if packed:
                (root / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (root / name).write_bytes(content)
    return root


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def small(folder: Path, **more: Any) -> Data:
    return load("folder", root=folder, **{"image_size": 16, "batch_size": 4, "eval_batch_size": 4, "workers": 0} | more)


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


# ---------------------------------------------------------------------------------------------- what the sets hold


def test_embedded_set() -> None:
    data = load()
    assert (data.name, data.channels, data.image_size, len(data.classes)) == ("fashion-mnist-5k", 1, 28, 10)
    assert data.classes[0] == "T-shirt/top" and data.classes[9] == "Ankle boot"
    assert (len(data.train), data.train.samples, len(data.test), data.test.samples) == (39, 4992, 8, 4000)
    images, labels = next(data.train.epoch(0))
    assert images.shape == (128, 1, 28, 28) and images.dtype == torch.float32 and images.is_contiguous()
    assert labels.shape == (128,) and labels.dtype == torch.int64
    every = torch.cat([images for images, _ in data.test.epoch()])
    assert abs(float(every.mean())) < 0.02 and abs(float(every.std()) - 1) < 0.02
    train, test = embedded()
    assert torch.equal(torch.cat([labels for _, labels in data.test.epoch()]), test.labels)
    assert train.labels.bincount().min() > 400
    known = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in known for image in test.images)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_embedded_set_is_the_start_of_the_whole() -> None:
    whole, part = read_idx(DEBIAN), embedded()
    for every, first, size in zip(whole, part, (60_000, 10_000), strict=True):
        assert len(every) == size
        assert torch.equal(every.images[: len(first)], first.images)
        assert torch.equal(every.labels[: len(first)], first.labels)
    pixels = whole[0].images.double() / 255
    data = load("fashion-mnist", limit=5000)
    assert data.mean == pytest.approx([float(pixels.mean())], abs=1e-5)
    assert data.std == pytest.approx([float(pixels.std())], abs=1e-5)
    assert same(list(data.train.epoch(3)), list(load("fashion-mnist-5k").train.epoch(3)))
    assert (data.train.samples, data.test.samples) == (4992, 10_000)


def test_pixels_undo_the_normalisation() -> None:
    data, arrays = load(), embedded()[1]
    images = next(data.test.epoch(0))[0]
    torch.testing.assert_close(data.pixels(images), arrays.images[: len(images)].float() / 255)


def test_a_few_images_are_read_as_those_of_a_data_set_are(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), (255, 0, 51)).save(tmp_path / "a.ppm")
    found = few_images(tmp_path, 1, 4)
    torch.testing.assert_close(found[0, :, 2, 2], torch.tensor([1.0, 0.0, 0.2]))
    Image.new("I;16", (9, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: cannot be read as an image \(.*16 bits or more"):
        few_images(tmp_path, 2, 4)


def test_licence_is_beside_the_embedded_data() -> None:
    assets = importlib.resources.files("kdlib.data") / "assets"
    text = (assets / "FASHION_MNIST_LICENSE").read_text(encoding="utf-8")
    assert "2017 Zalando SE" in text and "WITHOUT WARRANTY OF ANY KIND" in text
    content = (assets / kdlib.data.fashion.EMBEDDED).read_bytes()
    assert len(content) < 4_100_000
    assert hashlib.sha256(content).hexdigest() == kdlib.data.fashion.EMBEDDED_SHA256


@pytest.mark.fault("install")
def test_embedded_set_needs_neither_timm_nor_torchvision() -> None:
    code = (
        "import sys, kdlib.data as d; next(d.load().train.epoch(0)); print({'timm','torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("packed", [True, False])
def test_idx_folder(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, packed=packed)
    data = load("fashion-mnist", root=tmp_path, batch_size=8)
    assert (data.train.samples, data.test.samples) == (40, 20)
    assert torch.cat([labels for _, labels in data.test.epoch()]).tolist() == [*range(10), *range(10)]


def test_folder_classes_are_in_torchvisions_order(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    data, expected = small(folder), ImageFolder(str(folder / "val"))
    assert data.classes == tuple(expected.classes) == CLASSES
    labels = torch.cat([labels for _, labels in data.test.epoch()])
    assert labels.tolist() == expected.targets
    assert image_folder(folder)[1].where(7) == expected.samples[7][0]
    # red was painted by class
    red = torch.cat([images[:, 0].mean((1, 2)) for images, _ in data.test.epoch()]) * data.std[0] + data.mean[0]
    assert torch.allclose(red * 255, labels * 80.0, atol=1)


def test_folder_evaluation_is_timms(folder: Path) -> None:
    from timm.data import create_transform

    data = small(folder, eval_batch_size=15, crop_pct=0.8, interpolation="bilinear")
    transform = create_transform(16, crop_pct=0.8, interpolation="bilinear")
    source = image_folder(folder)[1]
    expected = torch.stack([transform(source.read(index)[0]) for index in range(len(source))])
    images, _ = next(data.test.epoch())
    assert torch.allclose(images, expected, atol=1e-5)


@pytest.mark.fault("data")
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    write_images(tmp_path, ("a", "b"), 2, 1)
    file = tmp_path / "val" / "a" / ("0.tif" if mode == "CMYK" else "0.png")
    (tmp_path / "val" / "a" / "0.png").unlink()
    Image.new("RGB", (20, 20), (200, 200, 200)).convert(mode).save(file)
    images, _ = next(small(tmp_path).test.epoch())
    assert images.shape == (2, 3, 16, 16)


def test_hidden_and_foreign_files_are_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path, ("a", "b"), 4, 1)
    for split in ("train", "val"):
        (tmp_path / split / ".thumbnails").mkdir()
        (tmp_path / split / "a" / "notes.txt").write_text("x")
        (tmp_path / split / "a" / "._0.png").write_text("x")
    nested = tmp_path / "train" / "a" / "more" / "deep.PNG"
    nested.parent.mkdir()
    (tmp_path / "train" / "a" / "0.png").rename(nested)
    data = small(tmp_path)
    assert data.classes == ("a", "b") and data.train.samples == 8 and len(list(data.train.epoch(0))) == 2


def test_torchvision_arrays_through_timm(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw", packed=False)
    data = load("torch/fashion_mnist", root=tmp_path, batch_size=8)
    train, _ = read_idx(tmp_path / "FashionMNIST" / "raw")
    pixels = train.images.double() / 255
    assert isinstance(data.train, ArrayLoader)
    assert data.classes == kdlib.data.fashion.FASHION
    assert (data.train.samples, data.test.samples, data.channels, data.image_size) == (40, 20, 1, 28)
    assert data.mean + data.std == pytest.approx([float(pixels.mean()), float(pixels.std(correction=0))], abs=1e-9)


def test_colour_arrays_through_timm(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()

    def part(name: str, n: int) -> np.ndarray:
        pixels = numbers.integers(0, 256, (n, 3072), np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(n)]}))
        return pixels

    train = np.concatenate([part(f"data_batch_{i}", 12) for i in range(1, 6)])
    test = part("test_batch", 20).reshape(-1, 3, 32, 32)
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    from torchvision.datasets import CIFAR10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        data = load("torch/cifar10", root=tmp_path, batch_size=8, augment=Augment(crop_padding=4))
    assert (data.channels, data.image_size, data.train.samples, data.test.samples) == (3, 32, 56, 20)
    assert data.mean == pytest.approx((train.reshape(60, 3, -1) / 255).mean((0, 2)).tolist())
    images, _ = next(data.test.epoch())
    expected = (test / 255 - np.array(data.mean)[:, None, None]) / np.array(data.std)[:, None, None]
    assert np.allclose(images.numpy(), expected, atol=1e-4)
    images, _ = next(data.train.epoch(0))
    assert images.shape == (8, 3, 32, 32) and images.is_contiguous()


def test_limit_of_files_is_spread_over_classes(folder: Path) -> None:
    labels = torch.cat([labels for _, labels in small(folder, limit=12, batch_size=3).train.epoch(0)])
    assert labels.bincount().tolist() == [4, 4, 4]


def test_image_size_resizes_on_the_device() -> None:
    native, large = load(eval_batch_size=4), load(eval_batch_size=4, image_size=56)
    (a, _), (b, _) = next(native.test.epoch()), next(large.test.epoch())
    assert large.image_size == 56 and b.shape == (4, 1, 56, 56)
    assert torch.allclose(b, torch.nn.functional.interpolate(a, (56, 56), mode="bilinear"), atol=1e-5)


# ---------------------------------------------------------------------------------------------- exactness


def global_states() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), numpy[2:], torch.get_rng_state().numpy().tobytes()


ARRAY_KINDS = [Augment(crop_padding=2), RICH]


@pytest.mark.parametrize("augment", ARRAY_KINDS, ids=["crop", "rich"])
def test_array_batches_depend_on_the_key_only(augment: Augment) -> None:
    def fresh(**more: Any) -> Data:
        return load(limit=160, batch_size=32, augment=augment, **more)

    data, before = fresh(), global_states()
    whole = list(data.train.epoch(2))
    assert global_states() == before
    assert len(whole) == 5
    torch.rand(3), random.random()
    for start in range(6):
        assert same(list(data.train.epoch(2, start)), whole[start:])
    assert same(list(fresh(workers=0).train.epoch(2)), whole)
    assert not same(list(data.train.epoch(3)), whole)
    assert not same(list(fresh(seed=1).train.epoch(2)), whole)


class Asked:
    """Stands for a tensor on the host; notes what it is asked for on its way to a device."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def pin_memory(self) -> "Asked":
        self.asked.append("pinned")
        return self

    def to(self, device: torch.device, **how: Any) -> "Asked":
        self.asked.append((device.type, how))
        return self


def test_what_goes_to_a_gpu_goes_from_pinned_memory_and_nobody_waits_for_it() -> None:
    for kind in ("cuda", "cpu"):
        device, sent = torch.device(kind), (kind, {"non_blocking": True})
        assert by_workers(device, 0, seed=0)([0, 1]).pin_memory == (kind == "cuda"), "workers' batches"
        batch: Any = [Asked(), Asked()]
        found = arrived(batch, 0, 0, device=device, normalise=lambda images: images, finish=None)  # type: ignore[arg-type]
        assert found == tuple(batch) and all(part.asked == [sent] for part in batch)
        order: Any = Asked()
        ArrayLoader._send(order, device)
        assert order.asked == (["pinned", sent] if kind == "cuda" else [sent]), "indices and draws of a set in memory"


@pytest.mark.parametrize("workers", [0, 2])
def test_file_batches_depend_on_the_key_only(folder: Path, workers: int) -> None:
    whole = list(small(folder, augment=RICH).train.epoch(1))
    assert len(whole) == 6
    data, before = small(folder, augment=RICH, workers=workers), global_states()
    assert same(list(data.train.epoch(1)), whole)
    assert global_states() == before
    for start in (1, 5, 6):
        assert same(list(data.train.epoch(1, start)), whole[start:])
    # an epoch that is given up halfway leaves nothing behind
    next(data.train.epoch(0))
    assert same(list(data.train.epoch(1)), whole)
    assert not same(list(data.train.epoch(2)), whole)
    assert not same(list(small(folder, augment=RICH, seed=1).train.epoch(1)), whole)
    assert global_states() == before
    evaluated = list(data.test.epoch())
    assert same(evaluated, list(small(folder).test.epoch()))
    assert global_states() == before


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_an_image_is_augmented_anew_in_each_epoch(folder: Path, kind: str) -> None:
    augment = Augment(flip=0.5, rand_augment="rand-m9-n3-p1.0")
    data = (
        load(limit=27, batch_size=27, augment=augment)
        if kind == "arrays"
        else small(folder, augment=augment, batch_size=27)
    )
    epochs = []
    for epoch in range(2):
        order = EpochBatches(27, 27, train=True).rows(epoch)[0]
        epochs.append(next(data.train.epoch(epoch))[0][order.argsort()])
    assert all(not torch.equal(a, b) for a, b in zip(*epochs, strict=True))


def test_global_state_is_untouched_while_a_batch_is_held(folder: Path) -> None:
    for data in (load(augment=RICH), small(folder, augment=RICH)):
        before = global_states()
        for _ in data.train.epoch(0):
            assert global_states() == before
            break


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_two_ranks_see_the_batches_of_one(folder: Path, kind: str) -> None:
    def ranks(world: int, batch_size: int) -> list[Data]:
        more: dict[str, Any] = {"batch_size": batch_size, "world_size": world}
        if kind == "files":
            return [small(folder, rank=rank, **more) for rank in range(world)]
        return [load(limit=100, augment=Augment(crop_padding=2), rank=rank, **more) for rank in range(world)]

    (alone,), pair = ranks(1, 8), ranks(2, 4)
    assert [len(data.train) for data in pair] == [len(alone.train)] * 2
    together = [
        (torch.cat([a, c]), torch.cat([b, d]))
        for (a, b), (c, d) in zip(*(data.train.epoch(4) for data in pair), strict=True)
    ]
    assert same(together, list(alone.train.epoch(4)))


@pytest.mark.fault("metrics")
@pytest.mark.parametrize("workers", [0, 2])
def test_three_ranks_evaluate_each_image_once(folder: Path, workers: int) -> None:
    whole = torch.cat([images for images, _ in small(folder).test.epoch()])
    parts = [
        small(folder, rank=rank, world_size=3, workers=workers, batch_size=2, eval_batch_size=4) for rank in range(3)
    ]
    images = torch.cat([images for part in parts for images, _ in part.test.epoch()])
    assert [part.test.samples for part in parts] == [5, 5, 5]
    assert sorted(image.numpy().tobytes() for image in images) == sorted(image.numpy().tobytes() for image in whole)
    assert len({image.numpy().tobytes() for image in images}) == 15

    parts = [load(rank=rank, world_size=3, eval_batch_size=300) for rank in range(3)]
    assert [part.test.samples for part in parts] == [1334, 1333, 1333]
    labels = torch.cat([labels for part in parts for _, labels in part.test.epoch()])
    assert torch.equal(labels.bincount(), embedded()[1].labels.bincount())


@pytest.mark.fault("metrics")
def test_more_ranks_than_test_images(tmp_path: Path) -> None:
    write_images(tmp_path, ("a", "b"), 3, 1)
    for workers in (0, 1):
        parts = [small(tmp_path, rank=rank, world_size=3, batch_size=1, workers=workers) for rank in range(3)]
        assert [sum(len(labels) for _, labels in part.test.epoch()) for part in parts] == [1, 1, 0]


def test_evaluation_is_not_augmented() -> None:
    plain, rich = load(), load(augment=RICH)
    assert same(list(plain.test.epoch(0)), list(rich.test.epoch(1)))


def test_one_epoch_of_files_at_a_time(folder: Path) -> None:
    data = small(folder)
    first = data.train.epoch(0)
    next(first)
    next(data.train.epoch(1))
    with pytest.raises(RuntimeError, match="one at a time"):
        next(first)


# ---------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_flip_by_their_slow_definition(channels: int) -> None:
    size, padding, augment = 6, 2, Augment(crop_padding=2, flip=0.5)
    images = torch.randint(1, 256, (20, channels, size, size), dtype=torch.uint8)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    draws = crop_flip_draws(20, augment, seed=3, epoch=1)
    assert set(draws[:2].flatten().tolist()) == {0, 1, 2, 3, 4} and set(draws[2].tolist()) == {0, 1}
    index = torch.randperm(20)[:13]
    got = crop_flip(padded, torch.cat([index[None], draws[:, index]]), size)
    for place, image in enumerate(index.tolist()):
        top, left, mirrored = draws[:, image].tolist()
        window = padded[image, :, top : top + size, left : left + size]
        assert torch.equal(got[place], window.flip(-1) if mirrored else window)


def test_loader_applies_the_drawn_crop_and_flip() -> None:
    arrays = embedded()[0]
    data = load(batch_size=16, limit=64, augment=Augment(crop_padding=3, flip=0.5), seed=9)
    rows = EpochBatches(64, 16, train=True, seed=9).rows(5)
    draws = crop_flip_draws(64, Augment(crop_padding=3, flip=0.5), seed=9, epoch=5)
    for row, (images, labels) in zip(rows, data.train.epoch(5), strict=True):
        assert torch.equal(labels, arrays.labels[row])
        for image, number in zip(images, row.tolist(), strict=True):
            top, left, mirrored = draws[:, number].tolist()
            canvas = torch.zeros(34, 34)
            canvas[3:31, 3:31] = arrays.images[number, 0].float() / 255
            window = canvas[top : top + 28, left : left + 28]
            expected = ((window.flip(1) if mirrored else window) - data.mean[0]) / data.std[0]
            assert torch.allclose(image[0], expected, atol=1e-5)


@pytest.mark.parametrize(("flip", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_flip_is_a_probability(flip: float, share: float) -> None:
    mirrored = crop_flip_draws(4000, Augment(flip=flip), seed=0, epoch=0)[2].float().mean()
    assert abs(float(mirrored) - share) < (0.03 if 0 < flip < 1 else 1e-9)


def test_switched_off_means_untouched() -> None:
    data = load(limit=64, batch_size=64, augment=Augment(flip=0))
    images, _ = next(data.train.epoch(0))
    order = EpochBatches(64, 64, train=True).rows(0)[0]
    assert torch.equal(images, Normalise(data.mean, data.std, torch.device("cpu"))(embedded()[0].images[order]))


@pytest.mark.parametrize("switch", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0, "mixup_prob": 0.5}])
def test_mixing_gives_soft_labels(folder: Path, switch: dict[str, float]) -> None:
    for data in (load(limit=256, batch_size=32, augment=Augment(**switch)), small(folder, augment=Augment(**switch))):
        batches = list(data.train.epoch(0))
        for _, labels in batches:
            assert labels.dtype == torch.float32 and labels.shape[1] == len(data.classes)
            assert torch.allclose(labels.sum(1), torch.ones(len(labels)))
        assert any(bool(((labels > 0.01) & (labels < 0.99)).any()) for _, labels in batches)
        assert next(data.test.epoch())[1].dtype == torch.int64


def test_mixup_mixes_images_as_it_mixes_labels() -> None:
    plain = load(limit=64, batch_size=64, augment=Augment(flip=0))
    mixed = load(limit=64, batch_size=64, augment=Augment(flip=0, mixup=1.0))
    (x, y), (z, soft) = next(plain.train.epoch(1)), next(mixed.train.epoch(1))
    hard = torch.nn.functional.one_hot(y, 10).float()
    different = (y != y.flip(0)).nonzero()[0, 0]
    share = soft[different, y[different]]
    assert 0 < share < 1
    assert torch.allclose(soft, share * hard + (1 - share) * hard.flip(0), atol=1e-6)
    assert torch.allclose(z, share * x + (1 - share) * x.flip(0), atol=1e-5)


def test_random_erasing_fills_rectangles() -> None:
    plain = load(limit=128, batch_size=128, augment=Augment(flip=0))
    erased = load(limit=128, batch_size=128, augment=Augment(flip=0, random_erasing=0.5, erasing_mode="const"))
    changed = next(plain.train.epoch(0))[0] != next(erased.train.epoch(0))[0]
    assert 30 < int(changed.flatten(1).any(1).sum()) < 98
    assert float(changed.flatten(1).float().mean(1).max()) < 0.45


@pytest.mark.parametrize("description", ["rand-m9-mstd0.5-inc1", "rand-m10-n8-p1.0-inc1", "rand-m10-n4-mstd1-tweights"])
def test_rand_augment_on_grey_and_colour(folder: Path, description: str) -> None:
    # at full magnitude timm asks Pillow for 0 bits of posterize, which Pillow 13 refuses
    grey = load(limit=256, batch_size=128, augment=Augment(flip=0, rand_augment=description))
    plain = load(limit=256, batch_size=128, augment=Augment(flip=0))
    changed = next(grey.train.epoch(0))[0] != next(plain.train.epoch(0))[0]
    assert int(changed.flatten(1).any(1).sum()) > 64
    colour = small(folder, augment=Augment(rand_augment=description), batch_size=27)
    assert all(torch.isfinite(images).all() for epoch in range(10) for images, _ in colour.train.epoch(epoch))


def test_crop_and_jitter_reach_files(folder: Path) -> None:
    # 20×24 images, all of the area at their own ratio: nothing random is left, and the image is only squeezed
    still = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.2, 1.2), "flip": 0.0}
    data = small(folder, augment=Augment(**still), interpolation="bilinear", batch_size=27)
    source = image_folder(folder)[0]
    order = EpochBatches(27, 27, train=True).rows(0)[0].tolist()
    images, labels = next(data.train.epoch(0))
    for image, label, index in zip(images, labels, order, strict=True):
        picture, expected_label = source.read(index)
        pixels = torch.from_numpy(np.array(picture.resize((16, 16), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        expected = (pixels - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
        assert int(label) == expected_label
        assert torch.allclose(image, expected, atol=1e-4)
    for change in ({"color_jitter": 0.4}, {"crop_scale": (0.3, 0.9)}, {"crop_ratio": (0.5, 0.6)}, {"flip": 0.5}):
        other = small(folder, augment=Augment(**still | change), interpolation="bilinear", batch_size=27)
        assert not torch.equal(next(other.train.epoch(0))[0], images), change


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"flip": 1.5}, ("augment.flip", "1.5", "0 to 1")),
        ({"random_erasing": -0.1}, ("augment.random_erasing", "-0.1")),
        ({"mixup": -1.0}, ("augment.mixup", "-1.0")),
        ({"cutmix": float("nan")}, ("augment.cutmix", "nan")),
        ({"mixup_prob": float("nan")}, ("augment.mixup_prob", "nan")),
        ({"crop_padding": -1}, ("augment.crop_padding", "-1")),
        ({"crop_scale": (0.9, 0.1)}, ("augment.crop_scale", "0.9, 0.1")),
        ({"crop_ratio": (0.0, 1.0)}, ("augment.crop_ratio", "0.0")),
        ({"erasing_mode": "noise"}, ("augment.erasing_mode", "'noise'", "pixel")),
        ({"rand_augment": "rand-x9"}, ("augment.rand_augment", "'x9'", "rand-m9-mstd0.5-inc1")),
        ({"rand_augment": "rand-m"}, ("augment.rand_augment", "'m'")),
        ({"rand_augment": "augmix-m3"}, ("augment.rand_augment", "'augmix'")),
        ({"rand_augment": "rand-m9", "color_jitter": 0.4}, ("augment.color_jitter", "0.4", "rand_augment")),
    ],
)
def test_bad_augmentation(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        Augment(**values)
    one_line(error, *parts)


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"name": "fashion_mnist5k"}, ("'fashion_mnist5k'", "did you mean 'fashion-mnist-5k'", "known: ", "folder")),
        ({"name": "zzz"}, ("'zzz'", "known: ")),
        ({"name": "wds/shards"}, ("'wds/shards'", "needs root=")),
        ({"name": "tfds/x"}, ("'tfds/x'", "is not taken")),
        ({"name": "torch/cifar10"}, ("'torch/cifar10'", "root=")),
        ({"name": "torch/folder", "root": "."}, ("name='folder'",)),
        ({"name": "folder"}, ("root=", "train/<class>")),
        ({"root": "."}, ("root", "in the package")),
        ({"batch_size": 0}, ("batch_size", "0", "at least 1")),
        ({"eval_batch_size": 0}, ("eval_batch_size",)),
        ({"workers": -1}, ("workers", "-1")),
        ({"image_size": 0}, ("image_size", "0")),
        ({"limit": 0}, ("limit", "0")),
        ({"limit": 5001}, ("limit", "5001", "5000")),
        ({"batch_size": 5001}, ("batch_size", "5001", "5000", "smaller")),
        ({"batch_size": 2501, "world_size": 2}, ("2501", "5002", "2 processes")),
        ({"rank": 2, "world_size": 2}, ("rank", "0 to 1")),
        ({"batch_size": 31, "augment": Augment(mixup=0.2)}, ("batch_size", "31", "even")),
        ({"augment": Augment(crop_scale=(0.5, 1.0))}, ("augment.crop_scale", "images in memory")),
        ({"crop_pct": 0.9}, ("crop_pct", "images in memory")),
        ({"crop_pct": 0.0}, ("crop_pct", "0.0")),
        ({"interpolation": "cubic"}, ("interpolation", "'cubic'", "bicubic")),
        ({"splits": ("train", "test")}, ("splits", "no effect")),
        ({"mean": (0.5,)}, ("mean", "both")),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, ("mean, std", "needs 1")),
        ({"mean": (0.5,), "std": (0.0,)}, ("std above 0",)),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        load(**arguments)
    one_line(error, *parts)


def test_a_path_as_name_says_how_to_write_it(folder: Path) -> None:
    with pytest.raises(ValueError, match="name='folder', root=") as error:
        load(str(folder))
    one_line(error, str(folder))


@pytest.mark.parametrize("start", [-1, 40])
def test_bad_start(start: int) -> None:
    with pytest.raises(ValueError, match="39 batches") as error:
        load().train.epoch(0, start)
    one_line(error, str(start))


@pytest.mark.fault("data")
def test_timm_splits_never_train_on_the_test(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw", packed=False)
    # torchvision would answer this training split with its test images
    for splits in (("train[:90%]", "validation"), ("test", "validation"), ("train", "train"), ("train", "training")):
        with pytest.raises(ValueError, match="splits") as error:
            load("torch/fashion_mnist", root=tmp_path, splits=splits, batch_size=8)
        one_line(error, splits[0])


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/no_such_set"])
def test_timm_cannot_open(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="timm cannot open") as error:
        load(name, root=tmp_path)
    one_line(error, name, str(tmp_path), "root=")


def break_embedded(patch: pytest.MonkeyPatch, place: Path) -> None:
    patch.setattr(kdlib.data.fashion.importlib.resources, "files", lambda _: place)


def test_embedded_file_missing_or_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray((importlib.resources.files("kdlib.data") / "assets" / kdlib.data.fashion.EMBEDDED).read_bytes())
    break_embedded(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match="install kdlib again") as missing:
        load()
    one_line(missing, str(tmp_path))
    content[2_000_000] ^= 1
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / kdlib.data.fashion.EMBEDDED).write_bytes(content)
    with pytest.raises(ValueError, match="corrupt") as corrupt:
        load()
    one_line(corrupt, str(tmp_path), "install kdlib again")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def unpack(path: Path, change: Any) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(bytes(change(content) or content)))


def set_byte(place: int, value: int) -> Any:
    def change(content: bytearray) -> None:
        content[place] = value

    return change


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    ("name", "damage", "parts"),
    [
        ("train-images-idx3", cut, ("corrupt gzip",)),
        ("t10k-labels-idx1", lambda path: path.write_bytes(b""), ("idx",)),
        ("train-images-idx3", lambda path: path.write_bytes(b"<html>not found</html>"), ("corrupt gzip",)),
        ("train-images-idx3", lambda path: unpack(path, lambda c: c[:-5]), ("cut off", "40×28×28")),
        ("train-images-idx3", lambda path: unpack(path, set_byte(3, 1)), ("00000801", "00000803")),
        ("train-images-idx3", lambda path: unpack(path, lambda c: c[:10]), ("3 dimensions",)),
        ("train-labels-idx1", lambda path: unpack(path, set_byte(20, 10)), ("label 10", "0 to 9")),
        (
            "t10k-labels-idx1",
            lambda path: unpack(path, lambda c: c[:7] + bytes([19]) + c[8:-1]),
            ("20 images", "19 labels"),
        ),
    ],
)
def test_corrupt_idx_files(tmp_path: Path, name: str, damage: Any, parts: tuple[str, ...]) -> None:
    write_idx(tmp_path)
    damage(tmp_path / f"{name}-ubyte.gz")
    with pytest.raises(ValueError, match=r"\S") as error:
        load("fashion-mnist", root=tmp_path, batch_size=8)
    one_line(error, str(tmp_path), name, *parts)


def test_missing_idx_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder") as error:
        load("fashion-mnist", root=tmp_path / "nowhere")
    one_line(error, "nowhere")
    write_idx(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte") as error:
        load("fashion-mnist", root=tmp_path)
    one_line(error, str(tmp_path), "root=")


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading\nno route")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kdlib.data.fashion, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist") as error:
        load("fashion-mnist")
    one_line(error, str(tmp_path), "root=", "fashion-mnist-5k")
    assert list((tmp_path / "kdlib").iterdir()) == []


def test_download_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def fetch(root: str, download: bool) -> None:
        assert download
        write_idx(Path(root, "FashionMNIST", "raw"))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kdlib.data.fashion, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fetch)
    assert load("fashion-mnist", batch_size=8).train.samples == 40
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", None)
    assert load("fashion-mnist", batch_size=8).test.samples == 20


def spoil_nothing_there(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()


def spoil_no_val(root: Path) -> None:
    (root / "val").rename(root / "validation")


def spoil_no_train(root: Path) -> None:
    (root / "train").rename(root / "images")


def spoil_one_class(root: Path) -> None:
    (root / "train" / "b").rename(root / "spare")


def spoil_val_class(root: Path) -> None:
    (root / "val" / "b").rename(root / "val" / "B")


def spoil_empty_class(root: Path) -> None:
    for path in (root / "train" / "b").iterdir():
        path.rename(path.with_suffix(".gif"))


def spoil_same(root: Path) -> None:
    (root / "val").rename(root / "old")
    (root / "val").symlink_to(root / "train")


def spoil_loop(root: Path) -> None:
    (root / "train" / "a" / "again").symlink_to(root / "train" / "a")


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    ("spoil", "kind", "parts"),
    [
        (spoil_nothing_there, FileNotFoundError, ("no such folder", "train/<class>")),
        (spoil_no_val, FileNotFoundError, ("/val: missing", "train, validation", "rename")),
        (spoil_no_train, FileNotFoundError, ("/train: missing", "images, val")),
        (spoil_one_class, ValueError, ("/train", "one class (a)", "at least two")),
        (spoil_val_class, ValueError, ("/val", "lacks b", "has B besides", "same classes")),
        (spoil_empty_class, ValueError, ("/train/b", "without images", ".png")),
        (spoil_same, ValueError, ("/val", "same folder as train")),
        (spoil_loop, ValueError, ("again", "link back")),
    ],
)
def test_bad_folders(tmp_path: Path, spoil: Any, kind: type[Exception], parts: tuple[str, ...]) -> None:
    root = write_images(tmp_path / "set", ("a", "b"), 2, 1)
    spoil(root)
    with pytest.raises(kind) as error:
        small(root)
    one_line(error, str(root), *parts)


def damage_image(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not an image")
    elif how == "header":
        path.write_bytes(content[:20] + b"\xff" * 40 + content[60:])
    else:
        Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(path)


@pytest.mark.fault("data")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("split", "how"), [("train", "cut"), ("val", "empty"), ("train", "16 bit")])
def test_corrupt_images_are_named(tmp_path: Path, split: str, how: str, workers: int) -> None:
    write_images(tmp_path, ("a", "b"), 4, 2)
    bad = tmp_path / split / "b" / "1.png"
    damage_image(bad, how)
    data = small(tmp_path, workers=workers, augment=Augment(mixup=0.2))
    with pytest.raises(ValueError, match="cannot be read") as error:
        list((data.train if split == "train" else data.test).epoch(0))
    one_line(error, str(bad), "repair or remove it")
    assert "Traceback" not in str(error.value)
    assert not multiprocessing.active_children()


@pytest.mark.fault("data")
@pytest.mark.parametrize("how", ["text", "header"])
def test_timms_readers_do_not_replace_corrupt_images(tmp_path: Path, how: str) -> None:
    from timm.data.dataset_factory import create_dataset

    write_images(tmp_path, ("a", "b"), 4, 2)
    bad = tmp_path / "train" / "a" / "1.png"
    damage_image(bad, how)
    dataset = create_dataset("", root=str(tmp_path / "train"))
    if how == "text":
        dataset[1]  # timm answers with another image; the next lines must not
    source = TimmFiles(dataset, "set/train")
    assert source.classes == ("a", "b") and len(source) == 8
    assert re.search(r"image 1 \(.*1\.png\)", source.where(1))
    source.read(0)
    with pytest.raises((OSError, SyntaxError, ValueError)):
        source.read(1)


def test_arrays_must_name_their_classes() -> None:
    class Nameless:
        data, targets = np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1]

    from kdlib.data.sources import _arrays

    with pytest.raises(ValueError, match="does not name its classes"):
        _arrays(Nameless(), "torch/nameless")
    assert len(Arrays(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), ("a", "b"))) == 4
