"""What the doctor tells of a recipe is what a hand-written loop, the runs themselves and plain arithmetic say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import Tiny, randomise
from torch import Tensor, nn

import kdlib as kd
import recipes.riformer.gfnet
import recipes.riformer.model  # noqa: F401  registers the models
from kdlib import cli
from kdlib.doctor import Diagnosis, Examined, _warnings, as_assignments, doctor
from kdlib.doctor.balance import Weighed, weigh
from kdlib.doctor.cost import Cost, Phase
from kdlib.doctor.graph import Compiled, try_compile
from kdlib.launch import read_config
from kdlib.recipe import load
from kdlib.training.compiling import BACKWARD


def parts(student: nn.Module, teacher: nn.Module, mixer: float = 0.5) -> tuple[kd.Distiller, kd.Teacher]:
    terms = [
        kd.Term("label", kd.losses.CrossEntropy()),
        kd.Term("soft", kd.losses.SoftTarget(2.0), weight=3.0),
        kd.Term("mixer", kd.losses.FeatureMSE(), mixer, pairs=kd.pair(student, teacher, "stages.*.blocks.-1.mixer")),
    ]
    return kd.Distiller(student, terms), kd.Teacher(teacher, terms)


@pytest.fixture
def batch() -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(6, 3, 8, 8), {"@labels": torch.tensor([0, 1, 2, 3, 4, 0])}


def flat(loss: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, model.parameters(), strict=True)]
    )


def test_terms_are_weighed_as_by_hand(student: nn.Module, teacher: nn.Module, batch) -> None:
    student.drop.p = 0.0
    images, given = batch
    distiller, ask = parts(student, teacher)
    found = {term.name: term for term in weigh(distiller, ask, [batch, batch], Accelerator())}
    taps = ["stages.0.blocks.1.mixer", "stages.1.blocks.1.mixer"]
    with kd.Taps(student.train(), taps) as mine:
        logits = student(images)
    with kd.Taps(teacher, taps) as theirs, torch.no_grad():
        answer = teacher(images)
    losses = {
        "label": F.cross_entropy(logits, given["@labels"]),
        "soft": kd.losses.SoftTarget(2.0)(logits, answer),
        "mixer": torch.stack([F.mse_loss(mine[tap], theirs[tap]) for tap in taps]).mean(),
    }
    task = flat(losses["label"], student)
    norms = {name: float(flat(loss, student).norm()) for name, loss in losses.items()}
    pull = {name: norms[name] * weight for name, weight in (("label", 1.0), ("soft", 3.0), ("mixer", 0.5))}
    for name, loss in losses.items():
        cosine = F.cosine_similarity(flat(loss, student), task, dim=0)
        assert found[name].value == pytest.approx(loss.item(), rel=1e-4)
        assert found[name].gradient == pytest.approx(norms[name], rel=1e-4)
        assert found[name].cosine == pytest.approx(float(cosine), abs=1e-4)
        assert found[name].share == pytest.approx(pull[name] / sum(pull.values()), rel=1e-4)
        assert found[name].proposal == pytest.approx(pull["label"] / norms[name], rel=0.05)
    assert found["label"].cosine == pytest.approx(1) and found["label"].proposal == 1
    assert distiller.weights_in_force() == {"label": 1.0, "soft": 3.0, "mixer": 0.5}, "as they were"
    assert all(p.grad is None for p in student.parameters())


def test_the_proposal_makes_all_pull_alike(student: nn.Module, teacher: nn.Module, batch) -> None:
    distiller, ask = parts(student, teacher)
    first = weigh(distiller, ask, [batch], Accelerator())
    assert max(term.share for term in first) > 0.45
    terms = [kd.Term(t.name, t.loss, f.proposal, pairs=t.pairs) for t, f in zip(distiller.terms, first, strict=True)]
    again = weigh(kd.Distiller(student, terms), kd.Teacher(teacher, terms), [batch], Accelerator())
    assert [term.share for term in again] == pytest.approx([1 / 3] * 3, abs=0.02)
    text = as_assignments(first)
    assert "terms.label" not in text and text.startswith(f"terms.soft.weight={first[1].proposal:g} terms.mixer.weight=")


def test_a_term_without_gradient_has_no_proposal(student: nn.Module, teacher: nn.Module, batch) -> None:
    nothing = kd.Term("nothing", lambda s, t: (s * 0).sum())
    terms = [kd.Term("soft", kd.losses.SoftTarget()), nothing]
    found = weigh(kd.Distiller(student, terms), kd.Teacher(teacher, terms), [batch], Accelerator())
    assert found[1].gradient == found[1].share == 0 and found[1].proposal is None


def test_nothing_is_balanced_by_a_term_that_is_off(student: nn.Module, teacher: nn.Module, batch) -> None:
    """The first term has weight 0: as the measure of all others it would switch every one of them off."""

    def weighed(*weights: float) -> list[Weighed]:
        terms = [
            kd.Term(name, kd.losses.FeatureMSE(), weight, pairs=[kd.Pair(tap, tap)])
            for name, weight, tap in zip("abc", weights, ("stem", "stages.0.blocks.0", "norm"), strict=True)
        ]
        return weigh(kd.Distiller(student, terms), kd.Teacher(teacher, terms), [batch], Accelerator())

    first, second, third = weighed(0.0, 2.0, 1.0)
    assert second.proposal == 2 and first.proposal == pytest.approx(2 * second.gradient / first.gradient, rel=0.05)
    assert third.proposal == pytest.approx(2 * second.gradient / third.gradient, rel=0.05)
    silent = weighed(0.0, 0.0, 0.0)
    assert [term.proposal for term in silent] == [None] * 3 and not as_assignments(silent)


def test_a_step_that_does_not_compile_says_why_and_runs_on(batch) -> None:
    class Asks(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 if float(x.sum()) > 0 else 2)

    student, teacher = randomise(Asks()), randomise(Tiny(), 2)
    distiller, ask = parts(student, teacher)
    found = try_compile(distiller, ask, batch, Accelerator(), "eager")
    assert found.error and found.seconds > 0 and "\n" not in found.error
    assert distiller(batch[0], ask(batch[0]) | batch[1]).loss.isfinite()
    distiller, ask = parts(randomise(Tiny()), randomise(Asks(), 2))
    assert try_compile(distiller, ask, batch, Accelerator(), "eager").error.startswith("teacher: ")
    assert try_compile(distiller, ask, batch, Accelerator(), "eager", compile_teacher=False).error == ""


def test_it_is_compiled_as_a_run_compiles(batch) -> None:
    """Backward passes as they run when nothing is compiled, which is the compiler's choice of its own otherwise."""

    def backend(graph, inputs):
        seen.append({name: getattr(functorch, name) for name in BACKWARD})
        return graph.forward

    seen: list[dict[str, object]] = []
    usual = dict.fromkeys(BACKWARD, "same_as_forward")
    with functorch.patch(usual):
        distiller, ask = parts(randomise(Tiny()), randomise(Tiny(), 2))
        assert try_compile(distiller, ask, batch, Accelerator(), backend).error == ""
        assert seen == [BACKWARD, BACKWARD] and {name: getattr(functorch, name) for name in BACKWARD} == usual


def test_time_is_counted_up() -> None:
    child = Cost("teacher", [Phase(1, 10, ("label",), 0.1)], 100, 2.0, 1, 5.0, [])
    whole = Cost("student", [Phase(1, 2, ("a", "b"), 0.5), Phase(3, 5, ("a",), 0.2)], 50, 3.0, 5, 9.0, [child])
    assert child.seconds == pytest.approx(10 * 100 * 0.1 + 2)
    assert whole.own == pytest.approx(2 * 50 * 0.5 + 3 * 50 * 0.2 + 15)
    assert whole.seconds == pytest.approx(whole.own + child.seconds)


@pytest.fixture(scope="module")
def found(small_run: Path) -> Diagnosis:
    """Of a recipe whose teachers are finished and whose student is not begun."""
    torch.set_num_threads(1)
    changes = [
        f"output={small_run.parent / 'another'}",
        "epochs=6",
        "terms.block.until=3",
        "terms.mixer.until=4",
        "terms.relation.until=2",
    ]
    return doctor(load(read_config([str(small_run / "config.yaml"), *changes])), batches=2, backend=None)


def test_a_variant_of_a_finished_run_is_examined_and_the_refusal_told(small_run: Path) -> None:
    """The run's own folder is taken; its teachers beside it are found all the same."""
    before = {path: path.stat().st_mtime_ns for path in small_run.rglob("*")}
    found = doctor(load(read_config([str(small_run / "config.yaml"), "terms.soft.weight=2"])), batches=1, backend=None)
    assert found.warnings[0].startswith("a run would be refused: output: ") and "another terms" in found.warnings[0]
    assert all(teacher.trained for teacher in found.teachers)
    assert {path: path.stat().st_mtime_ns for path in small_run.rglob("*")} == before
    assert not list(small_run.parent.glob("* examined"))


def test_finished_teachers_are_measured_as_their_runs_were(found: Diagnosis, small_run: Path) -> None:
    for teacher in found.teachers:
        folder = next(small_run.parent.glob(f"{teacher.model}-*"))
        told = json.loads((folder / "summary.json").read_text())["result"]["top1"]
        assert teacher.trained and teacher.images == 24 and teacher.top1 == pytest.approx(told)
        assert teacher.bridge == "as the student's" and teacher.chance == pytest.approx(100 / 3)
        assert teacher.expected == pytest.approx(told) and not teacher.short
    assert not (small_run.parent / "another").exists()


@pytest.mark.parametrize(("top1", "chance", "images", "by_chance"), [
    (81.7, 50.0, 60, False), (52.0, 50.0, 60, True), (31.7, 25.0, 60, True), (31.7, 25.0, 6000, False),
    (None, 25.0, 0, False),
])  # fmt: skip
def test_a_teacher_that_a_guess_might_equal_is_told(top1: float | None, chance: float, images: int, by_chance) -> None:
    teacher = Examined("wide", "gfnet", "file.pth", True, top1, None, chance, images, "as the student's")
    assert teacher.by_chance == by_chance
    told = " ".join(_warnings([teacher], []))
    assert ("are not those of its training" in told) == by_chance
    known = " ".join(_warnings([replace(teacher, expected=top1)], []))
    assert ("it has little to teach" in known) == by_chance and "of its training" not in known


@pytest.mark.parametrize(("top1", "expected", "images", "short"), [
    (80.0, 82.9, 512, False), (76.0, 82.9, 512, True), (80.0, 82.9, 50_000, True), (84.0, 82.9, 512, False),
    (None, 82.9, 0, False), (10.0, None, 512, False),
])  # fmt: skip
def test_a_teacher_that_misses_its_accuracy_by_more_than_chance_is_told(top1, expected, images, short: bool) -> None:
    teacher = Examined("wide", "gfnet", "file.pth", True, top1, expected, 0.1, images, "as the student's")
    assert teacher.short == short
    warned = [line for line in _warnings([teacher], []) if "wide" in line]
    assert [f"{expected:.2f} " in line and "teachers.wide.mean" in line for line in warned] == [True] * short


def test_the_schedule_is_timed_phase_by_phase(found: Diagnosis) -> None:
    phases = [(phase.first, phase.last, phase.terms) for phase in found.cost.phases]
    every = ("soft", "block", "mixer", "relation")
    assert phases == [(1, 2, every), (3, 3, every[:3]), (4, 4, ("soft", "mixer")), (5, 6, ("soft",))]
    assert all(phase.step > 0 for phase in found.cost.phases) and found.cost.steps == 4
    assert [child.title for child in found.cost.children] == ["baseline"], "teachers are finished and take nothing"
    assert found.cost.memory > 2**26 and found.cost.evaluations == 3  # eval_every is 2


@pytest.mark.parametrize(("mode", "warned"), [("graphs", False), ("compiled-graphs", True)])
def test_what_a_run_neither_compiles_nor_steps_is_not_told(
    mode: str, warned: bool, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(*given: object) -> Compiled:
        assert given[-1] is False, "the teacher is left out"
        return Compiled("eager", 1.0, "student: it looks at a value")

    monkeypatch.setattr("kdlib.doctor.try_compile", compiles)
    changes = [f"output={small_run.parent / 'another'}", f"compile={{mode: {mode}, teacher: false}}", "accumulate=2"]
    found = doctor(load(read_config([str(small_run / "config.yaml"), *changes])), batches=1)
    assert any("not all compiles whole" in line for line in found.warnings) == warned
    assert found.cost.steps == 2, "of two batches each"


def test_a_step_takes_as_long_as_its_batches(
    found: Diagnosis, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdlib.doctor.cost._time_batches", lambda *_: 0.5)
    changes = [f"output={small_run.parent / 'another'}", "accumulate=3", "baseline=null"]
    cost = doctor(load(read_config([str(small_run / "config.yaml"), *changes])), batches=1, backend=None).cost
    assert [phase.step for phase in cost.phases] == [1.5] and cost.steps == 1 and cost.seconds > 1.5


def test_the_command_tells_all_of_it_and_writes_nothing(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    new = ["output=runs/new", "teachers.wide.size=36", "teachers.wide.image_size=36", "epochs=1"]
    new.append("teachers.wide.recipe.data.image_size=36")
    code = cli.main(["doctor", str(small_run / "config.yaml"), "--batches", "1", *new, "--compile", "off"])
    answer = capsys.readouterr()
    assert code == 0, answer.err
    assert not answer.err and not list(tmp_path.iterdir())
    for said in ("to be trained first, 1 epochs", "28 → 36 px", "balanced", "ms a step", "all of it:", "peak memory: "):
        assert said in answer.out, said
    assert "! teacher wide is not trained yet" in answer.out and "hooks: 10 taps in 7 pairs" in answer.out
    assert cli.main(["doctor", str(small_run / "config.yaml"), "student.name=riformer_nan0"]) == 2
    assert capsys.readouterr().err.startswith("command line: student.name: no model 'riformer_nan0'; did you mean")
    for wrong, says in (("wid=80", "no teacher 'wid'; did you mean 'wide'?"), ("wide", "write TEACHER=TOP1")):
        assert cli.main(["doctor", str(small_run / "config.yaml"), "--expect", wrong]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(["doctor", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: cannot be read" in capsys.readouterr().err
