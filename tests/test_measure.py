"""The paper's measurements: what is counted is right, and each script leaves a JSON and a picture, or one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from matplotlib import image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdlib import recipe, runs
from kdlib.config import read
from kdlib.files import STUDENT
from kdlib.training import checkpoint, runfolder
from recipes.riformer import gfnet, model
from recipes.riformer.measure import affine_scales, clock, contestants, latency, ranking, receptive_field, throughput
from recipes.riformer.measure import tool as tool_
from recipes.riformer.measure.throughput import Job, Setting
from tests.conftest import ROOT

CPU = torch.device("cpu")
TOOLS = {
    "latency": latency,
    "receptive_field": receptive_field,
    "affine_scales": affine_scales,
    "throughput": throughput,
}
VERSIONS = {"device", "torch", "timm", "python", "date"}


def call(tool: str, *arguments: object) -> int:
    """The script's main in this process."""
    module = TOOLS[tool]
    return tool_.main(module.make_parser(), module.from_arguments, module.draw, list(map(str, arguments)))


def assert_drawn(path: Path) -> None:
    """A picture with ink in more than one colour on it, not only a frame."""
    pixels = torch.from_numpy(image.imread(path)[..., :3].copy())
    colours = (pixels * 15).round().flatten(0, 1).unique(dim=0)
    assert pixels.shape[0] > 200 and (pixels.mean(2) < 0.95).float().mean() > 0.01 and len(colours) > 12


# latency


def built(last: int, fused: bool = False, depth: int = 2) -> latency.PartialViT:
    return latency.PartialViT(last, "tiny", depth, 32, fused).eval()


def test_each_step_adds_exactly_its_operation() -> None:
    tokens, dim, depth = 4, 192, 2
    found = []
    for last in range(len(latency.STEPS)):
        net, counter = built(last), FlopCounterMode(display=False)
        with counter, torch.no_grad():
            net(torch.randn(1, 3, 32, 32))
        count = {kind: sum(isinstance(m, kind) for m in net.modules()) for kind in (nn.LayerNorm, latency.Attention)}
        found.append(
            (*count.values(), sum(isinstance(m, latency.Mlp) for m in net.modules()), counter.get_total_flops())
        )
    embed = 2 * tokens * dim * 3 * 16 * 16
    mixer = depth * 2 * (4 * tokens * dim**2 + 2 * tokens**2 * dim)
    mlp = depth * 2 * 8 * tokens * dim**2
    parts = [(0, 0, 0), (2, 0, 0), (2, 2, 0), (2, 2, 0), (4, 2, 0), (4, 2, 2), (4, 2, 2)]
    flops = [embed] * 2 + [embed + mixer] * 3 + [embed + mixer + mlp] * 2
    assert found == [(*part, number) for part, number in zip(parts, flops, strict=True)]


def test_shortcuts_add_what_went_in() -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for before, after in ((2, 3), (5, 6)):
            plain, shortened = built(before, depth=1), built(after, depth=1)
            shortened.load_state_dict(plain.state_dict())
            start = plain.patches(images).flatten(2).transpose(1, 2) + plain.position
            if before == 5:  # the second shortcut starts behind the first
                half = built(3, depth=1)
                half.load_state_dict(plain.state_dict(), strict=False)
                start = half(images)
            torch.testing.assert_close(shortened(images), plain(images) + start)


@pytest.mark.parametrize("fused", [False, True])
def test_every_sum_is_of_two_tensors_in_one_order(fused: bool) -> None:
    """Otherwise a shortcut costs ten times what it must, and the norms behind it with it."""
    net, seen = built(6, fused), list[bool]()

    def note(_: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        seen.extend((given[0].is_contiguous(), made.is_contiguous()))

    for block in net.blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        net(torch.randn(2, 3, 32, 32))
    assert seen == [True] * 4


def test_both_attentions_are_the_same_function() -> None:
    unfused, fused = built(6), built(6, fused=True)
    fused.load_state_dict(unfused.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), unfused(images), rtol=1e-4, atol=1e-5)


def test_the_papers_share_of_the_mixer() -> None:
    found = latency.shares(latency.PAPER)
    assert found["share"]["token mixer"] == pytest.approx(0.463, abs=5e-4)
    assert found["added_ms"]["channel MLP"] == pytest.approx(1196.3, abs=0.05)
    assert sum(found["share"].values()) == pytest.approx(1)


def test_latency_leaves_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "vit.json"
    small = (
        "--size",
        "tiny",
        "--depth",
        1,
        "--pixels",
        32,
        "--batch",
        1,
        "--runs",
        1,
        "--repeats",
        2,
        "--device",
        "cpu",
    )
    assert call("latency", *small, "--out", out) == 0
    report = json.loads(out.read_text())
    assert report.keys() >= VERSIONS | {"batch", "precision", "compiled", "depth", "size", "pixels", "runs", "repeats"}
    assert set(report["attention"]) == {"unfused", "fused"} and report["precision"] == "fp32"
    assert all(len(part["ms"]) == 7 and min(part["ms"]) > 0 for part in report["attention"].values())
    assert "token mixer's share" in capsys.readouterr().out
    assert_drawn(out.with_suffix(".png"))
    del report["attention"]["fused"]  # as a run that was cut off leaves it
    out.write_text(json.dumps(report))
    assert call("latency", "--draw", out, "--out", tmp_path / "again.png") == 0
    assert_drawn(tmp_path / "again.png")


# receptive field


def test_the_field_of_one_convolution_is_its_kernel() -> None:
    net = nn.Conv2d(3, 4, 3, padding=1)
    nn.init.constant_(net.weight, 0.5)
    field = receptive_field.receptive_field(net, torch.randn(2, 3, 9, 9))
    centre = receptive_field.middle(field)
    expected = torch.zeros(9, 9, dtype=torch.float64)
    expected[3:6, 3:6] = 4 * 0.5 * 2  # output channels, weight, images
    torch.testing.assert_close(field, expected)
    assert centre == (4.5, 4.5)
    assert receptive_field.shares(field, centre) == pytest.approx(
        {"20%": 9 / 81, "30%": 9 / 81, "50%": 9 / 81, "99%": 9 / 81}
    )


def test_the_field_of_the_identity_is_one_pixel() -> None:
    field = receptive_field.receptive_field(nn.Identity(), torch.randn(3, 1, 7, 7))
    centre = receptive_field.middle(field)
    assert field.nonzero().tolist() == [[3, 3]] and field[3, 3] == 3
    assert set(receptive_field.shares(field, centre).values()) == {1 / 49}
    assert receptive_field.radius(field, centre) == 0


def test_squares_lie_around_what_is_bright() -> None:
    """A convolution without the padding of its kernel looks beside its cell's middle, 5.6 here."""
    net = nn.Conv2d(1, 2, 3, stride=2)
    nn.init.constant_(net.weight, 0.5)
    field = receptive_field.receptive_field(net, torch.randn(2, 1, 9, 9))
    assert receptive_field.middle(field) == (5.5, 5.5)
    assert receptive_field.middle(field + 0.1 * field.max()) == (5.5, 5.5)
    assert receptive_field.shares(field, (5.5, 5.5))["99%"] == 9 / 81


def test_shares_are_of_squares_cut_at_the_border() -> None:
    field = torch.ones(4, 4)
    assert receptive_field.shares(field, (2.5, 2.5))["50%"] == 9 / 16  # 3 x 3 hold 9 of 16, and 1 x 1 one
    assert receptive_field.shares(field, (3.5, 3.5)) == {"20%": 4 / 16, "30%": 9 / 16, "50%": 9 / 16, "99%": 1.0}
    assert receptive_field.radius(torch.tensor([[0.0, 0.0, 1.0, 3.0]]), (0.5, 0.5)) == pytest.approx((2 + 9) / 4)


def test_the_field_of_a_global_filter_is_the_image_unless_it_passes_all() -> None:
    mixer = gfnet.GlobalFilter(3, (5, 7))

    def features(images: Tensor) -> Tensor:
        return mixer(images.flatten(2).mT).mT.unflatten(2, (5, 7))

    field = receptive_field.receptive_field(features, torch.randn(2, 3, 5, 7))
    assert (field > 1e-4 * field.max()).all()
    with torch.no_grad():
        mixer.complex_weight.copy_(torch.tensor([1.0, 0.0]).expand_as(mixer.complex_weight))
    field = receptive_field.receptive_field(features, torch.randn(2, 3, 5, 7))
    assert (field > 1e-4).nonzero().tolist() == [[2, 3]]


def test_a_map_that_does_not_depend_on_the_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not depend on the image"):
        receptive_field.receptive_field(lambda x: torch.zeros(1, 2, 3, 3), torch.randn(1, 1, 3, 3))


TINY = ["data.limit=64", "data.batch_size=32", "epochs=1", "threads=1", "schedule.warmup_epochs=0"]
KINDS = ("teachers.wide.recipe", "teachers.twin.recipe", "baseline")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a finished run, its weights never trained: each model's as drawn, the student's shifted."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    default = ROOT / "recipes" / "riformer" / "configs" / "default.yaml"
    children = [f"{kind}.schedule.warmup_epochs=0" for kind in KINDS]
    asked = recipe.load(read([str(default), *TINY, *children, f"output={folder}"]))
    ready = runs.get_ready(asked, runs.start(asked))
    assert ready.baseline is not None
    with torch.no_grad():
        for value in ready.student.parameters():
            value.mul_(1.5)
    for each in (ready, ready.baseline, *ready.teachers.values()):
        with runfolder.claimed(each.recipe):
            runfolder.finish(each.recipe, each.student, None, {"top1": 10.0}, 1.0)
    return folder


def test_the_fields_of_a_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "field.json"
    twin = next(run.parent.glob("metaformer_pool_nano-*")) / STUDENT
    given = (run, f"metaformer_pool_nano={twin}", "--labels", "again", "--images", 8, "--device", "cpu", "--out", out)
    assert call("receptive_field", *given) == 0
    report = json.loads(out.read_text())
    rows = {row["model"]: row for row in report["rows"]}
    everyone = ["student at its start", "baseline", "student", "teacher wide", "teacher twin", "again"]
    assert list(rows) == everyone and report.keys() >= VERSIONS and report["data"] == "fashion-mnist-5k"
    assert rows["teacher twin"]["map"] == rows["again"]["map"] != rows["student"]["map"]
    assert rows["student at its start"]["map"] != rows["student"]["map"]
    for row in rows.values():
        assert row["images"] == 8 and len(row["map"]) == len(row["map"][0]) == row["pixels"] == 28
        assert max(map(max, row["map"])) == 1 and 0 < row["area"]["20%"] <= row["area"]["99%"] <= 1
    assert_drawn(out.with_suffix(".png"))


def test_the_start_of_a_student_has_its_teachers_weights(run: Path) -> None:
    from recipes.riformer.measure import trained

    models = {each.label: each.net.state_dict() for each in trained.read_run(run, CPU)[0]}
    name = "stages.1.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(models["student at its start"][name], models["teacher twin"][name], rtol=0, atol=0)
    assert not torch.equal(models["student"][name], models["teacher twin"][name])


def test_a_run_without_its_teachers_still_shows_its_student(run: Path, tmp_path: Path) -> None:
    from recipes.riformer.measure import trained

    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for file in run.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    assert [each.label for each in trained.read_run(alone, CPU)[0]] == ["student"]


# affine scales


def with_scales(path: Path, scales: list[Tensor]) -> Path:
    """The weights of a riformer_nano with these scales, one tensor a stage, the same in each of its blocks."""
    net = timm.create_model("riformer_nano")
    with torch.no_grad():
        for stage, values in zip(net.stages, scales, strict=True):
            for block in stage.blocks:
                block.token_mixer.affine.weight.copy_(values.view(-1, 1, 1, 1))
    checkpoint.save_weights(net, path)
    return path


def test_statistics_of_known_scales(tmp_path: Path) -> None:
    low = torch.cat([torch.full((36,), -0.5), torch.full((12,), 0.5)])
    files = [
        with_scales(tmp_path / "a.safetensors", [low, torch.full((96,), 0.25)]),
        with_scales(tmp_path / "b.safetensors", [torch.zeros(48), torch.linspace(0, 1, 96)]),
    ]
    out = tmp_path / "scales.json"
    assert call("affine_scales", *files, "--labels", "one", "two", "--out", out) == 0
    report = json.loads(out.read_text())
    assert report.keys() >= VERSIONS and [each["label"] for each in report["models"]] == ["one", "two"]
    first = report["models"][0]["stages"]["0"]
    assert (first["count"], first["mean"], first["negative"]) == (96, pytest.approx(-0.25), 0.75)
    assert first["std"] == pytest.approx(0.1875**0.5)
    assert report["models"][1]["stages"]["0"]["negative"] == 0  # zero is not below zero
    assert report["models"][1]["stages"]["1"]["quantiles"]["median"] == pytest.approx(0.5)
    assert report["models"][0]["blocks"]["stages.1.blocks.1"]["mean"] == pytest.approx(0.25)
    assert_drawn(out.with_suffix(".png"))


def test_scales_of_a_run_folder(run: Path) -> None:
    report = affine_scales.measure([run])
    assert report["models"][0]["label"] == "run" and list(report["models"][0]["stages"]) == ["0", "1"]


# throughput


def test_a_complex_filter_is_the_real_one() -> None:
    images = torch.randn(2, 3, 28, 28)
    real, other = (contestants.build("gfnet_h_nano", form, 28, CPU, torch.float32) for form in ("real", "complex"))
    assert any(isinstance(each, contestants.ComplexFilter) for each in other.modules())
    with torch.no_grad():
        torch.testing.assert_close(other(images), real(images), rtol=1e-4, atol=1e-5)
    mixer, tokens = gfnet.GlobalFilter(3, (4, 5)), torch.randn(2, 20, 3)  # by itself: the next norm forgets its scale
    with torch.no_grad():
        torch.testing.assert_close(contestants.ComplexFilter(mixer)(tokens), mixer(tokens))
    half = contestants.build("gfnet_h_nano", "complex", 28, CPU, torch.bfloat16)
    assert half(images.bfloat16()).dtype == torch.bfloat16
    assert next(m.weight for m in half.modules() if isinstance(m, contestants.ComplexFilter)).dtype == torch.complex64


def test_forms_are_what_they_are_called() -> None:
    full, norm, train = (
        contestants.build("riformer_nano", f, 28, CPU, torch.float32) for f in ("full", "norm", "train")
    )
    assert (full.form, norm.form, train.form) == ("full", "norm", "train")
    ours = contestants.build("poolformer_s12", "kdlib", 224, CPU, torch.float32)
    assert isinstance(ours, model.MetaFormer) and ours.token_mixer == "pool"


def test_what_the_headline_needs_comes_first() -> None:
    jobs = throughput.order(throughput.MODELS, throughput.SETTINGS)
    assert len(jobs) == len(set(jobs)) == 8 * (5 + 2 * 5 + 2) + 5  # and five RIFormers by kernels
    first = ["riformer_m36", "poolformer_m36", "gfnet_h_b", "gfnet_h_b", "riformer_m36"]
    first += ["riformer_s12", "poolformer_s12", "riformer_s12"]
    assert [job.model for job in jobs[:8]] == first
    assert [str(job.setting) for job in jobs[:8] if job.form == "kernels"] == ["eager-bf16-channels_last"] * 2
    assert {str(job.setting) for job in jobs[:8] if job.form != "kernels"} == {"compiled-bf16-channels_last"}
    headline = {"riformer_m36", "poolformer_m36", "gfnet_h_b", "riformer_s12", "poolformer_s12"}
    half = [job for job in jobs if job.setting.precision == "bf16"]
    assert jobs[: len(half)] == half and {job.model for job in half[: 4 * 8 + 2]} == headline
    left = [job.setting.mode for job in jobs if job.model == "riformer_m36" and job.setting.precision == "fp32"]
    assert left == ["eager", "eager", "compiled", "compiled"]  # whether to compile is judged by eager


def row(setting: str, speed: float, form: str = "timm", name: str = "poolformer_m36") -> dict[str, object]:
    return {"model": name, "form": form, "setting": setting, "images_per_second": speed, "pixels": 224}


def test_only_what_cannot_win_is_skipped() -> None:
    job = Job("poolformer_m36", "timm", Setting("compiled", "fp32", "channels_last"))
    half = [row("compiled-bf16-channels_last", 3000.0), row("eager-bf16-contiguous", 1500.0)]
    assert throughput.reason_to_skip(job, half) is None  # eager fp32 is not known
    assert "1,500 images/s" in str(throughput.reason_to_skip(job, [*half, row("eager-fp32-contiguous", 500.0)]))
    assert throughput.reason_to_skip(job, [*half, row("eager-fp32-contiguous", 1100.0)]) is None
    tokens = Job("riformer_m36", "full", Setting("compiled", "bf16", "contiguous"))
    assert throughput.reason_to_skip(tokens, []) is None
    assert throughput.reason_to_skip(tokens, [row("compiled-bf16-channels_last", 1.0, "full", "riformer_m36")])
    assert (
        throughput.reason_to_skip(tokens._replace(form="norm"), [row("compiled-bf16-channels_last", 1.0, "norm")])
        is None
    )


def test_the_goals_are_of_m36_and_s12_alone() -> None:
    assert set(contestants.GOALS) == {
        (f"riformer_{size}", rival) for size in ("m36", "s12") for rival in contestants.rivals(f"riformer_{size}")
    }


def test_ratios_are_of_each_models_best() -> None:
    rows = [
        row("eager-bf16-contiguous", 100.0),
        row("compiled-bf16-channels_last", 2018.9, "kdlib"),
        {
            "model": "gfnet_h_b",
            "form": "real",
            "setting": "eager-bf16-contiguous",
            "pixels": 224,
            "failed": "no memory",
        },
        row("eager-fp32-contiguous", 939.2, "complex", "gfnet_h_b"),
        row("compiled-bf16-channels_last", 3555.99, "full", "riformer_m36"),
    ]
    best = ranking.best_of(rows)
    assert {each["model"]: (each["form"], each["share_of_paper"]) for each in best} == {
        "poolformer_m36": ("kdlib", pytest.approx(2.0)),
        "gfnet_h_b": ("complex", pytest.approx(1.0)),
        "riformer_m36": ("full", pytest.approx(3.0)),
    }
    pool, wide = ranking.ratios(best)
    assert (pool["against"], pool["goal"], pool["reached"]) == ("poolformer_m36", 1.5, True)
    assert pool["ratio"] == pytest.approx(3555.99 / 2018.9) and pool["paper"] == pytest.approx(1.174, abs=1e-3)
    assert (wide["against"], wide["goal"]) == ("gfnet_h_b", 2.0) and wide["share_of_paper"] == pytest.approx(3.0)
    assert "| riformer_m36 / poolformer_m36 | 1.76 | 1.17 | 1.50 x | 1.5 reached |" in ranking.show(
        {"best": best, "ratios": [pool]}
    )


EAGER = ("eager-bf16-contiguous", "eager-fp32-channels_last")


def test_throughput_leaves_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    given = ("--models", "riformer_nano", "metaformer_pool_nano", "gfnet_h_nano", "--settings", *EAGER, "--batch", 2)
    assert call("throughput", *given, "--runs", 1, "--repeats", 1, "--device", "cpu", "--out", out) == 0
    report = json.loads(out.read_text())
    assert report.keys() >= VERSIONS | {"batch", "rows", "skipped", "best", "ratios", "runs", "repeats"}
    assert len(report["rows"]) == 2 * 4 and {each["model"] for each in report["best"]} == set(given[1:4])
    assert [each["against"] for each in report["ratios"]] == ["metaformer_pool_nano", "gfnet_h_nano"]
    assert "| riformer_nano / gfnet_h_nano |" in capsys.readouterr().out
    assert_drawn(out.with_suffix(".png"))


def test_a_setting_that_fails_keeps_its_reason_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    build, kept = contestants.build, []

    def breaking(name: str, form: str, *rest: object) -> nn.Module:
        if form == "complex":
            raise torch.OutOfMemoryError("no room\nfor it")
        return build(name, form, *rest)

    monkeypatch.setattr(contestants, "build", breaking)
    settings = [Setting("eager", "fp32", "contiguous")]
    report = throughput.measure(
        ["gfnet_h_nano"], CPU, settings=settings, batch=1, runs=1, repeats=1, keep=lambda r: kept.append(len(r["rows"]))
    )
    assert [each.get("failed") for each in report["rows"]] == [None, "OutOfMemoryError: no room for it"]
    assert report["best"][0]["form"] == "real" and kept == [1, 2]


def test_a_budget_that_is_used_up_says_what_was_left_out() -> None:
    report = throughput.measure(
        ["riformer_nano"], CPU, settings=throughput.SETTINGS, batch=1, runs=1, repeats=1, budget=0
    )
    assert not report["rows"] and not report["best"] and len(report["skipped"]) == 9
    reasons = {each["form"]: each["reason"] for each in report["skipped"]}
    assert reasons == {"full": "0 s were left of the budget", "kernels": "the kernels need a GPU"}


def test_a_first_look_that_is_too_slow_is_not_repeated() -> None:
    job = Job("riformer_nano", "full", Setting("eager", "fp32", "contiguous"))
    assert throughput.run_one(job, CPU, 1, 28, 5, 2, best=0.0)["passes"] == 10
    assert throughput.run_one(job, CPU, 1, 28, 5, 2, best=1e9)["passes"] == 3


# the command lines

WRONG = [
    ("latency", ["--pixels", "65"], "patches of 16 px must tile the image"),
    ("latency", ["--batch", "0"], "expected a whole number, at least 1 (got 0)"),
    ("latency", ["--size", "huge"], "invalid choice: 'huge'"),
    ("latency", ["--device", "tpu"], "expected cpu, cuda or cuda:NUMBER"),
    ("latency", ["--device", "cuda:99"], "this machine shows"),
    ("latency", ["--out", "x.txt"], "ends in .json"),
    ("latency", ["--out", "nowhere/x.json"], "there is no folder nowhere"),
    ("latency", ["--draw", "nowhere.json"], "nowhere.json"),
    ("latency", ["--draw", str(ROOT / "pyproject.toml")], "is no JSON"),
    ("latency", ["--draw", str(ROOT / "benchmarks/results/inference_cpu.json")], "is no result of this script"),
    ("receptive_field", [], "name a run folder"),
    ("receptive_field", ["nowhere"], "no run is there"),
    ("receptive_field", ["resnet_nano=x.pth"], "timm knows no such model"),
    ("receptive_field", ["riformer_nano=x.pth"], "no file x.pth"),
    ("receptive_field", ["riformer_nano=x.pth", "--labels", "a", "b"], "2 given for 1 sources NAME=FILE"),
    ("receptive_field", ["riformer_nano=x.pth", "--data", "folder"], "expected key=value"),
    ("receptive_field", ["riformer_nano=x.pth", "--data", "nme=folder"], "nme"),
    ("affine_scales", [], "name a run folder"),
    ("affine_scales", ["nowhere"], "holds no student.safetensors"),
    ("affine_scales", ["a", "b", "--labels", "one"], "1 given for 2 sources"),
    ("throughput", ["--models", "riformer_s13"], "timm knows no model 'riformer_s13'"),
    ("throughput", ["--models", "riformer_s12:fast"], "has the forms full, kernels, norm, train"),
    ("throughput", ["--settings", "compiled"], "no setting 'compiled'"),
]


@pytest.mark.parametrize(("name", "arguments", "said"), WRONG, ids=lambda part: str(part)[:40])
def test_wrong_input_is_one_line_and_exit_code_2(
    name: str,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(name, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_fused_weights_have_no_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save_weights(model.fuse(timm.create_model("riformer_nano").eval()), tmp_path / "fused.safetensors")
    assert call("affine_scales", tmp_path / "fused.safetensors") == 2
    assert "has no affine token mixer" in capsys.readouterr().err


def test_a_stage_that_is_not_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("receptive_field", run, "--stage", 2, "--images", 1) == 2
    assert "has the stages 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["latency", "throughput"])
def test_clocks_need_no_pydantic_and_start_as_scripts(name: str, tmp_path: Path) -> None:
    """A machine that is lent for an hour has torch and timm, and little more."""
    script = ROOT / "recipes" / "riformer" / "measure" / f"{name}.py"
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['pydantic', 'accelerate', 'rich', 'yaml']));"
        f"sys.argv = ['{name}', '--help']; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "--draw" in done.stdout, done.stderr


def test_precision_says_what_multiplies() -> None:
    try:
        assert clock.set_precision("tf32") == torch.float32 and torch.backends.cudnn.allow_tf32
        assert clock.set_precision("fp32") == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_forms_are_compared_with_the_train_forms_best_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inference

    rows = [
        {"form": "train", "images_per_second": 100.0}, {"form": "train", "images_per_second": 50.0},
        {"form": "full", "images_per_second": 150.0}, {"form": "kernels", "failed": "no GPU"},
    ]  # fmt: skip
    assert [row["of_train"] for row in inference.compared(rows)] == [1.0, 0.5, 1.5]
    assert inference.compared(rows[2:]) == [{"form": "full", "images_per_second": 150.0, "of_train": None}]
    known = {name for group in inference.jobs(cpu=True) + inference.jobs(cpu=False) for name in group}
    assert {"riformer_micro:train", "riformer_m36:kernels", "gfnet_h_b:real"} <= known
    for name in known:
        throughput.order([name], throughput.SETTINGS[:1])  # knows every model and form
