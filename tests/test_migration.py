"""docs/migration: kdlib's side runs and equals the peer's definition; the peer's side too, where it is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from torch import Tensor, nn

from kdlib import config, recipe, yaml12
from kdlib.losses import DKD, CrossEntropy, FeatureMSE, RKDDistance, SimilarityPreserving, SoftTarget

PAGES = ROOT / "docs" / "migration"
FENCE = re.compile(r"(?:<!-- peer: (\w+)(?: as (\w+))? -->\n)?```(\w+)\n(.*?)^```", re.M | re.S)
PEERS = {
    "timm": "timm", "torchdistill": "torchdistill", "model_optimizer": "modelopt",
    "neural_compressor": "neural_compressor", "lightly_train": "lightly_train",
}  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}


def installed(module: str) -> bool:
    """neural-compressor without distillation, as 3.x has it, counts as missing."""
    if find_spec(module) is None:
        return False
    return module != "neural_compressor" or (Path(find_spec(module).origin).parent / "training.py").exists()


def play(page: str, *, theirs: bool) -> dict[str, Any]:
    """What a page's blocks leave behind, run in order; the peer's only if asked for."""
    space: dict[str, Any] = {"__name__": "page"}
    for peer, name, language, text in FENCE.findall((PAGES / f"{page}.md").read_text()):
        if language == "text" or (peer and not theirs):
            continue
        if language == "yaml" and peer:
            space[name] = yaml.safe_load(text)
        elif language == "yaml":
            document = config.Document()
            document.overlay(yaml12.parse(text), page)
            assert recipe.load(document).terms
        else:
            assert language == "python", language
            exec(compile(text, f"{page}.md", "exec"), space)
    return space


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a folder of photographs."""
    from PIL import Image

    from kdlib.data.few import few_images

    (tmp_path / "images").mkdir()
    for i, image in enumerate((few_images("fashion-mnist-5k", 64, 28) * 255).byte()):
        Image.fromarray(image[0].numpy()).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ours(page: str) -> dict[str, Any]:
    return play(page, theirs=False)


def both(page: str) -> dict[str, Any]:
    if not installed(PEERS[page]):
        pytest.skip(f"{PEERS[page]} is not installed here; the page says in which version its side was run")
    return play(page, theirs=True)


def answers(space: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a fresh student answers in train mode, and a fresh teacher in eval mode."""
    student, teacher = space["models"]()
    with torch.no_grad():
        return student.train()(space["images"]), teacher.eval()(space["images"])


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of each sample and class, as every library here begins."""
    p, q = (teacher.double() / temperature).softmax(-1), (student.double() / temperature).softmax(-1)
    return p * (p.log() - q.log())


def trained(linear: nn.Module, theirs: nn.Module) -> None:
    """Their projection's weights into ours."""
    with torch.no_grad():
        for mine, yours in zip(linear.parameters(), theirs.parameters(), strict=True):
            mine.copy_(yours.reshape(mine.shape))


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md") if path.stem != "index"))
def test_pages_say_what_was_run_and_have_both_sides(page: str) -> None:
    text = (PAGES / f"{page}.md").read_text()
    assert re.search(r"\d+\.\d+", text.split("```")[0]), "no version"
    assert ("<!-- peer:" in text) == (page in PEERS) and (page in PEERS or "not run" in text)
    for title in ("## Word for word", "## What differs in number", "kdlib has not", "## What to watch for"):
        assert title in text, title


# timm


def test_timm() -> None:
    space = both("timm")
    torch.testing.assert_close(space["ours"], space["theirs"], **CLOSE)
    torch.testing.assert_close(space["our_token"], space["their_token"], **CLOSE)
    distiller, projection = space["feature_distiller"], space["feature_task"].trainable_module.projection
    trained(distiller.adapters["feature"]["global_pool"], projection)
    frozen = space["kd"].Teacher(space["models"]()[1], space["plan"].terms, prepare=space["renormalize"])
    again = distiller(space["images"], frozen(space["images"]) | {"@labels": space["labels"]}).loss
    torch.testing.assert_close(again, space["their_feature"], **CLOSE)


def test_timm_renormalizes_and_it_matters() -> None:
    space = ours("timm")
    _, teacher = space["models"]()
    plain = space["kd"].Teacher(teacher, space["distiller"].terms)(space["images"])
    out = space["distiller"](space["images"], plain | {"@labels": space["labels"]})
    assert abs(out.loss - space["ours"]) > 1e-4


# torchdistill


def test_torchdistill_ours() -> None:
    space = ours("torchdistill")
    s, t = answers(space)
    seen = space["frozen"](space["images"])["layer3"]
    student = space["models"]()[0]
    kept: list[Tensor] = []
    student.layer3.register_forward_hook(lambda *given: kept.append(given[2]))
    student(space["images"])
    maps = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (kept[0], seen)]
    soft = kl(s, t, 4.0).sum(-1).mean() * 16
    expected = 0.3 * F.cross_entropy(s, space["labels"]) + 0.7 * soft + 1000 * (maps[0] - maps[1]).pow(2).mean()
    torch.testing.assert_close(space["ours"], expected, **CLOSE)


def test_torchdistill_theirs() -> None:
    space = both("torchdistill")
    torch.testing.assert_close(space["ours"], space["theirs"], rtol=1e-5, atol=1e-5)
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.losses.mid_level import KDLoss, SPKDLoss

    student, teacher = space["models"]()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    box = get_distillation_box(teacher, student, {}, space["config"], torch.device("cpu"), None, False, 1.0)
    box.pre_epoch_process(epoch=0)
    box.forward_process(space["images"], space["labels"])
    changed = sum(not torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert changed, "the box put the teacher in eval mode: the page's first warning is out of date"
    assert not list(box.criterion.parameters()) and len(list(box.criterion.modules())) == 1

    a, b = torch.randn(8, 5), torch.randn(8, 5)
    held = [{".": {"output": x}} for x in (a, b)]
    assert torch.isclose(KDLoss(".", "output", ".", "output", 4.0, alpha=0.0)(*held) * 16, SoftTarget(4.0)(a, b))
    with pytest.raises(TypeError):
        KDLoss(".", "output", ".", "output", 4.0)
    assert not torch.isclose(SPKDLoss(".", ".", "batchmean")(*held), SimilarityPreserving()(a, b), rtol=0.1)


# Model-Optimizer and neural-compressor, which both divide by the classes


@pytest.mark.parametrize("page", ["model_optimizer", "neural_compressor"])
def test_division_by_classes(page: str) -> None:
    space = ours(page)
    s, t = answers(space)
    expected = 0.3 * F.cross_entropy(s, space["labels"]) + 0.7 * 16 * kl(s, t, 4.0).mean()
    torch.testing.assert_close(space["ours"], expected, **CLOSE)
    assert torch.isclose(SoftTarget(4.0)(s, t).double(), 10 * 16 * kl(s, t, 4.0).mean(), rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_model_optimizer_theirs() -> None:
    space = both("model_optimizer")
    torch.testing.assert_close(space["ours"], space["theirs"], **CLOSE)
    distiller = space["level_distiller"]
    for layer in ("layer3", "layer4"):
        trained(distiller.adapters["level"][layer], space["pairs"][layer, layer].project)
    again = distiller(space["images"], space["frozen"](space["images"])).loss
    torch.testing.assert_close(again, space["their_pairs"], **CLOSE)

    a, b = torch.randn(8, 5), torch.randn(8, 5)
    loss = space["mtd"].LogitsDistillationLoss
    assert torch.isclose(loss(4.0)(a, b), SoftTarget(4.0)(a, b) / 5)
    assert torch.isclose(loss(4.0, reduction="batchmean")(a, b), SoftTarget(4.0)(a, b))
    student, teacher = space["models"]()
    twice = {("layer4", "layer4"): space["Projected"](128, 256), ("layer4", "layer3"): space["Projected"](128, 128)}
    balancer = space["mtd"].StaticLossBalancer([0.5, 0.5])
    mode = ("kd_loss", {"teacher_model": teacher, "criterion": twice, "loss_balancer": balancer})
    model = space["mtd"].convert(student, mode=[mode])
    model(space["images"])
    with pytest.raises((AttributeError, TypeError)):
        model.compute_kd_loss()


def test_neural_compressor_cross_entropy_has_the_gradient_of_soft_targets() -> None:
    student, teacher = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    theirs = -((teacher / 4).softmax(-1) * (student / 4).log_softmax(-1)).sum(-1).mean() * 16
    mine = SoftTarget(4.0)(student, teacher)
    assert abs(theirs - mine) > 1
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (mine, theirs)), **CLOSE)
    squares = F.mse_loss(student / 4, teacher / 4) * 16
    torch.testing.assert_close(squares, FeatureMSE()(student, teacher), **CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_neural_compressor_theirs() -> None:
    space = both("neural_compressor")
    torch.testing.assert_close(space["ours"], space["theirs"], **CLOSE)
    criterion = space["layer_manager"].callbacks.callbacks_list[0].criterion
    matcher = criterion.feature_matchers["layer3"]
    trainable = {id(p) for p in space["layer_manager"].model.parameters()}
    assert not trainable & {id(p) for p in matcher.parameters()}
    distiller = space["layer_distiller"]
    trained(distiller.adapters["level"]["layer3"], matcher.dense)
    again = distiller(space["images"], space["frozen"](space["images"]) | {"@labels": space["labels"]}).loss
    torch.testing.assert_close(again, space["their_layers"], **CLOSE)


# MMRazor


def test_mmrazor_ours() -> None:
    space = ours("mmrazor")
    assert type(space["distiller"].adapters["deep"]["layer4"]).__name__ == "Sequential"
    s, t = answers(space)
    torch.testing.assert_close(
        space["out"].terms["soft"], kl(s, t, 4.0).sum(-1).mean() * 16, rtol=1e-4, atol=1e-6, check_dtype=False
    )
    torch.testing.assert_close(space["out"].terms["label"], CrossEntropy()(s, space["labels"]), **CLOSE)


def test_mmrazor_ratios() -> None:
    a, b, labels = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))
    torch.testing.assert_close(kl(a, b, 4.0).mean() * 16 * 5, SoftTarget(4.0)(a, b), **CLOSE)
    split = [torch.cat([x.gather(1, labels[:, None]), _others(x, labels)], 1) for x in (a, b)]
    both_parts = [(x / 4).softmax(-1) for x in split]
    two = [torch.stack([p[:, 0], p[:, 1:].sum(1)], 1) for p in both_parts]
    target = (two[1] * (two[1].log() - two[0].log())).sum()
    rest = kl(split[0][:, 1:], split[1][:, 1:], 4.0).sum()
    summed = 16 * (target + 8 * rest)
    torch.testing.assert_close(summed, 8 * DKD(1.0, 8.0, 4.0)(a, b, labels), rtol=1e-4, atol=1e-5, check_dtype=False)

    s, t = torch.randn(4, 6, 7, 7), torch.randn(4, 6, 7, 7)
    torch.testing.assert_close((s - t).pow(2).sum() / 4, 294 * FeatureMSE()(s, t), **CLOSE)
    e, f = torch.randn(8, 16), torch.randn(8, 16)
    assert RKDDistance()(F.normalize(e), F.normalize(f)) < 0.8 * RKDDistance()(e, f)


def _others(x: Tensor, labels: Tensor) -> Tensor:
    """The logits of all classes but the labelled one."""
    return torch.stack([torch.cat([row[:k], row[k + 1 :]]) for row, k in zip(x, labels.tolist(), strict=True)])


# LightlyTrain


def test_lightly_train_ours() -> None:
    space = ours("lightly_train")
    positions = space["Positions"]()
    s, t = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    rows = [(u @ u.mT).flatten(0, 1) for u in (F.normalize(x, dim=-1) for x in (s, t))]
    torch.testing.assert_close(positions(s, t), kl(*rows, 0.07).sum(-1).mean(), **CLOSE)
    queue, first, second = space["Queue"](size=6, width=5), *torch.randn(2, 4, 5)
    queue(first, first)
    queue(second, second)
    wanted = torch.cat([F.normalize(second, dim=-1), F.normalize(first, dim=-1)])[:6]
    torch.testing.assert_close(queue.bank, wanted)
    assert space["out"].loss.requires_grad and set(space["out"].terms) == {"global", "local"}
    assert space["distiller"].losses["global"].bank[:32].norm(dim=-1).allclose(torch.ones(32), atol=1e-5)
    assert not space["distiller"].losses["global"].bank[32:].any(), "the dry run left its images in the queue"


@pytest.mark.filterwarnings("ignore")
def test_lightly_train_theirs(desk: Path) -> None:
    space = both("lightly_train")
    assert (desk / "out" / "exported_models" / "exported_last.pt").exists()
    from lightly_train._methods.distillationv3.distillationv3_loss import DistillationV3Loss

    pooled, tokens = torch.randn(2, 8, 12), torch.randn(2, 8, 9, 12)
    queue = space["Queue"](size=16, width=12)
    mine = queue(*pooled), space["Positions"]()(*tokens)
    unit = [F.normalize(x, dim=-1) for x in (pooled[1], tokens[1], pooled[0], tokens[0])]
    yours = DistillationV3Loss(0.07, 0.07)(*unit, queue.bank)
    torch.testing.assert_close(mine, yours, **CLOSE)
