"""Studies: rows over seeds, shared teachers, going on after a stop, and the statistics of the table."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT
from matplotlib import image

from kdlib.config import ConfigError
from kdlib.study import main, pool, show
from kdlib.study.paired import T975, difference, mean
from kdlib.study.rows import Study, choose, load_study, recipes
from kdlib.study.run import Results, _needs, _share, _trained, gather, run, taught
from kdlib.training.runfolder import resolved
from kdlib.yaml12 import dump, parse
from recipes.riformer import gfnet, model  # noqa: F401  registers the models

SCRIPT = ROOT / "recipes" / "riformer" / "study.py"
SCALE = """
student: {name: riformer_nano, init: twin}
teachers: {twin: {name: metaformer_pool_nano, recipe: {terms: {label: {loss: cross_entropy}}, epochs: 1}}}
terms: {soft: {loss: soft_target}}
data: {name: fashion-mnist-5k, limit: 256, batch_size: 64}
epochs: 1
threads: 1
"""
STUDY = """
title: a small ladder
against: {both: soft}
gap: [soft, teacher twin]
rows:
  soft: []
  both: [terms.label.loss=cross_entropy]
"""


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/riformer/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_of_the_recipe_becomes_recipes_of_models_that_can_be_built(file: Path, tmp_path: Path) -> None:
    study = load_study(file)
    for scale in ("fashion_mnist_5k", "fashion_mnist"):
        planned = recipes(study, ROOT / f"recipes/riformer/configs/scales/{scale}.yaml", 1, tmp_path, [])
        assert [name for name, _ in planned] == list(study.rows)
    for recipe in planned.values():
        with torch.device("meta"):
            timm.create_model(recipe.student.name, num_classes=10, in_chans=1, **recipe.student.arguments)


def test_a_mean_is_the_one_worked_out_by_hand() -> None:
    # 1, 2, 4, 5, 8: mean 4, squares of deviations 9 + 4 + 0 + 1 + 16 = 30, variance 30 / 4
    found = mean([1, 2, 4, 5, 8])
    assert found.mean == 4 and found.n == 5
    assert found.sd == pytest.approx(math.sqrt(7.5))
    assert found.half == pytest.approx(2.776 * math.sqrt(7.5 / 5))


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = {0: 10.0, 1: 20.0, 2: 30.0, 7: 99.0}, {2: 29.0, 1: 18.0, 0: 10.5}
    found = difference(ours, theirs)  # -0.5, 2, 1: mean 2.5 / 3
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(2.5 / 3)
    spread = sum((x - 2.5 / 3) ** 2 for x in (-0.5, 2, 1))
    assert found.half == pytest.approx(4.303 * math.sqrt(spread / 2 / 3))
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert mean([3.0]).half == math.inf and math.isnan(mean([3.0]).sd)
    for count in (0, 32):
        with pytest.raises(ValueError, match=rf"1 to 31 values \(got {count}\)"):
            mean([1.0] * count)


@pytest.mark.parametrize("freedom", [1, 2, 5, 17, 30])
def test_the_quantiles_are_students(freedom: int) -> None:
    """The density integrated by Simpson's rule from 0 to the quantile is 0.475."""
    factor = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    steps, end = 20_000, T975[freedom - 1]
    total = sum(
        (1 if i in (0, steps) else 4 if i % 2 else 2) * (1 + (end * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i in range(steps + 1)
    )
    assert factor * total * end / steps / 3 == pytest.approx(0.475, abs=2e-5)


def results() -> Results:
    study = Study("demo", {"a": [], "b": []}, {"b": "a"}, ("a", "teacher wide"))
    top1 = {"teacher wide net": {0: 90.0, 1: 92.0}, "a": {0: 80.0, 1: 82.0}, "b": {0: 85.0, 1: 88.0}}
    return Results(study, top1)


def test_the_share_of_the_gap_and_the_difference() -> None:
    rows = {name: (own, gain, share) for name, own, gain, share in results().summary()}
    assert rows["teacher wide net"][2] == pytest.approx(1.0) and rows["a"][2] == pytest.approx(0.0)
    own, gain, share = rows["b"]
    assert own.mean == 86.5 and gain is not None and gain.mean == 5.5
    assert share == pytest.approx(5.5 / 10)
    assert rows["a"][1] is None
    plain = json.loads(json.dumps(show.plain(results()), allow_nan=False))
    assert plain["summary"]["b"]["difference"]["mean"] == 5.5 and plain["top1"]["b"] == {"0": 85.0, "1": 88.0}


def test_no_share_of_a_gap_that_is_not_open() -> None:
    study = Study("t", {"a": [], "b": []}, {"b": "a"}, ("a", "teacher w"))
    for teacher in (10.0, 9.0):
        found = Results(study, {"teacher w x": {0: teacher}, "a": {0: 10.0}, "b": {0: 11.0}})
        assert [share for *_, share in found.summary()] == [None, None, None]
        assert "of gap" not in [column.header for column in show.table(found).columns]


def test_more_seeds_than_statistics_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(_noted, tmp_path, tmp_path, ["ladder", "--data", "scale", "--seeds", "32"])
    assert stopped.value.code == 2 and "statistics are for at most 31 seeds (got 32)" in capsys.readouterr().err


def test_of_a_launchers_processes_the_first_one_is_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` starts one for each GPU where it is not told otherwise."""
    (tmp_path / "scale.yaml").write_text(SCALE)
    (tmp_path / "ladder.yaml").write_text(STUDY)
    given = ["ladder", "--data", "scale", "--seeds", "1", "--out", str(tmp_path / "out")]
    launched = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "RANK": "1",
        "MASTER_ADDR": "localhost",
        "TORCHELASTIC_RUN_ID": "1",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert main(_noted, tmp_path, tmp_path, given) == 0 and not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    assert main(_launched, tmp_path, tmp_path, given) == 0
    assert json.loads((tmp_path / "out" / "study.json").read_text())["top1"]["both"] == {"0": 50.0}


def _launched(recipe):
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    return _noted(recipe)


def test_the_plot_shows_every_row(tmp_path: Path) -> None:
    show.plot(results(), tmp_path / "study.png")
    pixels = image.imread(tmp_path / "study.png")[..., :3]
    colours = {tuple(round(float(c), 1) for c in pixel) for row in pixels for pixel in row}
    assert (0.1, 0.5, 0.7) in colours and (0.5, 0.5, 0.5) in colours  # rows blue, teachers grey


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rows: {a: []}\nrow: 3", "row: unknown key (known: title, against, gap, rows)"),
        ("rows: {a b: [], a-b: []}", "rows: 'a-b' and 'a b' would share a folder, named by what of a row is A-Z"),
        ("rows: {λ: []}", "rows: 'λ' would have no folder"),
        ("title: x", "rows: expected a mapping"),
        ("rows: {a: soft.yaml}", "rows.a: expected a list of config files and key=value settings (got 'soft.yaml')"),
        ("rows: {soft: []}\nagainst: sofd", "against: no row 'sofd'; did you mean 'soft'?"),
        ("rows: {a: []}\ngap: a", "gap: expected two names, [from, to] (got 'a')"),
        (
            "rows: {soft: []}\ngap: [sofd, teacher w]",
            "gap: no row 'sofd'; did you mean 'soft'? (known: soft; or a teac",
        ),
        ("rows: {soft: []}\ngap: [soft, wide]", "gap: no row 'wide' (known: soft; or a teacher, as 'teacher NAME')"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_study(tmp_path / "s.yaml")
    assert len(error.value.lines) == 1 and what in error.value.lines[0]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["ladr", "--data", "scale"], "study: no 'ladr' (known: ladder)"),
        (["ladder", "--data", "imagnet"], "--data: no 'imagnet' (known: scale)"),
        (["ladder", "--data", "scale", "--rows", "sof"], "--rows: no row 'sof'; did you mean 'soft'?"),
        (["ladder", "--data", "scale", "--rows", "soft", "epoch=3"], "row 'soft': command line: epoch: unknown key"),
        (["ladder", "--data", "scale", "seed=7"], "command line: seed: a study has --seeds for it; leave it out"),
        (["ladder", "--data", "scale", "output=x"], "command line: output: a study has --out for it; leave it out"),
        (["ladder", "--data", "scale", "data.root=/nowhere", "data.name=folder"], "data: "),
        (["ladder", "--data", "scale", "--frobnicate"], "unknown argument --frobnicate"),
        (["ladder", "--data", "scale", "epoch=3"], "row 'soft': command line: epoch: unknown key"),
    ],
)
def test_a_wrong_command_is_one_line(
    tmp_path: Path, arguments: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:

    (tmp_path / "scale.yaml").write_text(SCALE)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "ladder.yaml").write_text(STUDY)
    assert main(dict, tmp_path / "studies", tmp_path, [*arguments, "--out", str(tmp_path / "out")]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_builds_each_row_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scale.yaml").write_text(SCALE)
    (tmp_path / "ladder.yaml").write_text(STUDY)
    words = ["ladder", "--data", "scale", "--seeds", "2", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(dict, tmp_path, tmp_path, words) == 0
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines()] == list(load_study(tmp_path / "ladder.yaml").rows)
    assert main(dict, tmp_path, tmp_path, [*words, "student.widht=3"]) == 2
    said = capsys.readouterr()
    assert said.err.count("takes no such argument") == len(load_study(tmp_path / "ladder.yaml").rows)
    assert not (tmp_path / "out").exists()


def test_rows_are_chosen_with_what_they_are_compared_with(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY)
    study = load_study(tmp_path / "s.yaml")
    assert list(choose(study, ["both"]).rows) == ["soft", "both"]
    assert list(choose(study, ["soft"]).rows) == ["soft"]
    assert choose(study, ["soft"]).partial and not choose(study, ["both"]).partial and not study.partial


def _noted(recipe):  # in a worker process: what was trained, in which order, shows in the folder
    recipe.output.mkdir(parents=True, exist_ok=True)
    (recipe.output / "log").open("a").write("x")
    (recipe.output / "config.yaml").write_text(dump(resolved(recipe)))
    if "fails" in recipe.output.name:
        raise RuntimeError("no luck")
    result = {"top1": 50.0 + recipe.seed}
    (recipe.output / "summary.json").write_text(json.dumps({"result": result, "seconds": 1.0}))
    return result


def test_equal_teachers_are_trained_once_and_a_failure_stops_no_one(tmp_path: Path) -> None:

    (tmp_path / "scale.yaml").write_text(SCALE)
    study = Study("s", {"soft": [], "fails": [], "both": ["epochs=2"]}, {})
    planned = recipes(study, tmp_path / "scale.yaml", 2, tmp_path / "out", [])
    found = run(study, planned, _noted, jobs=2)
    trained = sorted(path.parent.name for path in (tmp_path / "out").glob("*/log"))
    assert len([name for name in trained if name.startswith("metaformer_pool_nano")]) == 2  # one a seed
    assert all(path.read_text() == "x" for path in (tmp_path / "out").glob("*/log"))
    assert found.top1 == {
        "teacher twin metaformer_pool_nano": {0: 50.0, 1: 51.0},
        "soft": {0: 50.0, 1: 51.0},
        "both": {0: 50.0, 1: 51.0},
    }
    assert gather(study, planned).top1 == found.top1  # as a study that is stopped tells it
    assert found.failed == {"fails-0": "no luck", "fails-1": "no luck"}


def _ladder(folder: Path, rows: dict[str, list[str]], gap: tuple[str, str] | None = None, seeds: int = 1) -> Any:
    study = Study("s", rows, {}, gap)
    (folder / "scale.yaml").write_text(SCALE)
    return study, recipes(study, folder / "scale.yaml", seeds, folder / "out", [])


ANOTHER = "teachers.twin.recipe.epochs=2"


def test_teachers_of_one_name_and_different_recipes_are_told_apart_by_their_rows(tmp_path: Path) -> None:
    rows = {"soft": [], "long": [ANOTHER], "both": ["epochs=2"]}
    study, planned = _ladder(tmp_path, rows, ("soft", "teacher twin metaformer_pool_nano of long"), 2)
    name = "teacher twin metaformer_pool_nano"
    several = [f"{name} of soft", f"{name} of long"]
    assert list(taught(planned)) == [(each, seed) for seed in (0, 1) for each in several]
    found = run(study, planned, _by_epochs, jobs=1)
    assert found.top1[f"{name} of soft"] == {0: 1.0, 1: 1.0} and found.top1[f"{name} of long"] == {0: 2.0, 1: 2.0}
    shares = {row: share for row, _, _, share in found.summary()}
    assert shares["soft"] == 0 and shares[f"{name} of long"] == 1 == shares["both"]


def _by_epochs(recipe):
    _noted(recipe)
    result = {"top1": float(recipe.epochs)}
    (recipe.output / "summary.json").write_text(json.dumps({"result": result, "seconds": 1.0}))
    return result


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("teacher twn", "gap: no row of the study has 'teacher twn'; did you mean 'teacher twin'? (known: teacher tw"),
        ("teacher twin", "gap: 'teacher twin' are several; give one of 'teacher twin metaformer_pool_nano of soft', "),
    ],
)
def test_a_gap_to_no_teacher_or_to_several_is_told_before_anything_is_trained(
    tmp_path: Path, to: str, says: str
) -> None:
    study, planned = _ladder(tmp_path, {"soft": [], "long": [ANOTHER]}, ("soft", to))
    with pytest.raises(ConfigError) as caught:
        run(study, planned, _noted, jobs=1)
    (line,) = caught.value.lines
    assert line.startswith(says) and not (tmp_path / "out").exists()


def test_a_part_of_a_study_may_lack_what_the_gap_names(tmp_path: Path) -> None:
    study, planned = _ladder(tmp_path, {"labels": [], "labels more": []})
    study = choose(replace(study, gap=("labels", "teacher wide")), ["labels more"])
    found = run(study, {key: recipe for key, recipe in planned.items() if key[0] in study.rows}, _noted, jobs=1)
    assert found.top1 and all(share is None for *_, share in found.summary())
    found.top1["teacher wide x"] = {0: 90.0}
    assert all(share is None for *_, share in found.summary()), "'labels more' is not the row 'labels'"


def test_runs_beside_each_other_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlib.study.run.cores", lambda: 8)
    study, planned = _ladder(tmp_path, {"fixed": ["threads=5"], "soft": ["threads=0"]})
    run(study, planned, _noted, jobs=3)
    threads = {file.parent.name.partition("-")[0]: parse(file.read_text())["threads"]
               for file in tmp_path.glob("out/*/config.yaml")}  # fmt: skip
    assert threads == {"soft": 2, "fixed": 5, "metaformer_pool_nano": 2}
    soft, alone = planned["soft", 0], taught(planned)["teacher twin metaformer_pool_nano", 0]
    assert taught({("soft", 0): _share(soft, 3)}).popitem()[1].output == alone.output
    run(study, planned, _noted, jobs=1)  # whose folders are the same
    assert {file.read_text() for file in tmp_path.glob("out/*/log")} == {"x"}


def test_of_a_study_that_goes_on_no_process_idles(tmp_path: Path) -> None:
    """Students of a teacher that is finished begin beside a teacher that is not."""
    _, planned = _ladder(tmp_path, {"slow": [ANOTHER], "quick": []})
    _noted(taught(planned)["teacher twin metaformer_pool_nano of quick", 0])
    begun: list[str] = []

    def submit(recipe):
        begun.append(recipe.output.name)
        future = Future()
        Timer(0.5 if len(begun) == 1 else 0.0, future.set_result, [{"top1": 1.0}]).start()
        return future

    told = list(_trained(*_needs(planned), submit, 2, {}))
    assert len(told) == 4 and begun[1] == "quick-0" and begun[2] == "slow-0"


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ("study.py", "study.py"),
        ("{here}/recipes/mine/study.py", "recipes/mine/study.py"),
        ("/opt/x/study.py", "study.py"),
    ],
)
def test_the_command_names_the_script_that_was_called(
    tmp_path: Path, called: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scale.yaml").write_text(SCALE)
    (tmp_path / "ladder.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [called.format(here=tmp_path)])
    given = ["ladder", "--data", "scale", "--seeds", "1", "--out", "out"]
    assert main(_noted, tmp_path, tmp_path, given) == 0
    assert json.loads(Path("out/study.json").read_text())["command"] == " ".join([said, *given])


def test_a_folder_that_is_taken_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "scale.yaml").write_text(SCALE)
    study = Study("s", {"soft": [], "both": ["epochs=2"]}, {})
    planned = recipes(study, tmp_path / "scale.yaml", 1, tmp_path / "out", [])
    (tmp_path / "out" / "both-0").mkdir(parents=True)
    (tmp_path / "out" / "both-0" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run(study, planned, _noted, jobs=1)
    assert not list((tmp_path / "out").glob("*/log"))


def test_a_folder_in_which_another_study_runs_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "scale.yaml").write_text(SCALE)
    planned = recipes(Study("s", {"soft": []}, {}), tmp_path / "scale.yaml", 1, tmp_path / "out", [])
    (tmp_path / "out").mkdir()
    hold = "import sys; from pathlib import Path; from kdlib.training.lock import held\n"
    hold += "with held(Path(sys.argv[1])): print('in'); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert other.stdin and other.stdout and other.stdout.readline()
    try:
        with pytest.raises(ConfigError, match=f"--out: .*out is in use by process {other.pid} on .*another folder"):
            run(Study("s", {"soft": []}, {}), planned, _noted, jobs=1)
    finally:
        other.stdin.close()
        other.wait()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert run(Study("s", {"soft": []}, {}), planned, _noted, jobs=1).top1["soft"] == {0: 50.0}


def _killed(recipe):
    if "killed" in recipe.output.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return _noted(recipe)


def test_a_killed_process_costs_its_run_and_no_later_one(tmp_path: Path) -> None:
    (tmp_path / "scale.yaml").write_text(SCALE)
    study = Study("s", {"first": [], "killed": [], "last": []}, {})
    planned = recipes(study, tmp_path / "scale.yaml", 2, tmp_path / "out", [])
    found = run(study, planned, _killed, jobs=1)
    assert found.top1["first"] == found.top1["last"] == {0: 50.0, 1: 51.0}
    assert set(found.failed) == {"killed-0", "killed-1"}
    assert all("was killed (for memory?); the same command goes on" in reason for reason in found.failed.values())


def _teacher_fails(recipe):
    if "gfnet" in recipe.output.name:
        raise RuntimeError("no luck")
    return _noted(recipe)


def test_a_student_whose_teacher_failed_is_not_begun(tmp_path: Path) -> None:
    wide = "wide: {name: gfnet_h_nano, recipe: {terms: {label: {loss: cross_entropy}}, epochs: 1}}"
    (tmp_path / "scale.yaml").write_text(SCALE.replace("teachers: {", f"teachers: {{{wide}, "))
    study = Study("s", {"one": ["terms.soft.teacher=wide"], "other": ["terms.soft.teacher=twin"]}, {})
    planned = recipes(study, tmp_path / "scale.yaml", 1, tmp_path / "out", [])
    found = run(study, planned, _teacher_fails, jobs=2)
    (teacher,) = (name for name in found.failed if name.startswith("gfnet_h_nano-"))
    assert found.failed == {teacher: "no luck", "one-0": f"its teacher {teacher} failed"}
    assert set(found.top1) == {"teacher twin metaformer_pool_nano", "other"}


def _patient(recipe):  # the teacher "wide" takes until a student of the other teacher has ended
    until = time.monotonic() + 60
    while "gfnet" in recipe.output.name and not (recipe.output.parent / "quick-0" / "summary.json").exists():
        if time.monotonic() > until:
            raise RuntimeError("waited in vain")
        time.sleep(0.01)
    return _noted(recipe)


def test_a_student_waits_for_no_teacher_but_its_own(tmp_path: Path) -> None:
    wide = "wide: {name: gfnet_h_nano, recipe: {terms: {label: {loss: cross_entropy}}, epochs: 1}}"
    scale = SCALE.replace("teachers: {", f"teachers: {{{wide}, ").replace(", init: twin", "")
    (tmp_path / "scale.yaml").write_text(scale)
    rows = {"slow": ["terms.soft.teacher=wide"], "quick": ["terms.soft.teacher=twin"]}
    planned = recipes(Study("s", rows, {}), tmp_path / "scale.yaml", 1, tmp_path / "out", [])
    found = run(Study("s", rows, {}), planned, _patient, jobs=2)
    assert not found.failed and len(found.top1) == 4


def test_no_more_is_submitted_than_processes_are_free_for(tmp_path: Path) -> None:
    """What waits in the queue of a pool begins even after Ctrl-C."""
    (tmp_path / "scale.yaml").write_text(SCALE)
    rows = {str(row): [] for row in range(6)}
    planned = recipes(Study("s", rows, {}), tmp_path / "scale.yaml", 1, tmp_path / "out", [])
    left, most = [], []

    def submit(recipe):
        future = Future()
        left.append(future)
        most.append(sum(not each.done() for each in left))
        Timer(0.05, future.set_result, [{"top1": 1.0}]).start()
        return future

    assert len(list(_trained(*_needs(planned), submit, 2, {}))) == 7  # six rows and their teacher
    assert most[0] == 1 and max(most) == 2


def test_runs_take_turns_at_the_cards_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count, expected in (
        (None, 0, []), (None, 1, []), ("3", 1, []), (None, 3, ["0", "1", "2"]), ("4,GPU-a", 2, ["4", "GPU-a"]),
        ("", 0, []), ("2,3,-1,5", 2, ["2", "3"]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert pool.cards() == expected
    with pool.Workers(1) as workers:
        assert workers.submit(_visible, "CUDA_VISIBLE_DEVICES").result() == "2"
    given: list[Any] = []
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda *_, initargs, **__: given.extend(initargs))
    pool.Workers(4)
    assert [given[0].get() for _ in range(4)] == ["2", "3", "2", "3"]


def _visible(name: str) -> str:
    return os.environ[name]


def start(folder: Path, **more: str) -> subprocess.Popen[str]:
    given = [str(folder / "study.yaml"), "--data", str(folder / "scale.yaml"), "--seeds", "1", "--jobs", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *given, "--out", str(folder / "out")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def born_of(pid: int) -> list[int]:
    """A process's children."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are told by /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_where_a_study_ends_its_processes_end(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "scale.yaml").write_text(SCALE.replace("epochs: 1}", "epochs: 500}"))
    (tmp_path / "study.yaml").write_text(STUDY)
    process = start(tmp_path)
    until = time.monotonic() + 240
    while not list(tmp_path.glob("out/metaformer_pool_nano-*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no teacher began"
        time.sleep(0.05)
    children = born_of(process.pid)
    assert children
    process.send_signal(number)
    told, _ = process.communicate(timeout=120)  # which waits for all who hold its output
    until = time.monotonic() + 120
    assert process.returncode in (128 + number, -number) and "Traceback" not in told, told
    while any(map(alive, children)):
        assert time.monotonic() < until, "processes of the study live on"
        time.sleep(0.05)
    (steps,) = tmp_path.glob("out/metaformer_pool_nano-*/checkpoints")
    assert any(steps.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are told by /proc")
def test_killed_between_and_within_rows_it_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """Each worker halts by itself at its second evaluation, so that no row is finished when it is killed, however slow
    the machine is."""
    (tmp_path / "scale.yaml").write_text(SCALE.replace("\nepochs: 1", "\nepochs: 3"))
    (tmp_path / "study.yaml").write_text(STUDY)
    for awaited in ("metaformer_pool_nano-*/summary.json", "soft-0/checkpoints/step-00000004"):
        process = start(tmp_path, KDLIB_FAULT="evaluate:2:STOP")
        until = time.monotonic() + 240
        while not list(tmp_path.glob(f"out/{awaited}")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, f"no {awaited}"
            time.sleep(0.05)
        workers = born_of(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in workers:  # each a session of its own; one that halts cannot end because the study did
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=120)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/metaformer_pool_nano-*/summary.json")}
    log = tmp_path / "out" / "soft-0" / "metrics.jsonl"
    before = log.read_text().splitlines()
    assert 1 <= len(before) <= 2
    stopped, _ = (process := start(tmp_path)).communicate(timeout=300)
    assert process.returncode == 0, stopped
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and kept  # finished rows are not run again
    lines = log.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert lines[: len(before)] == before, "their seconds tell: these epochs are those of processes that were killed"
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert set(study["top1"]) == {"teacher twin metaformer_pool_nano", "soft", "both"}
    assert all(set(values) == {"0"} for values in study["top1"].values())
    (tmp_path / "other").mkdir()
    for name in ("scale.yaml", "study.yaml"):
        (tmp_path / "other" / name).write_text((tmp_path / name).read_text())
    whole, _ = (process := start(tmp_path / "other")).communicate(timeout=300)
    assert process.returncode == 0, whole
    assert json.loads((tmp_path / "other" / "out" / "study.json").read_text())["top1"] == study["top1"]
