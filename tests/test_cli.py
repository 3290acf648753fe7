"""RIFormer's run.py as people start it: what it answers, and that bad input is one line, exit code 2 and no folder."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kdlib import launch, progress
from kdlib.config import read
from kdlib.recipe import Recipe, load
from recipes.riformer import run as riformer
from tests.conftest import ROOT
from tests.test_runs import make_images

SCRIPT = ROOT / "recipes" / "riformer" / "run.py"
DEFAULT = SCRIPT.parent / "configs" / "default.yaml"
CHILDREN = ("teachers.wide.recipe", "teachers.twin.recipe")
TINY = ["data.limit=256", "data.batch_size=32", "epochs=1", "threads=1", "schedule.warmup_epochs=0"]
TINY += [f"{child}.epochs=1" for child in CHILDREN]
TINY += [f"{child}.schedule.warmup_epochs=0" for child in (*CHILDREN, "baseline")]


class Answer:
    """Exit code, and what was said on both streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Calls run.py's main in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])

    def ask(*arguments: str, body=riformer.main) -> Answer:
        capsys.readouterr()
        code = launch.main(body, DEFAULT, arguments)
        return Answer(code, *capsys.readouterr())

    return ask


def start(*arguments: str, cwd: Path, script: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [sys.executable, *(script or [str(SCRIPT)]), *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


# what it answers without training


def test_help_names_every_key_and_every_loss_within_the_width_of_a_screen(ask) -> None:
    answer = ask("--help", "anything=else", "nowhere.yaml")
    assert answer.code == 0 and not answer.err
    words = set(answer.out.replace(",", " ").split())
    assert set(Recipe.model_fields) <= words
    assert {"temperature", "soft_target", "riformer"} & words == {"soft_target"}
    assert {"usage:", "teachers.NAME:", "terms.NAME:", "data.augment:", "mixup", "batch_size", "lr"} <= words
    assert max(map(len, answer.out.splitlines())) <= 112
    assert "  epochs (integer) [10]\n" in answer.out or "  epochs (integer) [10] " in answer.out
    assert ask("-h").out == answer.out


def test_the_schema_is_json(ask) -> None:
    answer = ask("--schema")
    assert answer.code == 0 and json.loads(answer.out)["properties"]["epochs"]["default"] == 10


def test_a_printed_config_gives_the_same_run(ask, tmp_path: Path) -> None:
    first = ask(*TINY, "terms.soft.until=1", "output=~/x", "--print-config")
    (tmp_path / "printed.yaml").write_text(first.out)
    second = ask("printed.yaml", "--print-config")
    assert first.code == second.code == 0 and first.out == second.out
    assert "weight_decay: 0.05" in first.out, "defaults are printed too"
    assert load(read([str(tmp_path / "printed.yaml")])) == load(
        read([str(DEFAULT), *TINY, "terms.soft.until=1", "output=~/x"])
    )


def test_the_recipe_that_the_body_gets_is_the_one_that_was_said(ask, tmp_path: Path) -> None:
    seen: list[Recipe] = []
    (tmp_path / "a=b.yaml").write_text(f"base: {DEFAULT}\nseed: 3\n")
    assert ask("./a=b.yaml", "epochs=4", body=seen.append).code == 0
    assert ask(body=seen.append).code == 0
    assert [(recipe.seed, recipe.epochs) for recipe in seen] == [(3, 4), (0, 10)]


# bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["epoch=3"], "command line: epoch: unknown key; did you mean 'epochs'?"),
        (["--epochs=3"], "command line: unknown option --epochs=3"),
        (["epochs", "3"], "epochs: cannot be read (No such file or directory); a CONFIG is a YAML file"),
        (["nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory)"),
        (["terms.soft.loss=soft_targt"], "command line: terms.soft.loss.name: no loss 'soft_targt'; did you mean"),
        (["student.name=riformer_nan0"], "command line: student.name: no model 'riformer_nan0'; did you mean"),
        (["student.num_clases=3"], "command line: student.num_clases: riformer_nano takes no such argument; did you"),
        (["teachers.wide.num_classes=7"], "command line: teachers.wide.num_classes: the student and the data have 10"),
        (["terms.mixer.student=stages.*.mixer"], "command line: terms.mixer: pattern 'stages.*.mixer' finds nothing"),
        (["student.weights=no.pth"], "command line: student.weights: no file no.pth"),
        (["student.weights=evil.pth"], "command line: student.weights: evil.pth is corrupt, or holds more"),
        (["data.name=fashion"], "command line: data: unknown data set 'fashion'; did you mean 'fashion-mnist'"),
        (["data={name: folder, root: no}"], "command line: data: no: no such folder; root= must hold"),
        (["data={name: fashion-mnist, root: bad}"], "command line: data: "),
        (["baseline.data.limit=7"], "command line: baseline.data: batch_size: 32 on 1 processes makes 32 images"),
        (["output=evil.pth"], "command line: output: evil.pth is a file; name a folder"),
        (["output=evil.pth/r"], "command line: output: evil.pth/r cannot be made"),
        (["output=/proc/nothing/r"], "command line: output: /proc/nothing/"),
        (["output=bad"], "command line: output: bad is not empty and holds no run; choose another output=…"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[str], says: str, ask, tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train-images-idx3-ubyte").write_bytes(b"junk")
    before = sorted(tmp_path.rglob("*"))
    defaults = [] if any(argument.endswith(".yaml") for argument in arguments) else TINY
    answer = ask(*defaults, "output=runs/r", *arguments)
    assert answer.code == 2 and answer.err.startswith(says) and answer.err.count("\n") == 1, answer.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_that_is_none_of_the_config_has_its_own_code_and_debug_shows_it(ask) -> None:
    def full(recipe: Recipe) -> None:
        raise OSError(28, "No space left on device", "runs/r")

    def broken(recipe: Recipe) -> None:
        raise ValueError("two\nlines")

    def bug(recipe: Recipe) -> None:
        raise KeyError("bug")

    def stop(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    answer = ask(body=full)
    assert answer.code == 1 and "runs/r: No space left on device" in answer.err and answer.err.count("\n") == 1
    answer = ask(body=broken)
    assert answer.code == 2 and answer.err == "two lines (--debug shows where)\n"
    with pytest.raises(ValueError, match="two"):
        ask("--debug", body=broken)
    with pytest.raises(KeyError):  # a mistake of ours keeps its traceback
        ask(body=bug)
    answer = ask("seed=3", body=stop)
    assert answer.code == 130 and answer.out.rstrip().endswith("To go on: accelerate launch run.py seed=3")


def test_quiet_says_nothing_but_errors(ask) -> None:
    from kdlib.progress import bar, say

    def chatty(recipe: Recipe) -> None:
        say("a line")
        with bar("train", 2) as progress:
            progress.advance()

    assert "a line" in ask(body=chatty).out
    answer = ask("--quiet", body=chatty)
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    assert ask("--quiet", "epoch=3").err.startswith("command line: epoch: unknown key")
    assert "a line" in ask(body=chatty).out, "and the next one speaks again"


def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for term, plain in (("dumb", True), ("xterm", False)):
        file = io.StringIO()
        console = Console(force_terminal=True, _environ={"TERM": term}, file=file, width=60)
        monkeypatch.setattr(progress, "console", console)
        with progress.bar("train", 2) as bar:
            bar.advance()
            bar.advance()
        assert (file.getvalue() == "train: 2/2\n") is plain and "2/2" in file.getvalue(), term
        assert plain or "0:00:0" in file.getvalue(), "at its end a bar tells how long it took"


def test_plain_lines_do_not_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=60))
    monkeypatch.setattr(progress, "EVERY", -1.0)
    with progress.bar("train", 2) as bar:
        bar.advance()
        bar.advance()
    assert file.getvalue() == "train: 1/2\ntrain: 2/2\n"


# processes of their own


def test_a_process_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = start(*TINY, "output=r", "teachers.wide.num_classes=7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("command line: teachers.wide.num_classes: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
from kdlib import launch
from kdlib.training import checkpoint
from recipes.riformer import run
save = checkpoint.save
def save_and_die(folder, step, *rest):
    save(folder, step, *rest)
    if "runs/r/" in str(folder) and step:
        os.kill(os.getpid(), 9)
checkpoint.save = save_and_die
sys.exit(launch.main(run.main, run.HERE / "configs" / "default.yaml"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_killed_process_goes_on_with_the_same_command_and_a_third_call_trains_nothing(ask, tmp_path: Path) -> None:
    data = f"{{name: folder, root: '{make_images(tmp_path / 'images')}', image_size: 28, workers: 0, batch_size: 16}}"
    command = [*TINY[2:], f"data={data}", "epochs=2", "output=runs/r"]
    (tmp_path / "killed.py").write_text(KILLED.format(root=str(ROOT)))
    run = tmp_path / "runs" / "r"

    killed = start(*command, cwd=tmp_path, script=["killed.py"])
    assert killed.returncode == -9 and not (run / "summary.json").exists(), killed.stderr
    again = start(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "student: goes on after epoch 1 of 2" in again.stdout and again.stdout.count("finished before") == 3
    made = {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "checkpoints", ".lock", "model_card.md"}
    made |= {f"student{which}.safetensors" for which in ("", "_best", "_fused")}
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == made
    summary = json.loads((run / "summary.json").read_text())
    assert {"teacher_top1", "baseline_top1", "student_top1", "fused_max_abs_diff", "seconds"} <= set(summary)

    card = (run / "model_card.md").read_text()
    shown = next(row for row in summary["rows"] if row["what"] == "student")
    assert f"| student | riformer_nano | {shown['top1']:.2f} | {shown['parameters']:,} |" in card and "$" not in card
    assert "runs/r/config.yaml output=runs/r-again" in card and "2 epochs" in card and "3 classes" in card
    used = card.split("```python\n")[1].split("```")[0].replace('"runs/r', f'"{run}')
    exec(used, space := {})
    assert space["net"].num_classes == 3

    weights = (run / "student.safetensors").read_bytes()
    third = ask(*command)
    assert third.code == 0 and third.out.count("finished before") == 4 and "student: finished before" in third.out
    straight = ask(*command, "output=elsewhere/r")
    assert straight.code == 0 and "finished before" not in straight.out
    assert weights == (tmp_path / "elsewhere" / "r" / "student.safetensors").read_bytes()

    other = ask(*command, "seed=1")
    assert other.code == 2 and "runs/r already holds a run with another seed (0 there, 1 here)" in other.err


@pytest.mark.parametrize(("name", "what"), [("metaformer_pool_nano", "PoolFormer"), ("gfnet_h_nano", "as timm makes")])
def test_a_student_that_mixes_tokens_is_not_fused(name: str, what: str, ask, tmp_path: Path) -> None:
    alone = ["teachers={wide: null, twin: null}", f"student={{name: {name}, init: null}}", "baseline=null"]
    alone += [f"terms.{name}=null" for name in ("soft", "block", "mixer", "relation")]
    short = [*TINY[:5], "output=runs/pool", "terms.label.loss=cross_entropy"]
    answer = ask(*short, *alone)
    assert answer.code == 0, answer.err
    made = {path.name for path in (tmp_path / "runs" / "pool").iterdir()}
    assert "student.safetensors" in made and "student_fused.safetensors" not in made
    card = (tmp_path / "runs" / "pool" / "model_card.md").read_text()
    assert what in card and "none, labels alone" in card and "| fused |" not in card
