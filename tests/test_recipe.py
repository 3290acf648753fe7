"""What a recipe may say: each mistake is one line with its file, its key, its value and the next step."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import recipes.riformer.gfnet
import recipes.riformer.model  # noqa: F401  registers the models
from kdlib import data
from kdlib.config import ConfigError, Document, read
from kdlib.distiller import Distiller
from kdlib.losses import LOSSES, CrossEntropy
from kdlib.recipe import Recipe, build, json_schema, load, load_children, probe, weights
from kdlib.terms import Term
from kdlib.training.runfolder import resolved
from kdlib.yaml12 import dump, parse
from recipes.riformer.convert import convert
from tests.conftest import ROOT

CONFIGS = ROOT / "recipes" / "riformer" / "configs"
DEFAULT = str(CONFIGS / "default.yaml")
CPU = torch.device("cpu")


def recipe(*arguments: str) -> Recipe:
    return load(read([DEFAULT, *arguments]))


def wrong(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipe(*arguments)
    return caught.value.lines


# one line for each mistake


@pytest.mark.fault("config")
@pytest.mark.parametrize(
    ("argument", "line"),
    [
        # unknown names, with the nearest right one
        ("epoch=3", "epoch: unknown key; did you mean 'epochs'? (known: accumulate, baseline, "),
        ("student.name=riformer_nan0", "student.name: no model 'riformer_nan0'; did you mean 'riformer_nano'?"),
        ("teachers.wide.name=xyzxyz", "teachers.wide.name: no model 'xyzxyz'; timm.list_models() lists them"),
        ("terms.soft.loss=soft_targt", "terms.soft.loss.name: no loss 'soft_targt'; did you mean 'soft_target'?"),
        ("terms.soft.loss=zzzz", "terms.soft.loss.name: no loss 'zzzz'; known: attention_transfer, "),
        ("terms.soft.wieght=1", "terms.soft.wieght: unknown key; did you mean 'weight'? (known: adapter, "),
        ("terms.soft.slope.lst=1", "terms.soft.slope.lst: unknown key; did you mean 'last'? (known: first, last"),
        ("data.limt=1", "data.limt: unknown key; did you mean 'limit'?"),
        ("data.augment.mixp=1", "data.augment.mixp: unknown key; did you mean 'mixup'?"),
        ("optimizer.name=adamv", "optimizer.name: no optimizer 'adamv'; did you mean 'adam'?"),
        ("student.init=twn", "student.init: no teacher 'twn'; did you mean 'twin'? (known: wide, twin)"),
        ("terms.soft.teacher=wid", "terms.soft.teacher: no teacher 'wid'; did you mean 'wide'? (known: wide, twin)"),
        ("terms.soft.teacher=null", "terms.soft.teacher: say which teacher: wide, twin"),
        # arguments of losses and of the data
        ("terms.soft.loss.temprature=3", "terms.soft.loss.temprature: unknown key; did you mean 'temperature'?"),
        ("terms.soft.loss.temperature=-1", "terms.soft.loss.temperature: SoftTarget: temperature must be a positive"),
        ("terms.soft.loss.temperature=x", "terms.soft.loss.temperature: input should be a valid number"),
        ("terms.soft.loss.temperature=true", "terms.soft.loss.temperature: input should be a number, not a boolean"),
        ("terms.soft.loss=standardized", "terms.soft.loss.loss: is missing"),
        ("terms.soft.loss={name: standardized, loss: soft_targt}", "terms.soft.loss.loss.name: no loss 'soft_targt'"),
        (
            "terms.soft.loss={name: standardized, loss: {name: soft_target, temperature: -1}}",
            "terms.soft.loss.loss.temperature: SoftTarget: temperature must be a positive number",
        ),
        ("terms.soft.loss={name: crd, samples: 0}", "terms.soft.loss.samples: CRD: samples must be a positive number"),
        ("terms.soft.loss=3", "terms.soft.loss: input should be a mapping of keys to values (got 3)"),
        ("terms.x.loss={}", "terms.x.loss.name: is missing"),
        ("terms.sof.weight=1", "terms.sof.loss: is missing; did you mean 'soft'?"),
        ("teachers.wid.pretrained=true", "teachers.wid.name: is missing; did you mean 'wide'?"),
        ("terms.x.loss.name=null", "terms.x.loss.name: input should be a valid string (got None)"),
        ("data.augment.flip=3", "data.augment.flip: got 3.0, expected a probability from 0 to 1"),
        ("data.limit=many", "data.limit: input should be a valid integer (got 'many')"),
        ("data.seed=3", "data.seed: unknown key"),
        # kinds and ranges
        ("channels_last=no", "channels_last: input should be a valid boolean (write true or false, got 'no')"),
        ("channels_last=1", "channels_last: input should be a valid boolean (write true or false, got 1)"),
        ("compile=true", "compile: input should be a mapping of keys to values (got True)"),
        ("compile.mode=on", "compile.mode: input should be 'auto', 'off', 'default'"),
        ("seed=true", "seed: input should be a valid integer (got True)"),
        ("epochs=0", "epochs: input should be greater than 0 (got 0)"),
        ("epochs=1.5", "epochs: input should be a valid integer (got 1.5)"),
        ("epochs='3'", "epochs: input should be a valid integer (got '3')"),
        ("optimizer.lr=0", "optimizer.lr: input should be greater than 0 (got 0)"),
        ("optimizer.lr='.inf'", "optimizer.lr: input should be a valid number, unable to parse"),
        ("terms.soft.weight='inf'", "terms.soft.weight: input should be a finite number (got 'inf')"),
        ("terms.soft.weight=-1", "terms.soft.weight: input should be greater than or equal to 0 (got -1)"),
        ("terms.soft.until=1.5", "terms.soft.until: input should be an epoch (an int from 0) or a fraction of the run"),
        ("terms.soft.until=true", "terms.soft.until: input should be an epoch"),
        ("terms.soft.until=80/0", "terms.soft.until: input should be an epoch"),
        ("terms.soft.until=121/120", "terms.soft.until: input should be an epoch"),
        ("terms.block.student=[]", "terms.block.student: input should be a valid string (got []), or list should have"),
        ("terms.block.teacher=[twin, wid]", "terms.block.teacher: 2 for 1 of the student; list as many"),
        ("terms.soft.view=foo", "terms.soft.view: input should be 'logits', 'embedding', 'tokens', 'map' or 'raw'"),
        ("terms.block.layout=3", "terms.block.layout: input should be a valid string (got 3), or input should be a"),
        ("terms.block.layout.0.x=1", "terms.block.layout: input should be a valid string (got {"),
        ("precision=no", "precision: input should be 'none', 'bf16' or 'fp16' (got 'no')"),
        ("output=", "output: input should be the path of a file or folder (got None)"),
        ('output="a\\0b"', "output: input should be the path of a file or folder (got 'a\\x00b')"),
        ("student.weights=[1]", "student.weights: input should be the path of a file or folder (got [1])"),
        ("terms=3", "terms: input should be a mapping of keys to values (got 3)"),
        ("student=null", "student: input should be a mapping of keys to values (got None)"),
        ("teachers=[1]", "teachers: input should be a mapping of keys to values (got [1])"),
        # what does not go together
        ("teachers.wide.recipe=null", "teachers.wide: has no weights: give weights: a file, pretrained"),
        ("teachers.wide.mean=[0.5]", "teachers.wide: mean and std belong together; give both or neither"),
        ("terms.soft.start=30", "terms.soft.until: ends before it starts (start 30, until 1.0)"),
        ("terms.soft.slope={until: 0}", "terms.soft.slope.until: ends before the term starts (start 0, got 0)"),
        ("terms.soft={start: 15, until: 19}", "terms.soft: is on in no epoch of 10 (start 15, until 19); change start"),
        ("terms.soft={start: 0.31, until: 0.39}", "terms.soft: is on in no epoch of 10 (start 0.31, until 0.39)"),
        ("terms.soft={start: 9, slope: {first: 0, last: 1}}", "terms.soft: is on in no epoch of 10 (start 9, until 1"),
        ("terms.soft.teacher='@labels'", "terms.soft.teacher: soft_target needs a teacher, not '@labels'"),
        ("terms.soft.teacher=wide.", "terms.soft.teacher: ends in a dot; write 'wide' for its answer (got 'wide.')"),
        ("terms.soft.student='@x'", "terms.soft.student: the student's answer is '@output', and it has no other @"),
        ("terms.x={loss: cross_entropy, teacher: wide}", "terms.x.teacher: cross_entropy reads the labels alone"),
        ("terms={a b: {loss: cross_entropy}}", "terms.a b: a term's name is a plain word"),
        ("schedule.warmup_epochs=10", "schedule: warmup_epochs 10 and cooldown_epochs 0 leave nothing of 10 epochs"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1: input should be less than 1 (got 2)"),
        ("optimizer={name: sgd, momentum: 9}", "optimizer.momentum: input should be less than 1 (got 9)"),
        ("teacher_autocast=false", "teacher_autocast: false goes with precision: bf16 (got 'none'); set that, or true"),
        ("optimizer.momentum=0.9", "optimizer.momentum: adamw has no momentum; leave it out"),
        # doors to code and files that are not ours
        ("student.checkpoint_path=x.pth", "student.checkpoint_path: is not taken from a config; name a file"),
        ("student.pretrained_cfg={file: x.pth}", "student.pretrained_cfg: is not taken from a config"),
        ("student.name=os.system", "student.name: no model 'os.system'"),
        ("student.name=local-dir:/x", "student.name: no model 'local-dir:/x'"),
        ("terms.soft.loss={_target_: os.system}", "terms.soft.loss._target_: unknown key"),
        ("student.name='{0.__class__}'", "student.name: no model '{0.__class__}'"),
        # children are named by their place
        ("teachers.wide.recipe.optimizer.nam=x", "teachers.wide.recipe.optimizer.nam: unknown key; did you mean"),
        ("teachers.wide.recipe.terms.label.loss=dkdd", "teachers.wide.recipe.terms.label.loss.name: no loss 'dkdd'"),
        ("teachers.wide.recipe.student.name=resnet18", "teachers.wide.recipe.student: this run trains {'name': 'gfnet"),
        ("baseline.terms.label.loss=soft_target", "baseline.terms.label.teacher: soft_target needs a teacher, and"),
        ("baseline.epochs=no", "baseline.epochs: input should be a valid integer (got 'no')"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_where_and_what(argument: str, line: str) -> None:
    (found,) = wrong(argument)
    assert found.startswith(f"command line: {line}"), found


@pytest.mark.fault("config")
@pytest.mark.parametrize(
    ("loss", "mix", "line"),
    [
        ("crd", "mixup", "crd remembers each image by itself, and mixup mixes two; set data.augment.mixup=0"),
        ("dkd", "cutmix", "dkd needs one class an image, and cutmix mixes two; set data.augment.cutmix=0"),
        (
            "{name: standardized, loss: {name: learnable_temperature, loss: nkd}}",
            "mixup",
            "nkd needs one class an image, and mixup mixes two; set data.augment.mixup=0",
        ),
    ],
)
def test_losses_that_cannot_take_mixed_images(loss: str, mix: str, line: str) -> None:
    assert wrong(f"terms.soft.loss={loss}", f"data.augment.{mix}=0.2")[0].endswith(f": terms.soft.loss: {line}")
    assert recipe(f"terms.soft.loss={loss}", f"data.augment.{mix}=0")
    assert recipe("terms.soft.loss=cross_entropy", "terms.soft.teacher=null", f"data.augment.{mix}=0.2")


def test_a_teacher_may_not_be_called_as_a_method_of_modules_and_a_term_may() -> None:
    lines = wrong("teachers.values={name: resnet10t, pretrained: true}", "terms.soft.teacher=values")
    assert lines == [
        "command line: teachers.values: a teacher cannot be called 'values', as a method of modules is; rename it"
    ]
    assert "type" in recipe("terms.type={loss: cross_entropy}").terms


def test_what_is_left_out_is_told_and_terms_cannot_be_none() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Document())
    assert caught.value.lines == ["config: student: is missing", "config: terms: is missing"]
    assert wrong(*(f"terms.{name}=null" for name in ("soft", "block", "mixer", "relation"))) == [
        "command line: terms: there are no terms; give at least one, e.g. {label: {loss: cross_entropy}}"
    ]


def test_all_mistakes_of_a_config_are_told_at_once() -> None:
    lines = wrong("epoch=3", "seed=-1", "optimizer.lr=x")
    assert [line.split(": ")[1] for line in lines] == ["optimizer.lr", "seed", "epoch"]
    lines = wrong("terms.soft.teacher=wid", "terms.soft.loss.temperature=-1")
    assert [line.split(": ")[1] for line in lines] == ["terms.soft.loss.temperature", "terms.soft.teacher"]


def test_a_mistake_in_a_base_is_told_with_the_base(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("optimizer: {lr: -1}\n")
    (tmp_path / "top.yaml").write_text(f"base: [{DEFAULT}, part.yaml]\nseed: 3\n")
    with pytest.raises(ConfigError) as caught:
        load(read([str(tmp_path / "top.yaml")]))
    assert caught.value.lines[0].startswith(f"{tmp_path / 'part.yaml'}: optimizer.lr: ")


@pytest.mark.fault("hostile config")
def test_hostile_names_neither_break_nor_hide_the_line() -> None:
    (line,) = _lines({"x\ny\x1b[2J": 1})
    assert line.startswith("evil: x\\ny\\x1b[2J: unknown key")
    (line,) = _lines({"k" * 5000: 1})
    assert len(line) < 400


def _lines(data: dict[str, Any]) -> list[str]:
    document = read([DEFAULT])
    document.overlay(data, "evil")
    with pytest.raises(ConfigError) as caught:
        load(document)
    return caught.value.lines


# what a good one becomes


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_a_recipe_and_printed_whole_it_is_the_same_one(path: Path, tmp_path: Path) -> None:
    first = load(read([str(path), "terms.soft.until=1", "terms.block.until=1.0", "data.limit=256"]))
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump(resolved(first)))
    second = load(read([str(printed)]))
    assert json.dumps(resolved(first)) == json.dumps(resolved(second))
    assert json.dumps([resolved(r) for r in load_children(first).values()]) == json.dumps(
        [resolved(r) for r in load_children(second).values()]
    )


def test_children_take_over_what_they_share_and_the_baseline_how_it_is_trained() -> None:
    parent = recipe("seed=3", "data.limit=256", "epochs=7", "student.drop_rate=0.1", "optimizer.lr=0.02")
    found = load_children(parent)
    assert list(found) == [("teachers", "wide", "recipe"), ("teachers", "twin", "recipe"), ("baseline",)]
    wide, _, baseline = found.values()
    assert (wide.seed, wide.data, wide.student.name) == (3, parent.data, parent.teachers["wide"].name)
    assert (baseline.epochs, baseline.student.arguments, baseline.teachers) == (7, {"drop_rate": 0.1}, {})
    apart = load_children(recipe("seed=3", "compile.teacher=false"))
    assert all(child.compile.teacher for child in apart.values()), "they have no teachers, and are the same runs"
    assert not load_children(recipe("baseline=null", "teachers.wide.weights=x.pth", "teachers.twin.weights=x.pth"))


def test_null_takes_away_a_term_and_a_teacher() -> None:
    found = recipe("terms.soft=null", "teachers.wide=null", "terms.block.until=1.0")
    assert list(found.terms) == ["block", "mixer", "relation"] and list(found.teachers) == ["twin"]


def test_a_list_of_taps_is_paired_entry_by_entry() -> None:
    taps = ["stages.*.blocks.-1", "stages.0.blocks.0"]
    found = recipe(f"terms.block.student={taps}", f"terms.block.teacher={[f'twin.{tap}' for tap in taps]}")
    models = {name: nn.ModuleDict({"stages": nn.ModuleList(_stage() for _ in range(2))}) for name in ("wide", "twin")}
    (block,) = [t for t in build.build_terms(found, models["twin"], nn.ModuleDict(models), 1) if t.name == "block"]
    names = ["stages.0.blocks.1", "stages.1.blocks.1", "stages.0.blocks.0"]
    assert [tuple(pair) for pair in block.pairs] == [(name, f"twin.{name}") for name in names]


def _stage() -> nn.Module:
    blocks = [nn.ModuleDict({"token_mixer": nn.Identity()}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def test_a_moment_may_be_a_quotient_as_papers_write_it() -> None:
    term = recipe("epochs=120", "terms.block.start=10/120", "terms.block.until=80/120").terms["block"]
    assert (term.start, term.until) == (10 / 120, 80 / 120)


def _weights(*arguments: str) -> list[float]:
    """Of the term `soft` in each of 8 epochs."""
    models = nn.ModuleDict({"wide": nn.Identity()})
    spec = recipe("epochs=8", "terms.soft.weight=2", "student.init=null", "terms.label.loss=cross_entropy",
                  *NO_FEATURES, *arguments)  # fmt: skip
    (soft,) = (t for t in build.build_terms(spec, nn.Identity(), models, 1) if t.name == "soft")
    return [soft.weight_at(epoch, 8) for epoch in range(8)]


def test_a_term_is_off_outside_of_its_window_whatever_its_slope() -> None:
    window = ["terms.soft.start=2", "terms.soft.until=6"]
    assert _weights(*window) == [0, 0, 2, 2, 2, 2, 0, 0]
    assert _weights(*window, "terms.soft.slope={first: 1, last: 0}") == [0, 0, 2, 1.5, 1, 0.5, 0, 0]
    assert _weights(*window, "terms.soft.slope={first: 0.5, last: 1}") == [0, 0, 1, 1.25, 1.5, 1.75, 0, 0]
    assert _weights(*window, "terms.soft.slope={first: 0.5, last: 1, until: 4}") == [0, 0, 1, 1.5, 2, 2, 0, 0]
    assert _weights("terms.soft.slope={first: 0, last: 1, until: 0.5}") == [0, 0.5, 1, 1.5, 2, 2, 2, 2]
    assert _weights("terms.soft.slope={first: 1, last: 0.5, until: 4}") == [2, 1.75, 1.5, 1.25, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "dark"),
    [
        (["terms.soft.until=7"], "epochs 7 to 9"),
        (["terms.soft.until=0.5", "terms.label={loss: cross_entropy, start: 6}"], "epoch 5"),
        (["terms.soft.start=1", "terms.soft.until=3", "terms.label={loss: cross_entropy, start: 4, until: 9}"],
         "epoch 0, epoch 3, epoch 9"),
        (["terms.soft.slope={first: 0, last: 1}"], "epoch 0"),
        (["terms.soft.slope={first: 1, last: 0, until: 4}"], "epochs 4 to 9"),
        (["terms.soft.weight=0"], "epochs 0 to 9"),
        (["epochs=1000000000", "terms.soft.until=0.5"], "epochs 500000000 to 999999999"),
    ],
)  # fmt: skip
def test_an_epoch_in_which_no_term_is_on_is_told_beforehand(arguments: list[str], dark: str) -> None:
    only = ["epochs=10", "student.init=null", "baseline=null", *NO_FEATURES]
    (line,) = wrong(*only, *arguments)
    assert f": terms: none is on in {dark} of " in line, line
    assert recipe(*only, *arguments, "terms.always.loss=cross_entropy")


def test_a_term_of_one_epoch_is_on_and_one_of_weight_0_need_not_be() -> None:
    for one in ("{start: 9, until: 10}", "{start: 0.31, until: 0.41}", "{start: 8, slope: {first: 0, last: 1}}"):
        assert recipe("epochs=10", "terms.always.loss=cross_entropy", f"terms.soft={one}")
    assert recipe("terms.always.loss=cross_entropy", "terms.soft={weight: 0, start: 15, until: 19}")


def test_a_teacher_that_nobody_reads_is_left_out() -> None:
    assert list(recipe("terms.soft=null", "terms.block.until=1.0").teachers) == ["twin"], "no term reads wide"
    assert list(recipe("terms.block=null", "terms.mixer=null", "terms.relation=null").teachers) == ["wide", "twin"]
    alone = recipe("terms={soft: null, block: null, mixer: null, relation: null, label: {loss: cross_entropy}}")
    assert list(alone.teachers) == ["twin"], "the student starts from it"
    one = recipe("teachers.wide=null", "terms.soft={teacher: null}", "student.init=null", *NO_FEATURES)
    assert list(one.teachers) == ["twin"], "the only one need not be named"


NO_FEATURES = [f"terms.{name}=null" for name in ("block", "mixer", "relation")]


# the schema for editors


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value obeys a JSON schema; knows the words that ours uses, and no other."""
    known = {"$ref", "$defs", "$schema", "title", "description", "default", "type", "enum", "const", "anyOf", "items"}
    known |= {"properties", "additionalProperties", "required", "minimum", "exclusiveMinimum", "prefixItems"}
    known |= {"minItems", "maxItems", "format", "exclusiveMaximum", "pattern"}
    assert set(schema) <= known, set(schema) - known
    if schema.get("$ref") == "#":
        return fits(value, root, root)
    if "$ref" in schema:
        return fits(value, root["$defs"][re.fullmatch(r"#/\$defs/(\w+)", schema["$ref"])[1]], root)  # type: ignore[index]
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good = {None: True, "integer": number and isinstance(value, int), "number": number}
    checks = [
        good[kind] if kind in good else isinstance(value, types[kind]),
        "enum" not in schema or value in schema["enum"],
        "const" not in schema or value == schema["const"],
        "pattern" not in schema or not isinstance(value, str) or re.search(schema["pattern"], value) is not None,
        "anyOf" not in schema or any(fits(value, option, root) for option in schema["anyOf"]),
        not number or (value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", value - 1)),
    ]
    if isinstance(value, dict):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, inner in value.items():
            allowed = properties.get(key, more if isinstance(more, dict) else {})
            checks.append((key in properties or more is not False) and fits(inner, allowed, root))
        checks.append(set(schema.get("required", ())) <= set(value))
    if isinstance(value, list):
        places = schema.get("prefixItems", [schema.get("items", {})] * len(value))
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
        checks += [fits(inner, place, root) for inner, place in zip(value, places, strict=False)]
    return all(checks)


def test_the_schema_knows_every_config_and_every_part_of_one() -> None:
    schema = json.loads(json.dumps(json_schema()))
    for path in CONFIGS.rglob("*.yaml"):
        assert fits(parse(path.read_text()), schema, schema), path
    assert fits(resolved(recipe()), schema, schema)


@pytest.mark.parametrize(
    "text",
    [
        "epoch: 3",
        "epochs: 0",
        "epochs: '3'",
        "seed: true",
        "compile: no",
        "compile: {mode: no}",
        "precision: no",
        "terms: {a: {loss: {name: soft_target, temprature: 1}}}",
        "terms: {a: {loss: soft_targt}}",
        "terms: {a: {loss: {name: soft_target, temperature: x}}}",
        "terms: {a: {until: x}}",
        "terms: 3",
        "data: {limt: 3}",
        "data: {augment: {flp: 1}}",
        "optimizer: {lr: 0}",
        "base: 3",
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(text: str) -> None:
    schema = json_schema()
    assert not fits(parse(text), schema, schema)


def test_the_schema_explains_every_argument_of_the_data() -> None:
    schema = json_schema()
    for key, field in schema["properties"]["data"]["properties"].items():
        assert len(field["description"]) > 10, key
    assert {option["properties"]["name"]["const"] for option in schema["$defs"]["Loss"]["anyOf"][1:]} == set(LOSSES)


# models and weights


@pytest.fixture(scope="module")
def images() -> data.Data:
    return data.load(limit=64, batch_size=8)


def test_models_get_the_classes_and_channels_of_the_data(images: data.Data) -> None:
    student = build.build_model(recipe().student, images, "student")
    assert probe.answer(student, torch.zeros(2, 1, 28, 28), "student").shape == (2, 10)
    assert student.training


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "student.num_clases=3",
            "student.num_clases: riformer_nano takes no such argument; did you mean 'num_classes'?",
        ),
        (
            "student={name: riformer_nano, drop_rate: 0.1, drop_rat: 0.1}",
            "student.drop_rat: riformer_nano takes no such argument; did you mean 'drop_rate'?",
        ),
        ("student.weigths=x", "student.weigths: riformer_nano takes no such argument; did you mean 'weights'?"),
        ("student.depths=3", "student: riformer_nano cannot be built from {"),
        ("student.token_mixer=conv", "student: riformer_nano cannot be built from {"),
        ("student.pretrained=true", "student: riformer_nano cannot be built from {"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(argument: str, line: str, images: data.Data) -> None:
    with pytest.raises(ConfigError) as caught:
        build.build_model(recipe(argument).student, images, "student")
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


class Evil:
    mark = ""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.mark),))


def write_weights(kind: str, path: Path) -> None:
    """A file that is not the weights of ``nn.Linear(2, 3)``."""
    good = nn.Linear(2, 3).state_dict()
    content: dict[str, Any] = {
        "other names": {"a.weight": good["weight"], "bias": good["bias"]},
        "other shapes": nn.Linear(4, 3).state_dict(),
        "a number": 3,
        "a list": [good["weight"]],
        "an epoch beside": {**good, "epoch": 3},
        "numbers as names": {0: good["weight"]},
        "not a number": {**good, "bias": torch.full((3,), float("nan"))},
        "a model": nn.Linear(2, 3),
        "code": {**good, "evil": Evil()},
    }
    if kind in content:
        torch.save(content[kind], path)
    elif kind == "half a file":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "half a safetensors":
        save_file(good, path)
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "a huge header":
        path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    elif kind == "overlapping tensors":
        one = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
        header = json.dumps({"weight": one, "bias": one}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    elif kind == "a text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "an archive that leads away":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../ran", "x")
            archive.writestr("archive/data.pkl", pickle.dumps(Evil()))


def test_a_finished_runs_folder_is_told_its_file(tmp_path: Path) -> None:
    (tmp_path / "student.safetensors").touch()
    with pytest.raises(ConfigError, match=r"\(it is a folder; name the file, .*student\.safetensors\)"):
        weights.read_weights(tmp_path, "teachers.big.weights")


@pytest.mark.fault("hostile weights")
@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("nothing", "w.pth", "no file "),
        ("a folder", "w.pth", "(it is a folder)"),
        ("empty", "w.pth", "is corrupt"),
        ("empty", "w.safetensors", "is corrupt"),
        ("a text", "w.pth", "is corrupt"),
        ("a text", "w.safetensors", "is corrupt"),
        ("half a file", "w.pth", "is corrupt"),
        ("half a safetensors", "w.safetensors", "is corrupt"),
        ("a huge header", "w.safetensors", "is corrupt"),
        ("overlapping tensors", "w.safetensors", "is corrupt"),
        ("other names", "w.pth", "holds another model: 1 of 2 tensors are missing (first 'weight'), 1 are unknown"),
        ("other shapes", "w.pth", "holds another model: weight is (3, 4), the model's is (3, 2); choose the model"),
        ("a number", "w.pth", "holds no state dict"),
        ("a list", "w.pth", "holds no state dict"),
        ("an epoch beside", "w.pth", "holds no state dict (names to tensors) but 'weight, bias, epoch'; save"),
        ("numbers as names", "w.pth", "holds no state dict"),
        ("not a number", "w.pth", "bias holds NaN or infinity"),
        (
            "a model",
            "w.pth",
            "Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed global by def",
        ),
        ("a link to a device", "w.pth", "no file "),
        ("a link to a device", "w.safetensors", "no file "),
        ("an archive that leads away", "w.pth", "is corrupt, or holds more than tensors"),
        ("code", "w.pth", "holds more than tensors"),
        ("code", "w.safetensors", "is corrupt"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_and_run_no_code(
    kind: str, name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mark = tmp_path / name, tmp_path / "ran"
    monkeypatch.setattr(Evil, "mark", str(mark))
    write_weights(kind, path)
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(ConfigError) as caught:
        weights.load_weights(model, path, "student.weights")
    (line,) = caught.value.lines
    assert line.startswith("student.weights: ") and str(path) in line and says in line and line.isprintable()
    assert not mark.exists() and not (tmp_path.parent / "ran").exists() and torch.equal(model.weight, before)


def test_weights_may_be_wrapped_and_may_need_converting(tmp_path: Path) -> None:
    expected = nn.Linear(2, 3)
    state = expected.state_dict()
    told = [{"epoch": 3, entry: state} for entry in ("state_dict", "model", "model_state_dict", "net")]
    wrapped = [{"module." + name: value for name, value in state.items()}]  # of DistributedDataParallel
    wrapped += [{"_orig_mod." + name: value for name, value in wrapped[0].items()}]  # compiled besides
    for number, content in enumerate([*told, *wrapped, {"state_dict": wrapped[0], "optimizer": {}}]):
        torch.save(content, tmp_path / f"{number}.pth")
        model = nn.Linear(2, 3)
        weights.load_weights(model, tmp_path / f"{number}.pth", "w")
        assert torch.equal(model.weight, expected.weight)
    torch.save({"a": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(ConfigError, match=r"^w: .*unknown checkpoint of 1 tensors[^\n]*$"):
        weights.load_weights(nn.Linear(2, 3), tmp_path / "foreign.pth", "w", convert)


def test_the_student_inherits_what_has_the_same_name_and_shape(images: data.Data) -> None:
    built = recipe("teachers.twin.weights=unused.pth")
    student = build.build_model(built.student, images, "student")
    twin = build.build_model(built.teachers["twin"], images, "twin")
    copied = weights.inherit(student, twin)
    state = student.state_dict()
    assert len(copied) == 48 and all(torch.equal(state[name], twin.state_dict()[name]) for name in copied)
    assert all("token_mixer" in name for name in set(state) - set(copied))


# the optimizer and its learning rate


def test_norms_and_biases_are_not_decayed_and_the_rate_warms_up_cosines_and_cools_down() -> None:
    spec = recipe("epochs=4", "schedule={warmup_epochs: 1, cooldown_epochs: 1, min_lr: 1e-4, warmup_lr: 1e-5}")
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    optimizer = build.build_optimizer(spec.optimizer, model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.05, 0, 0, 0]
    schedule = build.build_scheduler(spec, optimizer, 10)
    rates = []
    for step in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    assert rates[0] == pytest.approx(1e-5) and rates[5] == pytest.approx((1e-5 + 8e-3) / 2, rel=0.02)
    # timm's cosine counts from step 0, so it takes over from the warm-up below the top
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) <= 8e-3 and rates[30:40] == pytest.approx([1e-4] * 10)


def test_nothing_of_a_riformer_but_its_products_is_decayed() -> None:
    student = timm.create_model("riformer_nano", num_classes=10, in_chans=1)
    distiller = Distiller(student, [Term("label", CrossEntropy())])
    optimizer = build.build_optimizer(recipe().optimizer, distiller)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, p in student.named_parameters() if decay[id(p)]}
    products = ("stem.conv", "downsample.conv", "mlp.fc1", "mlp.fc2", "head")
    assert decayed == {
        name for name, _ in student.named_parameters() if name.endswith(tuple(f"{m}.weight" for m in products))
    }
    assert all(any(part in name for name in decayed) for part in products)


@pytest.mark.parametrize("name", ["sgd", "adam", "lamb", "lion"])
def test_usual_optimizers_are_built(name: str) -> None:
    assert build.build_optimizer(recipe(f"optimizer.name={name}").optimizer, nn.Linear(2, 2))


def test_on_a_gpu_alone_the_optimizer_is_the_fused_one_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has a fused one for a CPU, too, which lets the test build it."""
    model, spec = nn.Linear(2, 2), recipe("optimizer.name=adamw").optimizer
    assert not build.build_optimizer(spec, model).defaults["fused"]
    monkeypatch.setattr(nn.Parameter, "is_cuda", property(lambda p: p.ndim == 2), raising=False)
    assert not build.build_optimizer(spec, model).defaults["fused"], "a part of the model is elsewhere"
    monkeypatch.setattr(nn.Parameter, "is_cuda", property(lambda p: True), raising=False)
    assert build.build_optimizer(spec, model).defaults["fused"]
    assert "fused" not in build.build_optimizer(recipe("optimizer.name=lamb").optimizer, model).defaults


def test_a_loss_may_hold_another() -> None:
    spec = recipe("terms.soft.loss={name: standardized, loss: {name: dkd, beta: 2.0}}").terms["soft"].loss
    loss = spec.build()
    assert type(loss).__name__ == "Standardized" and loss.against == ("teacher", "labels")
    assert spec.whole == {"name": "standardized", "loss": {"name": "dkd", "beta": 2.0}}
