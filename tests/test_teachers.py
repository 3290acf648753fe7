"""The teacher is the one that the config names: its file, its shape, its classes, what it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kdlib import launch
from kdlib.config import ConfigError, read
from kdlib.recipe import load
from kdlib.recipe.schema import Loss
from kdlib.recipe.weights import digest

RECIPE = """
student: {name: test_resnet}
teachers: {wide: {name: test_resnet, weights: wide.safetensors}}
terms: {soft: {loss: soft_target, teacher: wide}}
data: {limit: 64, batch_size: 16}
epochs: 1
trackers: []
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", in_chans=1, num_classes=10).state_dict(), "wide.safetensors")
    return tmp_path


def dry_run(*arguments: str) -> int:
    return launch.main(lambda recipe: None, Path("r.yaml"), ["r.yaml", "--dry-run", *arguments])


def changed(change: Any) -> None:
    state = load_file("wide.safetensors")
    change(state)
    save_file(state, "wide.safetensors")


def other_architecture() -> None:
    save_file(timm.create_model("test_vit", in_chans=1, num_classes=10).state_dict(), "wide.safetensors")


def nothing() -> None: ...


WRONG: dict[str, tuple[Any, list[str], str]] = {
    "another file": (nothing, ["teachers.wide.sha256=0123abcd"], "is not the file that sha256 names ("),
    "another file, whole": (nothing, [f"teachers.wide.sha256={'f' * 64}"], "is not the file that sha256 names ("),
    "no digest": (nothing, ["teachers.wide.sha256=xyz"], "teachers.wide.sha256: "),
    "another architecture": (other_architecture, [], "holds another model: "),
    "a tensor is missing": (lambda: changed(lambda s: s.pop("conv1.0.weight", s.popitem())), [], "are missing"),
    "a tensor too many": (lambda: changed(lambda s: s.update(more=torch.ones(1))), [], "1 are unknown (first 'more')"),
    "other classes in the file": (
        lambda: changed(lambda s: s.update({k: s[k][:7].clone() for k in ("fc.weight", "fc.bias")})), [],
        "fc.weight is (7, ",
    ),
    "other classes in the config": (
        lambda: changed(lambda s: s.update({k: s[k][:7].clone() for k in ("fc.weight", "fc.bias")})),
        ["teachers.wide.num_classes=7"], "teachers.wide.num_classes: the student and the data have 10 classes (got 7)",
    ),
    "a mean alone": (nothing, ["teachers.wide.mean=[0.5]"], "mean and std belong together"),
    "the mean of three channels": (
        nothing, ["teachers.wide.mean=[0.5,0.5,0.5]", "teachers.wide.std=[0.5,0.5,0.5]"], "need 1 numbers each"
    ),
    "numbers that are none": (
        lambda: changed(lambda s: s["fc.bias"].fill_(float("nan"))), [], "fc.bias holds NaN or infinity"
    ),
}  # fmt: skip


@pytest.mark.fault("teacher")
@pytest.mark.parametrize("what", WRONG)
def test_another_teacher_is_refused_by_name(what: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, arguments, says = WRONG[what]
    spoil()
    assert dry_run(*arguments) == 2
    said = capsys.readouterr().err
    assert says in said and "teachers.wide" in said and "Traceback" not in said and said.count("\n") == 1


def test_the_right_one_is_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run() == 0
    assert dry_run(f"teachers.wide.sha256={digest(place / 'wide.safetensors')}") == 0, capsys.readouterr().err


FOREIGN = ["teachers.wide={weights: null, pretrained: true}", "terms.label={loss: cross_entropy}"]


def test_features_of_a_teacher_of_other_classes_are_taken_beside_labels(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """test_resnet's weights tell 1000 classes apart; cross-entropy reads no teacher, so nobody reads their answer."""
    assert dry_run(*FOREIGN, "terms.soft={loss: feature_mse, student: layer4, teacher: wide.layer4}") == 0
    assert dry_run(*FOREIGN, "terms.soft={loss: feature_mse, student: layer4, teacher: null}") == 0
    capsys.readouterr()
    for teacher in ("wide", "null"):
        assert dry_run(*FOREIGN, f"terms.soft.teacher={teacher}") == 2
        assert "tell 1000 classes apart, the data have 10, so its answer would be noise" in capsys.readouterr().err


def test_a_loss_that_holds_one_against_labels_reads_no_teacher(place: Path) -> None:
    recipe = load(
        read(["r.yaml", "terms.soft={teacher: null, loss: {name: standardized, loss: {name: cross_entropy}}}"])
    )
    term = recipe.terms["soft"].model_copy(update={"teacher": None, "student": ["@output", "layer4"]})
    assert term.compared(["wide"]) == [("@output", "@labels"), ("layer4", "@labels")]
    term = term.model_copy(update={"loss": Loss(name="soft_target")})
    assert term.compared(["wide"]) == [("@output", "wide"), ("layer4", "wide.layer4")]
    alone = ["r.yaml", "teachers.wide=null", "terms.soft.teacher=null"]
    for held in ("cross_entropy", "{name: cross_entropy}"):
        assert load(read([*alone, f"terms.soft={{loss: {{name: standardized, loss: {held}}}}}"]))
        with pytest.raises(ConfigError, match="standardized reads the labels alone; leave teacher out"):
            load(read(["r.yaml", f"terms.soft.loss={{name: standardized, loss: {held}}}"]))


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ("{loss: soft_target}", "terms.soft.teacher: standardized needs a teacher, and teachers is empty"),
        ("{loss: sft_target}", "terms.soft.loss.loss.name: no loss 'sft_target'; did you mean 'soft_target'?"),
        ("{loss: cross_entropy, varint: code}", "terms.soft.loss.varint: unknown key; did you mean 'variant'?"),
        ("{loss: hard_label, variant: x}", "terms.soft.loss.variant: input should be 'code' or 'paper' (got 'x')"),
    ],
)
def test_what_is_wrong_with_a_held_loss_is_one_line(place: Path, held: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(read(["r.yaml", "teachers.wide=null", "terms.soft.teacher=null",
                   "terms.soft.loss.name=standardized", f"terms.soft.loss={held}"]))  # fmt: skip
    (line,) = caught.value.lines
    assert says in line


HERE = "{name: folder, mean: [0.4, 0.4, 0.4], std: [0.3, 0.3, 0.3]}"
OWN = "{name: folder, mean: [0.1, 0.2, 0.3], std: [2, 2, 2]}"
TOLD = {
    "imagenet": "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)", "own": "mean (0.1, 0.2, 0.3), std (2, 2, 2)",
    "as here": None, "gone": "teachers.wide.weights: the data of the run that made them cannot be opened",
    "not a run": "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)",
    "elsewhere": "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)",
    "of another program": "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)",
    "moved": "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)",
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_weights_of_a_run_get_images_as_the_run_had_them_and_others_as_timm_says(
    what: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        "own": OWN, "gone": "{name: torch/nowhere}", "imagenet": "{name: folder}",
        "of another program": "{dataset: cifar100}", "moved": "{name: wds/, root: /moved}",
    }.get(what, HERE)  # fmt: skip
    run = place / "runs" / "big"
    run.mkdir(parents=True)
    config = "- no: run" if what == "not a run" else f"student: {{name: test_resnet}}\ndata: {data}"
    (run / "config.yaml").write_text(config)
    file = run / ("downloaded.safetensors" if what == "elsewhere" else "student.safetensors")
    save_file(timm.create_model("test_resnet", num_classes=1000).state_dict(), file)
    code = dry_run(f"data={HERE}", f"teachers.wide.weights={file}")
    said = "".join(capsys.readouterr())
    told = TOLD[what]
    assert code == (2 if what == "gone" else 0), said
    assert "anew" not in said if told is None else told in said
