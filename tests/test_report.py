"""kdlib report: its numbers are those that other means give, nothing is fetched, and what is missing is said."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from kdlib import cli, launch, runs
from kdlib.config import ConfigError, read
from kdlib.pairs import alike, blocks
from kdlib.recipe import load
from kdlib.report import figures, page, plots, report
from kdlib.report.answers import answers
from kdlib.report.opened import open_run
from kdlib.report.timing import PARTS, time_step
from kdlib.report.verdict import verdict
from kdlib.report.view import Row, View, look
from recipes.riformer import run as riformer
from tests.conftest import ROOT
from tests.test_runs import files

CPU = torch.device("cpu")
VOID = {"meta", "img", "br", "wbr", "link", "hr", "input"}


class Page(HTMLParser):
    """Text and table rows by section; every tag must be closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = ""
        self.text: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        self.links += [str(value) for name, value in attributes if name.split(":")[-1] in ("src", "href", "data")]
        self.ids += [str(given["id"])] if "id" in given else []
        if tag == "section":
            self.section = str(given["id"])
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text[self.section] = self.text.get(self.section, "") + data
        if {"td", "th"} & set(self.open) and "tr" in self.open and "svg" not in self.open:
            self.rows[self.section][-1][-1] += data

    def row(self, section: str, name: str) -> list[str]:
        """The cells behind the first one, which is or begins with ``name``."""
        return next([cell.strip() for cell in row[1:]] for row in self.rows[section] if row[0].startswith(name))


def make_images(root: Path) -> Path:
    """Three classes of noise, each with so little of a colour that models err."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 32), ("val", 20)):
        for number, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 200, (28, 28, 3), generator=generator, dtype=torch.uint8)
                pixels[..., number] += int(torch.randint(0, 14, (), generator=generator))
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of RIFormer's first run, over these images."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("made")
    data = f"{{name: folder, root: '{make_images(place / 'images')}', image_size: 28, batch_size: 16, workers: 0}}"
    children = ("teachers.wide.recipe", "teachers.twin.recipe", "baseline")
    changes = [f"{child}.schedule.warmup_epochs=0" for child in children]
    changes += [f"{child}.epochs=3" for child in children[:2]]
    changes += [f"data={data}", "data.eval_batch_size=24", "epochs=2", "threads=1", "schedule.warmup_epochs=0"]
    default = ROOT / "recipes" / "riformer" / "configs" / "default.yaml"
    assert launch.main(riformer.main, default, [*changes, f"output={place / 'riformer'}"]) == 0
    return place / "riformer"


@pytest.fixture(scope="module")
def html(made: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return report([made], tmp_path_factory.mktemp("page") / "deep" / "r.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def outcome(made: Path) -> runs.Outcome:
    """The run read back by kdlib.runs."""
    return runs.run(load(read([str(made / "config.yaml")])))


@pytest.fixture(scope="module")
def told(outcome: runs.Outcome) -> dict[str, list[tuple[int, list[float]]]]:
    """Of each model, image by image: the label and the logits."""
    models = {"student": outcome.student, "baseline": outcome.baseline.student}
    models |= {f"teacher {name}": teacher.student for name, teacher in outcome.teachers.items()}
    found: dict[str, list[tuple[int, list[float]]]] = {what: [] for what in models}
    with torch.no_grad():
        for images, labels in outcome.data.test.epoch(0):
            for image, label in zip(images, labels.tolist(), strict=True):
                for what, model in models.items():
                    found[what].append((label, model.eval()(image[None])[0].tolist()))
    return found


def top(logits: list[float]) -> int:
    return max(range(len(logits)), key=logits.__getitem__)


def share(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)


def copy(made: Path, to: Path, name: str = "riformer") -> Path:
    """The run and those beside it, at another place."""
    for folder in made.parent.iterdir():
        if (folder / "config.yaml").exists():
            shutil.copytree(folder, to / (name if folder == made else folder.name))
    return to / name


# the page


def test_every_section_is_there_and_the_markup_is_sound(html: str) -> None:
    found = Page(html)
    assert html.startswith("<!DOCTYPE html>") and "prefers-color-scheme: dark" in html
    assert set(page.SECTIONS) <= set(found.ids) and len(found.ids) == len(set(found.ids))
    assert set(found.links) >= {f"#{section}" for section in page.SECTIONS}
    for section in page.SECTIONS:
        assert len(found.text[section].split()) > 15, section
    assert 'class="missing"' not in html and html.count("<svg") == 2 + 4 + 4 and "#0000" not in html
    assert not re.search(r"\bnan\b|\bNone\b|<!--", html.partition("<details>")[0])


def test_the_colours_of_similarity_have_a_scale(html: str) -> None:
    import matplotlib

    ends = [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert f"linear-gradient(90deg, {', '.join(ends)})" in html and "CKA 0 <i></i> 1" in html


def test_a_model_has_one_colour_all_over_the_page(made: Path) -> None:
    view = look(open_run(made, CPU), 0, alone=True)
    curves = {line.label: line.css for line in view.lines}
    diagrams = {one["what"]: set(re.findall(r"var\(--(s\d)\)", one["svg"])) for one in view.calibration}
    assert diagrams == {what: {css} for what, css in curves.items()} and len(diagrams) == 4


def test_nothing_is_fetched_and_nothing_runs(html: str) -> None:
    found = Page(html)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found.links)
    rest = re.sub(r"data:image/png;base64,[\w+/=]*", "", html.partition("<details>")[0])
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", rest)
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert not re.search(r"\son\w+=", html)


def test_accuracy_gain_and_calibration_are_those_of_the_plain_definitions(html: str, told: dict) -> None:
    found = Page(html)
    for what, given in told.items():
        right = [top(logits) == label for label, logits in given]
        cells = found.row("outcome", what)
        assert cells[0] == f"{share(right):.2f}", what
        error = 0.0
        sure = [max(torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()) for _, logits in given]
        for i in range(15):
            inside = [j for j, confidence in enumerate(sure) if i / 15 < confidence <= (i + 1) / 15]
            if inside:
                gap = sum(right[j] for j in inside) / len(inside) - sum(sure[j] for j in inside) / len(inside)
                error += len(inside) / len(sure) * abs(gap)
        assert cells[2] == f"{100 * error:.2f}" and f"{100 * error:.2f} %" in found.text["calibration"], what
    student, baseline = ([top(logits) == label for label, logits in told[what]] for what in ("student", "baseline"))
    gain = share(student) - share(baseline)
    assert found.row("outcome", "student")[1].startswith(page.signed(gain, 2))
    gained = sum(s and not b for s, b in zip(student, baseline, strict=True))
    lost = sum(b and not s for s, b in zip(student, baseline, strict=True))
    assert f"{gained} images went from wrong to right and {lost} from right to wrong" in found.text["changes"]
    n = len(student)
    error = 100 * ((gained + lost - (gained - lost) ** 2 / n) / n / (n - 1)) ** 0.5
    assert found.row("outcome", "student")[1].endswith(f"± {error:.2f}")


def test_classes_and_agreement_are_counted_by_hand(html: str, told: dict, outcome: runs.Outcome) -> None:
    found = Page(html)
    answers = {what: [top(logits) for _, logits in rows] for what, rows in told.items()}
    labels = [label for label, _ in told["student"]]
    for number, name in enumerate(outcome.data.classes):
        own = [i for i, label in enumerate(labels) if label == number]
        right = {what: share([answers[what][i] == number for i in own]) for what in answers}
        agree = [share([answers["student"][i] == answers[f"teacher {t}"][i] for i in own]) for t in outcome.teachers]
        cells = found.row("classes", name)
        assert cells[:2] == [f"{right['baseline']:.1f}", f"{right['student']:.1f}"]
        assert cells[2] == page.signed(right["student"] - right["baseline"], 1)
        assert cells[4:] == [f"{value:.1f}" for value in agree]
    for who in ("student", "baseline"):
        same = [
            share([a == b for a, b in zip(answers[who], answers[f"teacher {t}"], strict=True)])
            for t in ("wide", "twin")
        ]
        assert found.row("agreement", f"{who} answers as the teacher") == [f"{value:.2f}" for value in same]


def test_a_run_is_not_touched_and_the_table_has_what_it_recorded(made: Path, html: str, tmp_path: Path) -> None:
    before = files(made.parent)
    report([made], tmp_path / "again.html")
    assert files(made.parent) == before
    found = Page(html)
    assert found.row("outcome", "fused")[0] != "–" and "fused: as recorded" in found.text["outcome"]
    assert found.row("config", "torch") == [torch.__version__] * 2


def test_the_initial_student_is_the_one_that_training_started_from(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: runs.Outcome
) -> None:
    seen: list[runs.Ready] = []
    monkeypatch.setattr(runs, "_train", lambda ready, _: seen.append(ready) or ({"top1": 0.0}, ready.student, None))
    again = copy(made, tmp_path)
    for name in ("summary.json", "student.safetensors"):
        (again / name).unlink()
    runs.run(load(read([str(again / "config.yaml")])).model_copy(update={"output": again}))
    (ready,) = seen
    opened = open_run(made, CPU)
    mine, theirs = opened.initial.state_dict(), ready.student.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    trained = outcome.student.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in opened.student.net.state_dict().items())
    assert any(not torch.equal(mine[key], trained[key]) for key in mine)


def test_similarity_is_that_of_the_models_before_and_after(made: Path, outcome: runs.Outcome) -> None:
    opened = open_run(made, CPU)
    view = look(opened, 0, True)
    twin = outcome.teachers["twin"].student
    for when, student in (("before", opened.initial), ("after", outcome.student)):
        batches = [(images, images) for images, _ in outcome.data.test.epoch(0)]
        expected = alike(student, twin, batches, blocks(student), blocks(twin))
        (shown,) = (one for one in view.alike if (one["teacher"], one["when"]) == ("teacher twin", when))
        torch.testing.assert_close(shown["values"], expected)
    assert not torch.equal(view.alike[2]["values"], view.alike[3]["values"])


def test_a_teacher_sees_the_images_as_it_expects_them(made: Path, told: dict) -> None:
    opened = open_run(made, CPU)
    opened.teachers["wide"].prepare = torch.nn.Threshold(float("inf"), 0.0)  # every image black
    given = answers(opened).logits
    assert len(given["teacher wide"].unique(dim=0)) == 1 < len(given["teacher twin"].unique(dim=0))
    torch.testing.assert_close(given["student"], torch.tensor([logits for _, logits in told["student"]]))


def test_a_step_is_timed_on_copies(made: Path) -> None:
    opened = open_run(made, CPU)
    before = {key: value.clone() for key, value in opened.student.net.state_dict().items()}
    step = time_step(opened)
    assert tuple(step.milliseconds) == PARTS and all(value > 0 for value in step.milliseconds.values())
    assert step.terms == ("soft", "block", "mixer", "relation") and step.batch == 16
    after = opened.student.net.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# names, several runs, what is missing


def test_no_name_becomes_markup(made: Path, tmp_path: Path) -> None:
    run = copy(made, tmp_path, "<script>alert(1)<b>$x$&")
    config = (run / "config.yaml").read_text()
    shutil.copytree(made.parent / "images", tmp_path / "images")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "red").rename(tmp_path / "images" / split / "<img src=x onerror=alert(2)>")
    (run / "config.yaml").write_text(config.replace(str(made.parent / "images"), str(tmp_path / "images")))
    other = report([run, made], tmp_path / "r.html").read_text(encoding="utf-8")
    found = Page(other)
    assert "script" not in found.tags and "b" in found.tags and "x" not in found.links
    assert "&lt;script&gt;alert(1)&lt;b&gt;$x$&amp;" in other and "&lt;img src=x onerror=alert(2)&gt;" in other
    assert "<img src=x" not in other and "<script" not in other


def test_several_runs_stand_side_by_side_with_what_sets_them_apart(made: Path, tmp_path: Path) -> None:
    (plain,) = made.parent.glob("riformer_nano-*")
    found = Page(report([made, plain], tmp_path / "r.html").read_text(encoding="utf-8"))
    groups = [row[0] for row in found.rows["outcome"] if len(row) == 1 and ":" not in row[0]]
    assert groups == ["riformer", plain.name]
    assert found.row("config", "terms.label.loss.name") == ["–", "cross_entropy"]
    assert not any(row[0] == "seed" for row in found.rows["config"])
    # the second run has neither teacher nor baseline, and is the first one's baseline
    assert "This run has no teacher." in found.text["agreement"] and "This run has no teacher." in found.text["alike"]
    assert "This run has no baseline" in found.text["changes"]
    students = [row[1] for row in found.rows["outcome"] if row[0].startswith("student")]
    assert students[1] == found.row("outcome", "baseline")[0]
    points, error = re.findall(r"[\d.]+", found.row("outcome", "student")[1])
    assert found.text[""].count(f"{points} ± {error} points") == 2, "against the baseline, and the other way round"
    assert f"points above the student of {made.name}" in found.text[""] or "points below the student" in found.text[""]


def test_curves_are_left_out_where_they_are_the_same_runs_only() -> None:
    points = [(1.0, 50.0)]
    lines = [plots.Line(name, points, 0, folder=Path(of)) for name, of in (("a", "x"), ("b", "y"), ("a again", "x"))]
    assert [line.label for line in page._once(lines)] == ["a", "b"]


def test_a_run_without_weights_leads_to_a_page_that_says_so(made: Path, tmp_path: Path) -> None:
    run = copy(made, tmp_path)
    for name in ("summary.json", "student.safetensors", "metrics.jsonl"):
        (run / name).unlink()
    (wide,) = tmp_path.glob("gfnet*")
    shutil.rmtree(wide)
    (baseline,) = tmp_path.glob("riformer_nano-*")
    (baseline / "student.safetensors").write_bytes(b"nothing")
    found = Page(report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "This run is not finished: the student is from the checkpoint after epoch 2." in found.text[""]
    assert found.row("outcome", "student")[0] != "–" and found.row("outcome", "teacher wide")[0] == "–"
    assert f"neither student.safetensors nor a checkpoint is in {wide.name}/" in found.text["outcome"]
    assert "is corrupt" in found.text["outcome"] and "The baseline is missing" in found.text["changes"]
    assert "There is no metrics.jsonl" in found.text["curves"]
    assert "teacher wide is missing" in found.text["alike"] and "teacher twin, after training" in found.text["alike"]
    assert "A step could not be timed: a model is missing" in found.text["time"]

    shutil.rmtree(run / "checkpoints")
    (twin,) = tmp_path.glob("metaformer*")
    shutil.rmtree(twin)
    found = Page(report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "This run is not finished." in found.text[""]
    for section in ("classes", "agreement", "calibration"):
        assert "The student is missing: neither student.safetensors" in found.text[section]


# the command


def test_the_command_writes_the_page_and_refuses_in_one_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(made), "--out", "r.html", "--import", "recipes.riformer.run"]) == 0
    assert re.fullmatch(r"r\.html: \d+ kB, open it in a browser\n", capsys.readouterr().out)
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("student: {name: riformer_nan}\nterms: {}\n")
    lacking = (made / "config.yaml").read_text().replace(str(made.parent / "images"), "gone")
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "config.yaml").write_text(lacking)
    for name, says in (
        ("nowhere", "nowhere: no run (there is no such folder); name the folder of a run, a recipe's output=…"),
        ("empty", "empty: no run (empty/config.yaml is missing); name the folder of a run"),
        ("r.html", "r.html: no run (it is a file); name"),
        ("broken", "broken/config.yaml: student.name: no model 'riformer_nan'; import the recipe, or your own"),
        ("lacking", "lacking/config.yaml: data: gone: no such folder"),
        ("lacking", "train/<class>/… and val/<class>/…; root is relative to where the run was started"),
    ):
        assert cli.main(["report", name, "--out", "x.html"]) == 2
        said = capsys.readouterr()
        assert says in said.err and said.err.count("\n") == 1 and not said.out, said.err
    assert cli.main(["report", str(made), "--out", "no/x.html"]) == 2
    assert capsys.readouterr().err.startswith("no/x.html: no folder ")
    assert not (tmp_path / "x.html").exists()
    with pytest.raises(ConfigError, match="no run was given"):
        report([], tmp_path / "x.html")


# the numbers, on tensors that can be counted


def sure(*confidences: float) -> Tensor:
    """Logits of two classes whose first one has these probabilities."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


def test_the_calibration_error_is_the_mean_distance_from_the_line() -> None:
    logits, labels = sure(0.9, 0.9, 0.9, 0.9, 0.6, 0.6), torch.tensor([0, 0, 0, 1, 0, 1])
    bins = figures.reliability(logits, labels)
    assert [(round(b.confidence, 6), b.accuracy, b.count) for b in bins] == [(0.6, 0.5, 2), (0.9, 0.75, 4)]
    assert figures.ece(bins) == pytest.approx(100 * (2 * 0.1 + 4 * 0.15) / 6)
    halves = figures.reliability(sure(0.5, 0.6), torch.tensor([0, 0]), bins=2)
    assert [b.count for b in halves] == [1, 1], "the upper end belongs to a bin"
    certain = figures.reliability(torch.tensor([[100.0, -100.0]]), torch.tensor([0]))
    assert [(b.confidence, b.accuracy) for b in certain] == [(1.0, 1.0)] and figures.ece(certain) == 0
    assert figures.nll(sure(0.5), torch.tensor([1])) == pytest.approx(0.693147, abs=1e-5)


def test_the_verdict_says_what_the_table_says_and_what_it_cannot_tell() -> None:
    def row(what: str, top1: float | None, gain: figures.Gain | None = None) -> Row:
        return Row(what, "net", top1, gain, None, None, None, "")

    teachers = [row("teacher wide", 83.85), row("teacher twin", 81.65), row("teacher gone", None)]
    said = verdict([*teachers, row("baseline", 80.9), row("student", 83.3, figures.Gain(2.4, 0.46, 0.049))], 4000)
    assert said == (
        "The student is right on 83.30 % of 4,000 test images, 2.40 ± 0.46 points above the baseline, "
        "0.55 points below teacher wide."
    )
    said = verdict([row("student", 82.25, figures.Gain(-0.57, 0.25, 0.051))], 4000)
    assert said.endswith("0.57 ± 0.25 points below the baseline (no more than chance among these images).")
    assert verdict([row("student", None), *teachers], 10) == ""


def test_the_error_of_a_gain_is_that_of_a_paired_difference() -> None:
    before, after = torch.tensor([True, False, False, True]), torch.tensor([True, True, True, False])
    found = figures.gain(before, after)  # 0, 1, 1, -1: mean 1/4, squares of deviations 44/16, variance 11/12
    assert found.points == 25 and found.error == pytest.approx(100 * math.sqrt(11 / 12 / 4))
    assert figures.gain(before[:1], after[:1])[:2] == (0, math.inf)


def test_mcnemars_test_is_the_share_of_all_throws_of_a_coin() -> None:
    for throws in range(11):
        heads = [sum(coins) for coins in itertools.product((0, 1), repeat=throws)]
        for won in range(throws + 1):
            uneven = abs(2 * won - throws)
            share = sum(abs(2 * count - throws) >= uneven for count in heads) / len(heads)
            assert figures.mcnemar(won, throws - won) == pytest.approx(share, abs=1e-12), (won, throws)
    assert figures.mcnemar(0, 5000) == 0 and figures.mcnemar(5000, 5000) == 1
    assert figures.mcnemar(5100, 4900) == pytest.approx(math.erfc(199 / math.sqrt(2 * 10_000)), rel=1e-3)  # a bell


def test_a_gain_of_few_images_is_not_called_one_for_its_standard_error() -> None:
    """Five images won and none lost of ten: three standard errors, and one in sixteen for a coin."""
    before = torch.tensor([True] * 5 + [False] * 5)
    found = figures.gain(before, torch.ones(10, dtype=torch.bool))
    assert found.points / found.error > 2 and found.chance == 2 / 2**5
    row = Row("student", "net", 100.0, found, None, None, None, "")
    assert verdict([row], 10).endswith("(no more than chance among these images).")


class Broken(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        answer = torch.tensor([[0.0, 1.0, 0.0]]).repeat(len(images), 1)
        answer[0] = float("nan")
        return answer


def test_a_model_that_answers_nan_is_set_aside_and_the_page_says_so(made: Path, tmp_path: Path) -> None:
    for what in ("student", "wide"):
        opened = open_run(copy(made, tmp_path / what), CPU, None)
        member = opened.student if what == "student" else opened.teachers[what]
        member.net = Broken()
        view = look(opened, 0, True)
        row = view.row(member.what)
        assert row.top1 is None and row.gain is None and row.note == "it answers NaN to 3 of 60 test images"
        assert ("The student is missing: it answers NaN" in view.notes.get("agreement", "")) == (what == "student")
        assert {one["what"] for one in view.calibration} == {m.what for m in opened.members} - {member.what}


def test_nan_is_no_answer() -> None:
    logits, labels = torch.tensor([[float("nan"), 0.0], [1.0, 0.0], [0.0, float("nan")]]), torch.tensor([0, 0, 1])
    assert figures.accuracy(logits, labels) == pytest.approx(100 / 3)


def test_cases_confusions_and_samples_are_counted() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    before, after = torch.tensor([1, 1, 1, 0, 2, 0]), torch.tensor([0, 0, 1, 1, 0, 1])
    cases = figures.together(after, before, labels)
    assert [round(value * 6 / 100) for value in cases.values()] == [1, 3, 1, 0, 1] and sum(
        cases.values()
    ) == pytest.approx(100)
    found = [(c.label, c.answer, c.before, c.after) for c in figures.confusions(before, after, labels)]
    assert found[0] == (0, 1, 2, 0) and set(found) == {(0, 1, 2, 0), (1, 0, 1, 0), (2, 1, 0, 1)}
    assert figures.gain(before == labels, after == labels)[0] == pytest.approx(100 / 3)
    assert (
        figures.by_class(after == labels, labels, 4)[:3] == [100, 100, 0]
        and figures.by_class(after == labels, labels, 4)[3] != figures.by_class(after == labels, labels, 4)[3]
    )
    logits = sure(0.6, 0.9, 0.7, 0.8)
    assert figures.surest(logits, torch.tensor([True, False, True, True]), 2) == [3, 2]
    assert figures.surest(logits, torch.zeros(4, dtype=torch.bool), 2) == []


def test_numbers_are_written_as_they_are_read() -> None:
    assert [page.signed(value, 1) for value in (2.04, -0.35, -0.01, float("nan"))] == ["+2.0", "−0.3", "0.0", "–"]
    assert page.fixed(None, 2) == "–" and page.whole(233194) == "233,194"
    assert str(page.breakable("<a>_b")) == "&lt;a&gt;_<wbr>b"
    assert page.differences([{"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2, "d": []}], ["c"]) == [
        ("a.b", ["1", "3"]),
        ("d", ["–", "[]"]),
    ]


def test_of_many_classes_those_are_shown_that_changed_most(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlib.report.view.CLASSES", 2)
    view: View = look(open_run(made, CPU), 0, True)
    changes = [abs(row.change) for row in view.by_class]
    assert len(changes) == 2 and changes == sorted(changes, reverse=True)
