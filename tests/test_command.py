"""The command kdlib as people start it: help, one-line errors, exit codes, and what its verbs print."""

from __future__ import annotations

import builtins
import json
import re
import runpy
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from jsonschema import Draft202012Validator
from PIL import Image
from rich.console import Console

import kdlib
import recipes.riformer.model  # noqa: F401  registers the models
from kdlib import cli, yaml12
from kdlib.cli.pairs import _batches
from kdlib.models import Found
from kdlib.recipe import json_schema
from kdlib.recipe.editor import MARK, SHIPPED
from kdlib.usage import usage


class Answer:
    """Exit code, and what was said on both streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Calls the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def ask(*arguments: str) -> Answer:
        capsys.readouterr()
        return Answer(cli.main(arguments), *capsys.readouterr())

    return ask


def test_help_names_every_verb_and_every_verb_has_an_example(ask) -> None:
    answer = ask("--help")
    assert answer.code == 0 and all(f"\n  {verb} " in answer.out for verb in cli.VERBS)
    files = {path.stem for path in (ROOT / "kdlib" / "cli").glob("*.py")} - {"__init__", "show", "options"}
    assert files == set(cli.VERBS)
    for verb in cli.VERBS:
        told = ask(verb, "--help")
        assert (
            told.code == 0 and f"  kdlib {verb}" in told.out and "From Python: " in told.out and "--debug" in told.out
        )
    assert ask().code == 2 and ask("--version").out.strip() == "0.1.0"


def test_help_of_a_recipe_is_as_wide_as_the_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 100, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = [line for line in usage(Path("default.yaml")).splitlines() if "data.root=~/images" not in line]
        assert max(map(len, lines)) <= min(columns, 110), columns
        assert "130 after Ctrl-C, 143 after SIGTERM" in " ".join(" ".join(lines).split())


def test_help_writes_a_default_as_a_config_must() -> None:
    assert "  adapter (linear)" in usage(Path("default.yaml"))
    shown = dict(re.findall(r"^  (\w+) \([^)]+\) \[(.+?)\]", usage(Path("default.yaml")), re.M))
    for key, default in {"until": 1.0, "start": 0, "min_lr": 1e-5, "epochs": 10}.items():
        told = yaml12.parse(shown[key])
        assert told == default and type(told) is type(default), key


def test_what_the_help_names_for_python_is_there_after_import_kdlib(ask) -> None:
    for verb in cli.VERBS:
        named = re.findall(
            r"kdlib(?:\.\w+)+", ask(verb, "--help").out.partition("From Python: ")[2].partition("\n\n")[0]
        )
        assert named, verb
        for name in named:
            assert callable(attrgetter(name.removeprefix("kdlib."))(kdlib)), name
    lazily = "import kdlib, sys; assert 'timm' not in sys.modules; kdlib.report.report; kdlib.models.find_model"
    subprocess.run([sys.executable, "-c", lazily], cwd=ROOT, timeout=300, check=True)
    assert {"doctor", "report", "fit"} <= set(dir(kdlib))
    with pytest.raises(AttributeError, match="has no attribute 'reprot'"):
        kdlib.reprot  # noqa: B018


@pytest.mark.parametrize("columns", [60, 100])
def test_help_is_as_wide_as_the_terminal(ask, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb in cli.VERBS:
        text = ask(verb, "--help").out
        prose = [line for line in text.splitlines() if not line.startswith(" ")]
        assert max(map(len, prose)) <= columns, verb
        assert re.search(r"\n\nFrom Python:\s+kdlib\.", text), verb
    assert "130 after Ctrl-C" in " ".join(ask("--help").out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspct"], "kdlib: no verb 'inspct' (known: inspect, "),
        (["--versoin"], "kdlib: unrecognized arguments: --versoin; did you mean --version?"),
        (["inspect"], "kdlib inspect: the following arguments are required: MODEL; see kdlib inspect --help"),
        (["inspect", "resnet18", "--dept", "2"], "kdlib inspect: unrecognized arguments: --dept 2; did you mean --dep"),
        (["inspect", "resnet18", "--depth", "two"], "kdlib inspect: argument --depth: invalid int value: 'two'"),
        (["export", "runs/a", "--to", "tflite"], "kdlib export: argument --to: invalid choice: 'tflite' (choose from "
         "'safetensors', 'onnx', 'torch-export', 'timm', 'hub'); see kdlib export --help"),
        (["inspect", "resnet18", "--depth", "0"], "--depth is at least 1, got 0"),
        (["inspect", ""], ": no timm model, no file and no folder"),
        (["inspect", "runs/nothing"], "runs/nothing: no such folder or file; name a finished run"),
        (["report", "runs/nothing"], "runs/nothing: no run (there is no such folder); name the folder of a run"),
        (["inspect", "resnet81"], "resnet81: no timm model, no file and no folder; did you mean 'resnet18'?"),
        (["inspect", "resnet18", "--import", "nowhere"], "--import nowhere: cannot be imported (No module named "),
        (["pairs", "resnet18", "resnet34", "--pattern", "layer9.*"], "pattern 'layer9.*' finds nothing at 'layer9'"),
        (["pairs", "resnet18", "resnet18", "--images", "no"], "--images: no folder no"),
        (["pairs", "resnet18", "resnet18", "--count", "3"], "--count: CKA needs at least 4 images, got 3"),
        (["pairs", "resnet18", "resnet18", "--out", "no/p.png"], "--out: no folder "),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_code_2(arguments: list[str], says: str, ask, tmp_path: Path) -> None:
    answer = ask(*arguments)
    assert answer.code == 2 and answer.err.startswith(says) and answer.err.count("\n") == 1, answer.err
    assert not list(tmp_path.iterdir())


def test_debug_shows_where_an_error_came_from_and_ctrl_c_is_130(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no timm model"):
        ask("inspect", "resnet81", "--debug")

    def stop(options: object) -> None:
        raise KeyboardInterrupt

    def full(options: object) -> None:
        raise OSError(28, "No space left on device", "x.png")

    from kdlib.cli import schema

    monkeypatch.setattr(schema, "run", stop)
    assert ask("schema").code == 130
    monkeypatch.setattr(schema, "run", full)
    answer = ask("schema")
    assert answer.code == 1 and answer.err == "x.png: No space left on device (--debug shows where)\n"


def test_inspect_prints_names_that_can_be_tapped(ask) -> None:
    answer = ask("inspect", "riformer_s12", "--pattern", "stages.*.blocks.*.token_mixer", "--image-size", "64")
    lines = answer.out.splitlines()
    assert answer.code == 0 and lines[0].split() == ["tap", "module", "returns", "layout", "parameters", "FLOPs"]
    assert lines[1].split() == ["stages.0.blocks.0.token_mixer", "Affine", "64×16×16", "NCHW", "128"]
    assert len(lines) == 1 + 12 + 2 and "11,921,832 parameters" in lines[-1]
    assert "\x1b" not in answer.out and ask("inspect", "resnet18", "--depth", "1", "--quiet").out == ""


def test_pairs_with_a_pattern_prints_the_plan_of_a_run(ask, tmp_path: Path) -> None:
    answer = ask(
        "pairs", "riformer_nano", "{name: metaformer_pool_nano, dims: [32, 64]}", "--pattern", "stages.*.blocks.-1"
    )
    rows = [line.split() for line in answer.out.splitlines()]
    assert rows[1] == [
        "pairs",
        "stages.0.blocks.1",
        "stages.0.blocks.1",
        "NCHW",
        "49×48",
        "→",
        "49×32",
        "Project",
        "1,536",
    ]
    assert len(rows) == 3 and not list(tmp_path.iterdir())


def test_pairs_asks_for_a_layout_that_shapes_leave_open_and_takes_it(ask) -> None:
    asked = ("pairs", "resnet18", "resnet18", "--pattern", "layer1.-1", "--image-size", "256")
    answer = ask(*asked)
    assert answer.code == 2 and "could be NCHW or NHWC; say which of STUDENT and TEACHER by --layout" in answer.err
    answer = ask(*asked, "--layout", "NCHW", "NCHW")
    assert answer.code == 0 and "NCHW    4096×64" in answer.out, answer.err


def test_pairs_leaves_out_what_a_model_does_not_call(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests")
    answer = ask("pairs", "test_pairs:Trained", "riformer_nano", "--image-size", "32", "--count", "8")
    assert "! test_pairs:Trained does not call aux.0 in eval mode; left out" in answer.out, answer.err
    assert "student: [layers.a, layers.b, layers.c]" in answer.out


def test_pairs_with_images_draws_the_likeness_and_suggests(ask, tmp_path: Path) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for i in range(9):
        pixels = torch.randint(0, 255, (30, 40, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "photos" / "deep" / f"{i}.png")
    answer = ask("pairs", "riformer_nano", "metaformer_id_nano", "--images", "photos", "--count", "8", "--out", "a.png")
    assert answer.code == 0, answer.err
    assert "CKA over 8 images of photos: 4 × 4 layers, drawn in a.png" in answer.out
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size[0] > 400 and len(drawn.convert("RGB").getcolors(1 << 24)) > 50
    assert "! random weights: riformer_nano, metaformer_id_nano; " in answer.out
    pasted = yaml12.parse(answer.out.split("# to paste")[1].partition("\n")[2])["terms"]["alike"]
    assert len(pasted["student"]) == 4 and pasted["teacher"][-1] == "teacher.stages.1.blocks.1"
    few = ask("pairs", "riformer_nano", "metaformer_id_nano", "--images", "photos", "--count", "20")
    assert few.code == 2 and "photos: holds 9 image files, 20 are asked for" in few.err
    (tmp_path / "photos" / "0.png").write_bytes(b"junk")
    broken = ask("pairs", "riformer_nano", "metaformer_id_nano", "--images", "photos", "--count", "8")
    assert broken.code == 2 and "photos/0.png: cannot be read as an image" in broken.err


@pytest.mark.parametrize("count", [4, 63, 1025])
def test_no_batch_of_pairs_is_too_small_for_cka(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,025 images in pieces of 33 left 2 to the last."""
    monkeypatch.setattr("kdlib.data.few.few_images", lambda _, count, size: torch.rand(count, 1, size, size))
    found = Found("net", torch.nn.Identity(), (1, 2, 2), (0.5,), (0.5,))
    sizes = [len(ours) for ours, _ in _batches(found, found, "photos", count)]
    assert sum(sizes) == count and min(sizes) >= min(count, 32)


def test_pairs_takes_the_embedded_images_by_default(ask, tmp_path: Path) -> None:
    answer = ask("pairs", "riformer_nano", "metaformer_id_nano", "--count", "16")
    assert answer.code == 0 and "16 images of fashion-mnist-5k" in answer.out and (tmp_path / "pairs.png").exists()


def test_the_schema_that_is_shipped_is_the_schema(ask) -> None:
    how = "python -m kdlib schema > s.json && mv s.json kdlib/recipe/schema.json"
    assert json.loads(SHIPPED.read_text()) == json.loads(json.dumps(json_schema())), how
    assert ask("schema").out == SHIPPED.read_text() and ROOT in SHIPPED.parents


CONFIGS = sorted((ROOT / "recipes").glob("*/configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_the_schema_and_obeys_it(path: Path) -> None:
    text = path.read_text()
    head, _, rest = text.partition("\n")
    assert head.startswith(MARK), f"python -m kdlib schema --into {path.relative_to(ROOT)}"
    assert (path.parent / head.removeprefix(MARK)).resolve() == SHIPPED and MARK not in rest
    wrong = Draft202012Validator(json.loads(SHIPPED.read_text())).iter_errors(yaml12.parse(text))
    assert [(error.json_path, error.message) for error in wrong] == []


def test_the_schema_knows_a_wrong_key_wherever_it_stands() -> None:
    checker = Draft202012Validator(json_schema())
    for wrong in (
        {"epoch": 3},
        {"student": {"name": "resnet18", "weights": 3}},
        {"terms": {"soft": {"loss": {"name": "soft_target", "temperatur": 2}}}},
        {"teachers": {"wide": {"name": "resnet18", "recipe": {"optimizer": {"lrr": 1}}}}},
        {"baseline": {"terms": {"label": {"los": "cross_entropy"}}}},
        {"data": {"augment": {"mixupp": 1.0}}},
    ):
        assert not checker.is_valid(wrong), wrong
    assert checker.is_valid({"terms": {"soft": None}, "baseline": None, "base": ["a.yaml", "b.yaml"]})


def test_a_config_is_marked_once_and_what_it_says_stays(ask, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    config = tmp_path / "deep" / "a.yaml"
    config.write_text("# mine\nepochs: 3\n")
    assert ask("schema", "--into", "deep").out == "1 of 1 files marked anew\n"
    first = config.read_text()
    assert first.endswith("\n# mine\nepochs: 3\n") and yaml12.parse(first) == {"epochs": 3}
    assert (config.parent / first.splitlines()[0].removeprefix(MARK)).resolve() == SHIPPED
    assert ask("schema", "--into", "deep/a.yaml").out == "0 of 1 files marked anew\n" and config.read_text() == first
    config.rename(tmp_path / "a.yaml")
    ask("schema", "--into", "a.yaml")
    assert (tmp_path / "a.yaml").read_text().count(MARK) == 1, "a moved config is marked anew"
    assert (
        ask("schema", "--into", "nowhere.yaml").err == "nowhere.yaml: No such file or directory (--debug shows where)\n"
    )
    assert ask("schema", "--into", "nowhere.yaml").code == 1 and ask("schema", "--into", "deep").code == 2


def test_the_command_starts_as_a_module_and_imports_a_recipe_from_the_working_directory() -> None:
    command = [
        sys.executable,
        "-m",
        "kdlib",
        "inspect",
        "gfnet_h_nano",
        "--import",
        "recipes.riformer.run",
        "--depth",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0 and "gfnet_h_nano: " in done.stdout, done.stderr


def test_a_notebook_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich would show each line as an HTML block of its own there, and each move of a bar as another line."""

    class ZMQInteractiveShell:
        """As rich recognises a notebook."""

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel does
    assert Console().is_jupyter, "rich no longer recognises a notebook like this"
    console = runpy.run_path(str(ROOT / "kdlib" / "progress.py"))["console"]
    assert not console.is_jupyter and not console.is_terminal
