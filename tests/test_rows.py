"""Every row of the paper is a config at three scales: all are dry-run, and say what the paper's tables say."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import timm
import torch

from kdlib import runs, schedules
from kdlib.config import read
from kdlib.data import Augment
from kdlib.dryrun import Nowhere, dry_run
from kdlib.recipe import Recipe, build, load, load_children, probe, weights
from kdlib.recipe.schema import Optimizer, Schedule
from kdlib.training.runfolder import beside, resolved
from recipes.riformer import gfnet, model  # noqa: F401  registers the models
from recipes.riformer.convert import convert
from tests.conftest import ROOT, randomise

HERE = ROOT / "recipes" / "riformer"
ROWS = sorted(path.stem for path in (HERE / "configs" / "rows").glob("*.yaml"))
SCALES = ("fashion_mnist_5k", "fashion_mnist", "imagenet")
NUMBERS = ("epochs", "optimizer", "schedule", "eval_every", "output")
"""Keys that change no tensor."""


def regime(row: str) -> str:
    """What follows the scale in the name of the file with which a row goes."""
    return "_finetune" if row.endswith("_finetune") else "_final" if row.startswith("tab6") else ""


def scale_of(scale: str, row: str) -> str:
    """The file of a scale that goes with a row: on ImageNet two sizes have one of their own."""
    own = re.search("_m(36|48)", row) if scale == "imagenet" else None
    return f"{scale}{regime(row)}{own[0] if own else ''}"


@cache
def recipe(scale: str, row: str) -> Recipe:
    configs = HERE / "configs"
    return load(read([str(configs / "scales" / f"{scale_of(scale, row)}.yaml"), str(configs / "rows" / f"{row}.yaml")]))


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows have in common, models and the runs of their teachers, is built and checked once."""
    models, answers, children = {}, {}, {}
    build_model, answer, get_ready = build.build_model, probe.answer, runs.get_ready

    def build_once(spec, data, where):
        key = f"{where} {spec.whole} {data.channels} {len(data.classes)}"
        models[key] = models.get(key) or build_model(spec, data, where)
        return models[key]

    def answer_once(net, images, where):
        key = (id(net), images.shape)
        answers[key] = answers[key] if key in answers else answer(net, images, where)
        return answers[key]

    def check_once(config, seat, convert=None, title="student", parent=None):
        key = f"{title} {resolved(config)}" if parent else object()
        children[key] = children.get(key) or get_ready(config, seat, convert, title, parent)
        return children[key]

    monkeypatch.setattr(build, "build_model", build_once)
    monkeypatch.setattr(probe, "answer", answer_once)
    monkeypatch.setattr("kdlib.ready.get_ready", check_once)


@pytest.mark.parametrize("late", [False, True], ids=["ablations", "final"])
@pytest.mark.parametrize("scale", SCALES)
def test_every_row_is_dry_run(
    scale: str, late: bool, remembering: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that build the same tensors as another one are loaded, but not built again."""
    monkeypatch.chdir(tmp_path)
    built = {_tensors(recipe(other, row)) for other in SCALES[: SCALES.index(scale)] for row in ROWS}
    chosen = [row for row in ROWS if bool(regime(row)) == late]
    assert len(chosen) == (10 if late else 29)
    for row in chosen:
        config = recipe(scale, row)
        if _tensors(config) in built:
            continue
        built.add(_tensors(config))
        told = dry_run(config, convert)
        assert "student → " in told and "MISSING" not in told, row
        assert ("give data.root=…" in told) == (scale == "imagenet")
    assert not list(tmp_path.iterdir())


def _tensors(config: Recipe) -> str:
    plain = {key: value for key, value in resolved(config).items() if key not in NUMBERS}
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "name"} | {
        "images": config.data["name"] == "folder"
    }
    plain["teachers"] = {name: spec | {"recipe": None} for name, spec in plain["teachers"].items()}
    return str(plain)


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("tab4")])
def test_the_windows_of_table_4(row: str) -> None:
    """tab4_FEATURES_RELATIONS_LAYERS: on in so many of 120 epochs, from the first, at so many layers."""
    features, relations, layers = (int(part) for part in [*row.split("_")[1:], "4"][:3])
    config = recipe("imagenet", row)
    on = {name: _epochs(config, name) for name in ("block", "mixer", "relation")}
    assert on == {"block": features, "mixer": features, "relation": relations}
    if features:
        ready = runs.get_ready(recipe("fashion_mnist_5k", row), Nowhere())
        for term in ready.plan.terms[1:]:
            assert len(set(term.pairs)) == layers and term.reduce == "sum"
            assert all(pair.teacher == f"twin.{pair.student}" for pair in term.pairs)


def _epochs(config: Recipe, name: str) -> int:
    """In how many epochs a term is on; they are the first ones."""
    if name not in config.terms:
        return 0
    window = schedules.Window(config.terms[name].start, config.terms[name].until)
    on = [epoch for epoch in range(config.epochs) if window(epoch, config.epochs)]
    assert on == list(range(len(on)))
    return len(on)


@pytest.mark.parametrize(
    ("size", "batch", "crop", "block", "mixer", "relation"),
    [
        ("s12", 1024, 0.9, 1e-4, 1e-3, 1),
        ("s24", 1024, 0.9, 3e-4, 5e-3, 4),
        ("s36", 1024, 0.9, 1e-4, 1e-3, 1),
        ("m36", 1024, 0.95, 1e-4, 1e-3, 1),
        ("m48", 512, 0.95, 1e-4, 1e-3, 1),
    ],
)
def test_the_final_hyper_parameters_of_table_10(
    size: str, batch: int, crop: float, block: float, mixer: float, relation: float
) -> None:
    """And the crops on which the sizes were tested, at 224 as at 384 px."""
    final = recipe("imagenet", f"tab6_{size}")
    assert {name: term.weight for name, term in final.terms.items()} == {
        "soft": 1, "block": block, "mixer": mixer, "relation": relation,
    }  # fmt: skip
    assert (final.epochs, final.optimizer.lr) == (600, 1e-3)
    assert final.data == IMAGES | {"batch_size": batch, "crop_pct": crop}
    assert (final.optimizer.model_copy(update={"lr": 5e-4}), final.schedule) == (ADAMW, COSINE)
    assert (_epochs(final, "block"), _epochs(final, "mixer"), _epochs(final, "relation")) == (400, 400, 100)
    assert final.student.arguments == {"drop_path_rate": 0.1, "variant": size} and final.student.init == "twin"
    assert final.teachers["twin"].arguments["variant"] == size
    tuned = recipe("imagenet", f"tab6_{size}_finetune")
    assert (tuned.epochs, tuned.data["image_size"], list(tuned.terms)) == (30, 384, ["soft"])
    assert tuned.data["crop_pct"] == crop and tuned.teachers["convformer"].name.startswith("convformer_")
    start = load_children(tuned)["teachers", "start", "recipe"]
    for key in ("epochs", "optimizer", "schedule", "terms", "teachers"):
        assert getattr(start, key) == getattr(final, key), f"what is fine-tuned is the 224 px row, {key}"
    assert start.data == final.data and start.student == final.student


IMAGES = {
    "name": "folder", "image_size": 224, "batch_size": 512, "crop_pct": 0.9, "workers": 8,
    "augment": {"rand_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25},
}  # fmt: skip
ADAMW = Optimizer(name="adamw", lr=5e-4, weight_decay=0.05)
COSINE = Schedule(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if not regime(row)])
def test_all_ablations_are_trained_alike(row: str) -> None:
    """The regime of §4, and of Tab. 10 where §4 is silent: RIFormer-S12, 120 epochs, no average, nothing clipped."""
    config = recipe("imagenet", row)
    assert config.data == IMAGES and (config.optimizer, config.schedule) == (ADAMW, COSINE)
    assert (config.epochs, config.accumulate, config.ema, config.baseline) == (120, 1, None, None)
    assert config.student.name == "riformer" and config.student.arguments.get("variant", "s12") == "s12"
    assert config.student.arguments["drop_path_rate"] == 0.1
    if "label" in config.terms:
        assert config.terms["label"].loss.whole == {"name": "cross_entropy", "label_smoothing": 0.1}


def test_the_optimizer_and_the_size_that_are_meant_where_nothing_is_said() -> None:
    taken = build.build_optimizer(ADAMW, torch.nn.Linear(1, 1)).defaults
    assert taken["betas"] == (0.9, 0.999) and taken["eps"] == 1e-8
    augment = Augment(**IMAGES["augment"])
    assert (augment.switch_prob, augment.mixup_prob) == (0.5, 1) and augment.color_jitter == 0
    with torch.device("meta"):
        sizes = [timm.create_model("riformer", **more).state_dict().keys() for more in ({}, {"variant": "s12"})]
    assert sizes[0] == sizes[1]


def test_the_mixers_of_table_1() -> None:
    for scale in SCALES:
        for row, mixer in (("tab1_pooling", "pool"), ("tab1_identity", "identity")):
            found = recipe(scale, row)
            assert found.student.arguments["token_mixer"] == mixer and found.student.init is None
            assert {name: (term.loss.name, term.weight) for name, term in found.terms.items()} == {
                "label": ("cross_entropy", 1)
            }
            assert not found.teachers


TEACHERS = {
    "imagenet": {
        "global": {"name": "gfnet_h_b", "drop_path_rate": 0.4},
        "windowed": {"name": "swin_base_patch4_window7_224.ms_in22k_ft_in1k", "pretrained": True},
        "local": {"name": "metaformer_pool", "variant": "m48", "pretrained": True, "drop_path_rate": 0.4},
        "twin": {"name": "metaformer_pool", "pretrained": True, "drop_path_rate": 0.1},
    },
    "fashion_mnist": {
        "global": {"name": "gfnet_h_micro", "overlap": True},
        "windowed": {"name": "swin_tiny_patch4_window7_224", "img_size": 64, "window_size": 4, "embed_dim": 32,
                     "depths": [2, 2, 6, 2], "num_heads": [1, 2, 4, 8]},
        "local": {"name": "metaformer_pool_micro", "variant": "s24"},
        "twin": {"name": "metaformer_pool_micro"},
    },
}  # fmt: skip
"""By receptive field, the logit teachers of Table 5 and what stands for them at 64 px; and the one that is imitated."""
SOFT = {"soft": ("soft_target", 1, 120)}
IMITATED = {
    "block": ("feature_mse", 1e-4, 80),
    "mixer": ("feature_mse", 1e-3, 80),
    "relation": ("gram_relation", 1, 20),
}
"""Loss, weight, and in how many of 120 epochs it is on."""


def _terms(row: str) -> dict[str, tuple[str, float, int]]:
    config = recipe("imagenet", row)
    return {name: (term.loss.name, term.weight, _epochs(config, name)) for name, term in config.terms.items()}


@pytest.mark.parametrize("field", ["global", "windowed", "local"])
def test_the_teachers_of_table_5(field: str) -> None:
    assert _terms(f"tab5_{field}") == SOFT and _terms(f"tab5_{field}_imitation") == SOFT | IMITATED
    for scale in SCALES:
        models = TEACHERS["imagenet" if scale == "imagenet" else "fashion_mnist"]
        for row, imitates in ((f"tab5_{field}", False), (f"tab5_{field}_imitation", True)):
            found = recipe(scale, row)
            logits = found.terms["soft"].teacher
            assert found.student.arguments.get("token_mixer", "affine") == "affine" and found.student.init is None
            expected = {logits: models[field]} | ({"twin": models["twin"]} if imitates else {})
            assert logits != "twin" and {name: spec.whole for name, spec in found.teachers.items()} == expected
            for name in set(found.terms) - {"soft"}:
                assert found.terms[name].teacher == f"twin.{found.terms[name].student}"


@pytest.mark.parametrize("row", ["guideline5_with", "guideline5_without", "tab4_80_20_4", "tab5_global_imitation"])
def test_guideline_5_and_table_4_train_by_the_objective_of_table_5(row: str) -> None:
    assert _terms(row) == SOFT | IMITATED
    assert recipe("imagenet", row).terms["soft"].teacher == "wide"


def test_table_7_imitates_block_outputs_alone() -> None:
    """With the identity as mixer, whose outputs there are none of a teacher's to compare with."""
    assert _terms("tab7_identity_features") == SOFT | {"block": IMITATED["block"]}
    for scale in SCALES:
        found = recipe(scale, "tab7_identity_features")
        assert found.student.arguments["token_mixer"] == "identity" and found.student.init is None
        assert found.terms["block"] == recipe(scale, "tab5_global_imitation").terms["block"]
        assert found.terms["soft"].teacher == "wide"


def test_gfnet_is_trained_as_its_authors_say() -> None:
    wide = load_children(recipe("imagenet", "tab5_global"))["teachers", "wide", "recipe"]
    augment = IMAGES["augment"] | {"random_erasing": 0.0}
    assert wide.data == IMAGES | {"batch_size": 1024, "crop_pct": 0.875, "augment": augment}
    assert wide.optimizer == ADAMW.model_copy(update={"lr": 1e-3, "clip_grad": 1.0}) and wide.schedule == COSINE
    assert wide.epochs == 300 and wide.terms["label"].loss.whole == {"name": "cross_entropy", "label_smoothing": 0.1}


def test_the_losses_of_tables_2_and_3() -> None:
    expected = {
        "labels": {"label": 1}, "hard": {"hard": 1}, "soft": {"soft": 1},
        "labels_hard": {"label": 0.5, "hard": 0.5}, "labels_soft": {"label": 0.5, "soft": 0.5},
    }  # fmt: skip
    for scale in SCALES:
        for what, terms in expected.items():
            for table, mixer in (("tab2_identity", "identity"), ("tab3_affine", "affine")):
                found = recipe(scale, f"{table}_{what}")
                assert {name: term.weight for name, term in found.terms.items()} == terms
                assert found.student.arguments.get("token_mixer", "affine") == mixer and found.student.init is None


def test_rows_share_their_teachers() -> None:
    """A teacher is trained once for all rows of a scale; the row of tab6 imitates one of another size."""
    for scale in SCALES:
        folders: dict[str, set[str]] = {}
        for row in ROWS:
            for at, child in load_children(recipe(scale, row)).items():
                size = re.search("[sm][0-9]{2}", row) if regime(row) and at[1] in ("twin", "start") else None
                name = f"{at[1]}{size[0] if size else ''}"
                folders.setdefault(name, set()).add(beside(child, recipe(scale, row)).output.name)
        assert folders["wide"] and all(len(found) == 1 for found in folders.values() if found), (scale, folders)


def test_a_convformer_that_is_not_downloaded_is_trained_once_for_all_sizes() -> None:
    """Sizes differ in the crop that they are tested on, which would be its own too if it had none."""
    folders = set()
    for row in (row for row in ROWS if row.endswith("_finetune")):
        parts = [HERE / "configs" / kind for kind in (f"scales/{scale_of('imagenet', row)}.yaml", f"rows/{row}.yaml")]
        config = load(read([*map(str, parts), "teachers.convformer.pretrained=false"]))
        folders.add(beside(load_children(config)["teachers", "convformer", "recipe"], config).output)
    assert len(folders) == 1


def test_the_student_starts_from_all_that_its_teacher_has_and_from_nothing_else() -> None:
    """Guideline 5: everything but the affine operators."""
    config = recipe("fashion_mnist_5k", "guideline5_with")
    assert config.student.init == "twin" and recipe("fashion_mnist_5k", "guideline5_without").student.init is None
    data = build.open_data(config, torch.device("cpu"), 0, 1)
    student = randomise(build.build_model(config.student, data, "student"), seed=1)
    teacher = randomise(build.build_model(config.teachers["twin"], data, "twin"), seed=2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    copied = weights.inherit(student, teacher)
    affine = {name for name in before if ".token_mixer.affine." in name}
    assert set(copied) == set(before) - affine == set(teacher.state_dict()) and len(affine) == 2 * 12
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name] if name in affine else teacher.state_dict()[name]), name
        assert name in affine or not torch.equal(value, before[name]), name


@pytest.mark.parametrize("variant", model.VARIANTS)
def test_a_variant_is_a_size_of_the_paper_and_half_of_it_at_64_px(variant: str) -> None:
    with torch.device("meta"):
        whole, named = (timm.create_model(name, **more) for name, more in (
            ("riformer", {"variant": variant}), (f"riformer_{variant}", {}),
        ))  # fmt: skip
        micro = timm.create_model("riformer_micro", variant=variant)
    shapes = {name: value.shape for name, value in named.state_dict().items()}
    assert shapes == {name: value.shape for name, value in whole.state_dict().items()}
    halves = [
        (info["num_chs"], len(stage.blocks)) for info, stage in zip(micro.feature_info, micro.stages, strict=True)
    ]
    assert halves == [
        (info["num_chs"] // 2, len(stage.blocks)) for info, stage in zip(named.feature_info, named.stages, strict=True)
    ]
    with pytest.raises(ValueError, match="variant of riformer_s12 is 's24'"):
        timm.create_model("riformer_s12", variant="s24")
    with pytest.raises(ValueError, match="variant of riformer is 's13'; expected one of 's12'"):
        timm.create_model("riformer", variant="s13")


def test_pretrained_poolformer_is_the_published_one_in_our_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _builder

    asked: list[str] = []
    monkeypatch.setattr(_builder, "load_pretrained", lambda net, **_: (asked.append("once"), randomise(net, seed=7))[0])
    theirs = randomise(timm.create_model("poolformer_s12"), seed=7)
    ours = timm.create_model("metaformer_pool", variant="s12", pretrained=True)
    expected = convert(theirs.state_dict())
    assert asked and all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours.eval().stages(ours.stem(images)), theirs.eval().stages(theirs.stem(images)))
    other = timm.create_model("metaformer_pool_s12", pretrained=True, num_classes=7).state_dict()
    assert other["head.weight"].shape[0] == 7 and torch.equal(other["stem.conv.weight"], expected["stem.conv.weight"])
    with pytest.raises(ValueError, match=r"images of 3 channels \(got in_chans=1\)"):
        timm.create_model("metaformer_pool", pretrained=True, in_chans=1)
    for name in ("metaformer_pool_micro", "riformer", "metaformer_id_s12"):
        with pytest.raises(ValueError, match="no weights are published"):
            timm.create_model(name, pretrained=True)


def test_the_readme_has_every_row_with_its_command() -> None:
    text = (HERE / "README.md").read_text()
    for row in ROWS:
        said = (HERE / "configs" / "rows" / f"{row}.yaml").read_text()
        title, paper = re.findall(r"^# (.*)\. Paper: ([0-9.]+)$", said, re.M)[0]
        assert f"| {title} | {paper} | `scales/{scale_of('imagenet', row)}.yaml rows/{row}.yaml` |" in text, row
    assert len(re.findall(r"rows/\w+\.yaml` \|", text)) == len(ROWS)
