"""Shards: every rank its own stretch, every image once, the same batches from any start; what is wrong is one line."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib.cli import main
from kdlib.data import Augment, Data, load, with_targets
from kdlib.data.fashion import embedded
from kdlib.data.streams import ShardBatches, drawn
from tests.tars import LENGTHS, add, make_shards

STILL = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def opened(root: Path | str, **more: Any) -> Data:
    given: dict[str, Any] = {"image_size": 28, "batch_size": 4, "eval_batch_size": 4, "workers": 0, "shuffle": 8}
    return load("wds/", root=root, **given | more)


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)
    )


# what is read


def test_images_and_labels_are_those_that_were_written(shards: Path) -> None:
    data, (train, test) = opened(shards, augment=STILL), embedded()
    assert (data.classes, data.channels, len(data.train), data.train.samples) == (train.classes, 3, 16, 64)
    for loader, source in ((data.train, train), (data.test, test)):
        numbers = torch.cat(loader.batches.rows(0))
        images, labels = (torch.cat(parts) for parts in zip(*loader.epoch(0), strict=True))
        assert torch.equal(labels, source.labels[numbers])
        grey = (images[:, 0] * data.std[0] + data.mean[0]) * 255
        middle = source.images[numbers, 0].float()
        if loader is data.train:  # the test images are resized and cut
            assert torch.allclose(grey, middle, atol=1e-3)


def test_timms_reader_reads_the_same(shards: Path) -> None:
    pytest.importorskip("webdataset")
    from timm.data.dataset_factory import create_dataset

    theirs = create_dataset("wds/", root=str(shards), split="validation", is_training=False)
    found = [(np.asarray(image)[..., 0], label) for image, label in theirs]
    _, test = embedded()
    assert [label for _, label in found] == test.labels[:17].tolist()
    assert all(np.array_equal(image, test.images[i, 0].numpy()) for i, (image, _) in enumerate(found))


def test_webdatasets_writer_is_understood(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    for split, count in (("train", 9), ("val", 5)):
        with wds.TarWriter(str(tmp_path / f"{split}-0.tar.gz")) as sink:
            for i in range(count):
                sink.write({"__key__": f"a/{i:03d}", "jpg": np.full((8, 8, 3), 20 * i, np.uint8), "cls": i % 3})
    names = tmp_path / "names"
    names.write_text("a\nb\nc\n")
    given = ["shards", str(tmp_path), "train=train-*.tar.gz", "validation=val-*", "--classes", str(names), "--quiet"]
    assert main(given) == 0
    data = opened(tmp_path, image_size=8)
    assert data.classes == ("a", "b", "c")
    assert torch.cat([labels for _, labels in data.test.epoch()]).tolist() == [0, 1, 2, 0, 1]


def test_shards_come_over_http(shards: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert same(list(opened(address).train.epoch(1, 3)), list(opened(shards).train.epoch(1, 3)))
        with pytest.raises(FileNotFoundError, match=r"_info\.json: cannot be read \(.*404"):
            opened(f"{address}/nothing")
    finally:
        server.shutdown()
        server.server_close()


# which image comes when


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_key_only_and_may_begin_anywhere(shards: Path, workers: int) -> None:
    data = opened(shards, workers=workers, augment=Augment(random_erasing=0.5, mixup=0.2))
    whole = list(data.train.epoch(1))
    assert len(whole) == len(data.train) == 16
    for start in (1, 7, 16):
        assert same(list(data.train.epoch(1, start)), whole[start:])
    assert not same(list(data.train.epoch(2)), whole)
    targets = [t["@indices"] for _, t in with_targets(data.train, ["@indices"], 1, 7)]
    assert torch.equal(torch.cat(targets), torch.cat(data.train.batches.rows(1)[7:]))


def test_an_image_is_augmented_by_its_number_whoever_reads_it(shards: Path) -> None:
    found = []
    for world in (1, 2):
        parts = [opened(shards, rank=rank, world_size=world, batch_size=4 // world) for rank in range(world)]
        numbers = torch.cat([row for part in parts for row in part.train.batches.rows(3)])
        images = torch.cat([images for part in parts for images, _ in part.train.epoch(3)])
        found.append(dict(zip(numbers.tolist(), images, strict=True)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(image, found[1][number]) for number, image in found[0].items())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lengths", [(13, 20, 7, 25), (65,), (1,) * 40, (0, 30, 0, 3)])
def test_every_rank_has_as_many_batches_and_no_image_comes_twice(lengths: tuple[int, ...], train: bool) -> None:
    for world in (1, 2, 3, 5):
        for workers in (1, 2, 4):
            parts = [
                ShardBatches(lengths, 2, train=train, buffer=5, workers=workers, seed=1, rank=rank, world_size=world)
                for rank in range(world)
            ]
            rows = [part.rows(2) for part in parts]
            assert [len(row) for row in rows] == [len(part) for part in parts]
            every = torch.cat([torch.cat(row) for row in rows if row])
            assert len(set(every.tolist())) == len(every)
            if train:
                assert {len(part) for part in parts} == {sum(lengths) // (2 * world)}
                assert all(len(batch) == 2 for row in rows for batch in row)
            else:
                assert sorted(every.tolist()) == list(range(sum(lengths)))
                assert max(map(len, rows)) - min(map(len, rows)) <= 1
            assert all(torch.equal(a, b) for a, b in zip(parts[0].rows(2, world - 1), rows[-1], strict=True))
            # no two workers open a shard at the same image
            reads = [read for part in parts for w in range(workers) for read in part.lane(2, w).reads]
            held = [(shard, image) for shard, first, last in reads for image in range(first, last)]
            assert len(held) == len(set(held)) == len(every)


@pytest.mark.fault("metrics")
def test_three_ranks_evaluate_each_image_once(shards: Path) -> None:
    parts = [opened(shards, rank=rank, world_size=3, workers=2, batch_size=2) for rank in range(3)]
    numbers = torch.cat([row for part in parts for row in part.test.batches.rows(0)])
    labels = torch.cat([labels for part in parts for _, labels in part.test.epoch()])
    assert sorted(numbers.tolist()) == list(range(17))
    assert torch.equal(labels, embedded()[1].labels[numbers])


def test_the_next_image_is_drawn_of_those_that_are_held() -> None:
    order = drawn(1000, 50, "key")
    assert sorted(order.tolist()) == list(range(1000)) and torch.equal(order, drawn(1000, 50, "key"))
    assert bool((order - torch.arange(1000) < 50).all()) and not torch.equal(order, drawn(1000, 50, "other"))
    assert (order - torch.arange(1000)).float().abs().mean() > 20
    assert drawn(5, 1, "key").tolist() == [0, 1, 2, 3, 4] and drawn(0, 5, "key").tolist() == []


def test_what_is_left_out_differs_between_epochs() -> None:
    batches = ShardBatches((10,), 4, train=True)
    assert len({frozenset(torch.cat(batches.rows(epoch)).tolist()) for epoch in range(9)}) == 3


def test_a_late_start_does_not_open_shards_that_lie_behind(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    inner = open

    def spy(name: Any, *rest: Any, **more: Any) -> Any:
        read.append(Path(str(name)).name)
        return inner(name, *rest, **more)

    data = opened(shards, shuffle=2)
    monkeypatch.setattr("builtins.open", spy)
    list(data.train.epoch(0, 15))
    assert 1 <= len({name for name in read if name.endswith(".tar")}) <= 2


# what is wrong


def change_info(root: Path, **changes: Any) -> None:
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"] |= changes
    (root / "_info.json").write_text(json.dumps(info))


def rewrite(path: Path, name: str, content: bytes | None) -> None:
    """A tar with one member changed, or taken out."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for key, value in members:
            if key != name or content is not None:
                add(tar, key, value if key != name else content or b"")


def outside(name: str) -> Any:
    return lambda root: change_info(root, filenames=[name], shard_lengths=[65])


OPENING = {
    "no folder": (lambda root: [p.unlink() for p in root.iterdir()], "_info.json: cannot be read"),
    "no json": (lambda root: (root / "_info.json").write_text("{"), "is no JSON"),
    "a list": (lambda root: (root / "_info.json").write_text("[]"), "holds no mapping"),
    "no split": (lambda root: (root / "_info.json").write_text('{"classes": ["a", "b"]}'), "no split 'train'"),
    "no classes": (lambda root: (root / "_info.json").write_text('{"splits": {}}'), "say classes=1000"),
    "lengths": (lambda root: change_info(root, shard_lengths=[3]), "as many of each"),
    "missing shard": (
        lambda root: (root / "train-0002.tar").unlink(),
        "1 of 4 shards of split 'train' are missing (train-0002.tar)",
    ),
    "twice": (lambda root: change_info(root, filenames=["train-0000.tar"] * 4), "names a shard twice"),
    "in both": (
        lambda root: change_info(root, filenames=["validation-0000.tar"], shard_lengths=[11]),
        "is in both splits",
    ),
    "parent": (outside("../x.tar"), "leads out of the folder"),
    "absolute": (outside("/etc/passwd"), "leads out of the folder"),
    "a command": (outside("pipe:touch bomb; cat x.tar"), "are missing (pipe:touch bomb; cat x.tar)"),
    "an address": (outside("http://127.0.0.1/x.tar"), "leads out of the folder"),
}


@pytest.mark.fault("data")
@pytest.mark.parametrize("what", OPENING)
def test_a_list_of_shards_that_is_wrong_is_told_before_anything_is_read(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = make_shards(tmp_path / "set")
    spoil, says = OPENING[what]
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        opened(root)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("bomb"))


def halved(root: Path) -> None:
    path = root / "train-0001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 300])


def scribbled(root: Path) -> None:
    content = bytearray((root / "train-0001.tar").read_bytes())
    content[2048:2560] = b"\xff" * 512
    (root / "train-0001.tar").write_bytes(bytes(content))


READING = {
    "corrupt image": (
        lambda root: rewrite(root / "train-0001.tar", "00015.png", b"\x89PNG"),
        "train-0001.tar, image 2",
    ),
    "no label": (lambda root: rewrite(root / "train-0001.tar", "00015.cls", None), "expected an image"),
    "no number": (lambda root: rewrite(root / "train-0001.tar", "00015.cls", b"cat"), "train-0001.tar, image 2"),
    "no such class": (lambda root: rewrite(root / "train-0001.tar", "00015.cls", b"10"), "the classes are 0 to 9"),
    "cut off": (halved, "train-0001.tar, image "),
    "scribbled on": (scribbled, "train-0001.tar"),
    "too short": (lambda root: change_info(root, shard_lengths=[13, 22, 7, 25]), "ends after 20 of the 22 images"),
    "too long": (lambda root: change_info(root, shard_lengths=[13, 18, 7, 25]), "holds more than the 18 images"),
    "empty": (lambda root: (root / "train-0001.tar").write_bytes(b""), "train-0001.tar, image 0"),
    "no tar": (lambda root: (root / "train-0001.tar").write_bytes(b"x" * 3000), "train-0001.tar, image 0"),
}


@pytest.mark.fault("data")
@pytest.mark.parametrize("what", READING)
def test_a_shard_that_is_wrong_is_named_and_nothing_takes_its_place(what: str, tmp_path: Path) -> None:
    spoil, says = READING[what]
    spoil(make_shards(tmp_path))
    data = opened(tmp_path, batch_size=1)
    with pytest.raises(ValueError, match="cannot be read") as error:
        list(data.train.epoch())
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.fault("data")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shard", range(4))
def test_a_shard_that_is_longer_than_told_is_named_wherever_it_is_read(
    shard: int, batch: int, workers: int, tmp_path: Path
) -> None:
    """Its last image, even where no image is read after it; never the shard that follows."""
    lengths = [8, 8, 8, 8]
    make_shards(tmp_path, {"train": [*lengths[:shard], 9, *lengths[shard + 1 :]], "validation": [4]})
    change_info(tmp_path, shard_lengths=lengths)
    data = opened(tmp_path, batch_size=batch, workers=workers)
    for epoch in range(4):
        with pytest.raises(ValueError, match=rf"train-000{shard}\.tar, image 7: .* holds more than the 8 images"):
            list(data.train.epoch(epoch))


@pytest.mark.fault("data")
def test_a_shard_that_vanishes_is_named_by_workers_too(tmp_path: Path) -> None:
    data = opened(make_shards(tmp_path), workers=2)
    (tmp_path / "train-0003.tar").unlink()
    with pytest.raises(ValueError, match=r"train-0003\.tar, image \d+: cannot be read \(FileNotFoundError"):
        list(data.train.epoch())


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"root": None}, "needs root="),
        ({"root": "pipe:cat"}, "pipe:cat/_info.json: cannot be read"),
        ({"root": "s3://bucket/set"}, "expected a folder (mount what is elsewhere), or an http(s) address"),
        ({"root": "file:///etc"}, "expected a folder"),
        ({"batch_size": 40, "world_size": 2}, "makes 80 images a step, but 'wds/' trains on 65"),
        ({"limit": 10}, "limit: has no effect on 'wds/' (shards)"),
        ({"classes": 3}, "classes: got 3, but"),
        ({"splits": ("train", "train")}, "the images that are trained on cannot be the test"),
        ({"splits": ("train", "test")}, "no split 'test' (known: train, validation)"),
        ({"shuffle": 0}, "shuffle: got 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], says: str, shards: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        opened(**{"root": shards} | arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("argument", [{"shuffle": 5}, {"classes": 10}])
def test_what_only_shards_have_is_told_of_other_sets(argument: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))}: has no effect on 'fashion-mnist-5k'"):
        load(**argument)  # type: ignore[arg-type]


def test_the_list_is_written_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((make_shards(tmp_path) / "_info.json").read_text())
    assert main(["shards", str(tmp_path), "train=train-*.tar", "validation=validation-*.tar"]) == 0
    assert "train: 65 images, validation: 17 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "_info.json").read_text())["splits"] == told["splits"]
    assert opened(tmp_path, classes=10).classes == tuple(map(str, range(10)))
    for wrong, says in (
        (["train"], "expected SPLIT=PATTERN"),
        (["train=nothing-*"], "no file in"),
        (["train=../*.tar"], "leads out of"),
    ):
        assert main(["shards", str(tmp_path), *wrong]) == 2
        assert says in capsys.readouterr().err
    rewrite(tmp_path / "train-0000.tar", "00003.cls", None)
    assert main(["shards", str(tmp_path), "train=train-*.tar"]) == 2
    assert "train-0000.tar: image 3 holds .png; expected an image and .cls" in capsys.readouterr().err


# Parquet files, streamed by datasets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    train, test = embedded()
    told = {"image": {"_type": "Image"}, "label": {"names": list(train.classes), "_type": "ClassLabel"}}
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": told}})}
    schema = pa.schema([("image", picture), ("label", pa.int64())], metadata=metadata)
    for split, source in (("train", train), ("validation", test)):
        at = 0
        for k, count in enumerate(LENGTHS[split]):
            rows: dict[str, list[Any]] = {"image": [], "label": source.labels[at : at + count].tolist()}
            for i in range(at, at + count):
                content = io.BytesIO()
                Image.fromarray(source.images[i, 0].numpy()).save(content, "PNG")
                rows["image"].append({"bytes": content.getvalue(), "path": None})
            table = pa.Table.from_pydict(rows, schema=schema)
            pq.write_table(table, tmp_path / f"{split}-{k:05d}-of-{len(LENGTHS[split]):05d}.parquet", row_group_size=4)
            at += count
    return tmp_path


def streamed(folder: Path, **more: Any) -> Data:
    given: dict[str, Any] = {"image_size": 28, "batch_size": 4, "eval_batch_size": 4, "workers": 0, "shuffle": 8}
    return load(f"hfids/{folder}", **given | more)


def test_parquet_is_read_as_tar_files_are(hub: Path, shards: Path) -> None:
    tars, data = opened(shards), streamed(hub)
    assert data.classes == tars.classes
    assert same(list(data.train.epoch(1)), list(tars.train.epoch(1)))
    assert same(list(data.train.epoch(1, 9)), list(tars.train.epoch(1, 9)))
    assert same(list(data.test.epoch()), list(tars.test.epoch()))
    assert same(list(streamed(hub, workers=2).train.epoch(1)), list(opened(shards, workers=2).train.epoch(1)))


def corrupt(hub: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(hub / SHARD)
    pictures = table["image"].to_pylist()
    pictures[3]["bytes"] = b"no picture"
    column = table.schema.field("image")
    pq.write_table(table.set_column(0, column, pa.array(pictures, column.type)), hub / SHARD)


def without(pattern: str, csv: bool = False) -> Any:
    def spoil(hub: Path) -> None:
        for file in hub.glob(pattern):
            file.unlink()
        for split in ("train", "validation") if csv else ():
            (hub / f"{split}.csv").write_text("image,label\n")

    return spoil


SHARD = "train-00001-of-00004.parquet"
PARQUET = {
    "corrupt image": (corrupt, f"{SHARD}, image 3: cannot be read"),
    "no split": (without("validation-*"), "no split 'validation'"),
    "no parquet": (without("*.parquet", csv=True), "is no Parquet file"),
    "nothing there": (without("*.parquet"), "cannot be opened"),
}


@pytest.mark.parametrize("what", PARQUET)
def test_parquet_that_is_wrong_is_one_line(what: str, hub: Path) -> None:
    spoil, says = PARQUET[what]
    spoil(hub)
    with pytest.raises(ValueError, match=r"data set|cannot be read") as error:
        list(streamed(hub).train.epoch())
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_parquet_file_that_vanishes_is_named(hub: Path) -> None:
    data = streamed(hub)
    (hub / SHARD).unlink()
    with pytest.raises(ValueError, match=rf"{SHARD}, image \d+: cannot be read \(FileNotFoundError"):
        list(data.train.epoch())


def test_without_datasets_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets .*kdlib\[stream\]"):
        load("hfids/owner/set")
    with pytest.raises(ValueError, match="'tfds/x' is not taken"):
        load("tfds/x")
