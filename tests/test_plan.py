"""The dry run: layouts, adapters and the plan, and every misfit found before training."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Tiny
from torch import Size, Tensor, nn

import kdlib as kd
from kdlib.adapters import adapt, build_adapter, find_layout, view_as
from kdlib.losses import CRD, OFD, VID, CrossEntropy, FeatureMSE, GramRelation, SoftTarget, VkD

SQUARE, TALL = Size((2, 3, 64, 64)), Size((2, 3, 64, 48))


@pytest.mark.parametrize(
    ("shape", "images", "layout"),
    [
        ((2, 10), SQUARE, "NC"),
        ((2, 96, 16, 16), SQUARE, "NCHW"),
        ((2, 16, 16, 96), SQUARE, "NHWC"),
        ((2, 512, 1, 1), SQUARE, "NCHW"),
        ((2, 64, 32), SQUARE, "NLC"),
        ((2, 65, 32), SQUARE, "NLC+1"),
        ((2, 197, 32), SQUARE, "NLC+1"),
        ((2, 201, 32), SQUARE, "NLC+5"),
        ((2, 32, 16, 12), TALL, "NCHW"),
        ((2, 16, 12, 32), TALL, "NHWC"),
        ((2, 32, 7, 5), TALL, "NCHW"),
        ((2, 12, 24), TALL, "NLC"),
    ],
)
def test_layouts_are_told_from_shapes(shape: tuple[int, ...], images: Size, layout: str) -> None:
    assert find_layout(Size(shape), images) == layout


def test_a_model_that_tells_its_prefix_is_believed() -> None:
    assert find_layout(Size((2, 17, 8)), SQUARE, prefix=1) == "NLC+1"


@pytest.mark.parametrize("shape", [(2, 16, 16, 16), (2, 23, 8), (2, 3, 4, 5, 6), (2, 8, 9, 10)])
def test_an_ambiguous_layout_asks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot be told: .*say layout="):
        find_layout(Size(shape), SQUARE)


@pytest.mark.parametrize(
    ("shape", "inputs", "what"),
    [
        ((2, 20, 16), (2, 20), "which are no images"),  # token ids: 19 tokens and one more would fit
        ((6, 32, 500), (6, 1, 4000), "which are no images"),  # a convolution over time
        ((9, 4, 16), (4, 3, 9, 9), "4 images cannot be told: not its first axis is theirs, but its second"),
    ],
)
def test_what_shapes_do_not_show_is_asked_for(shape: tuple[int, ...], inputs: tuple[int, ...], what: str) -> None:
    with pytest.raises(ValueError, match=rf"{what}.*; say layout=.*NLC: batch, sequence, channels"):
        find_layout(Size(shape), Size(inputs))
    for rows in (inputs[0], 8 * inputs[0]):  # logits at each position, or of crops
        assert find_layout(Size((rows, 10)), Size(inputs)) == "NC"


def test_windows_and_crops_are_more_than_images() -> None:
    assert find_layout(Size((8, 49, 16)), Size((2, 3, 56, 56))) == "NLC"
    assert find_layout(Size((8, 16, 7, 7)), Size((2, 3, 56, 56))) == "NCHW"


def test_tokens_that_are_no_grid_are_adapted_in_their_channels() -> None:
    adapter = build_adapter("linear", "tokens", Size((2, 40, 8)), Size((2, 64, 12)), Size((2, 3, 32, 32)))
    x = torch.randn(2, 40, 8)
    torch.testing.assert_close(adapt(adapter, x, "tokens", "NLC", Size((2, 3, 32, 32))), adapter.linear(x))


def test_views_agree_across_layouts() -> None:
    chw = torch.randn(2, 5, 4, 4)
    same = {"NCHW": chw, "NHWC": chw.permute(0, 2, 3, 1), "NLC": chw.flatten(2).mT}
    same["NLC+2"] = torch.cat([torch.randn(2, 2, 5), same["NLC"]], 1)
    for layout, x in same.items():
        assert torch.equal(view_as(x, "map", layout, SQUARE), chw)
        assert torch.equal(view_as(x, "tokens", layout, SQUARE), same["NLC"])
        torch.testing.assert_close(view_as(x, "embedding", layout, SQUARE), chw.mean((2, 3)))
        assert view_as(x, "raw", layout, SQUARE) is x
    with pytest.raises(ValueError, match="cannot be read as logits"):
        view_as(chw, "logits", "NCHW", SQUARE)
    with pytest.raises(ValueError, match="no layout 'NWHC'"):
        view_as(chw, "map", "NWHC", SQUARE)


def test_adapters_are_sized_by_the_dry_run_and_train(student: nn.Module, wide: nn.Module, images: Tensor) -> None:
    terms = [
        kd.Term("block", FeatureMSE(), pairs=kd.pair(student, wide, "stages.*.blocks.-1"), adapter="linear"),
        kd.Term(
            "up", FeatureMSE(), pairs=[kd.Pair("stages.1.blocks.1", "stages.0.blocks.1")], adapter="linear", view="map"
        ),
        kd.Term("same", GramRelation(), pairs=[kd.Pair("stages.0.blocks.0", "stages.0.blocks.0")]),
    ]
    plan = kd.fit(terms, student, wide, images)
    assert [row.parameters for row in plan.rows] == [60, 96, 80, 0]
    shapes = ["64×6 → 64×10", "16×8 → 16×12", "8×4×4 → 10×8×8"]
    assert all(shape in str(plan) for shape in [*shapes, "Project"])
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(wide, plan.terms)
    distiller(images, ask(images)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in distiller.adapters.parameters())


def test_an_adapter_that_no_pair_needs_is_not_missed(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    term = kd.Term("block", FeatureMSE(), pairs=kd.pair(student, teacher, "stages.*.blocks.-1"), adapter="linear")
    plan = kd.fit([term], student, teacher, images)
    assert not plan.terms[0].adapters
    kd.Distiller(student, plan.terms)


def test_the_dry_run_changes_nothing(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    student.train()
    student.norm.eval()  # a frozen layer stays as its owner left it
    state = {k: v.clone() for k, v in student.state_dict().items()}
    kd.fit([kd.Term("soft", SoftTarget())], student, teacher, images)
    assert student.training and not student.norm.training and student.drop.training
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    assert not student._forward_hooks and not any(m._forward_hooks for m in teacher.modules())


def test_swin_and_vit_and_cnn_meet() -> None:
    """NHWC, tokens with a class token, and NCHW in one plan, from real timm models."""
    student = timm.create_model("resnet10t", num_classes=7)
    panel = kd.Panel(
        {
            "swin": timm.create_model(
                "swin_tiny_patch4_window7_224", num_classes=7, img_size=64, window_size=2, depths=(1, 1, 1, 1)
            ),
            "vit": timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=64, depth=2),
        }
    )
    terms = [
        kd.Term("swin", FeatureMSE(), pairs=[kd.Pair("layer3", "swin.layers.2")], adapter="linear"),
        kd.Term("vit", FeatureMSE(), pairs=[kd.Pair("layer3", "vit.blocks.1")], adapter="linear"),
        kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "swin")]),
        kd.Term("label", CrossEntropy()),
    ]
    images = torch.randn(2, 3, 64, 64)
    plan = kd.fit(terms, student, panel, images)
    assert [row.layouts for row in plan.rows][:2] == [("NCHW", "NHWC"), ("NCHW", "NLC+2")]
    out = kd.Distiller(student, plan.terms)(
        images, kd.Teacher(panel, plan.terms)(images) | {"@labels": torch.tensor([1, 2])}
    )
    assert set(out.terms) == {"swin", "vit", "soft", "label"} and out.loss.isfinite()


def test_misfits_are_found_before_training(
    student: nn.Module, teacher: nn.Module, wide: nn.Module, images: Tensor
) -> None:
    with pytest.raises(ValueError, match="the student answers 5 classes, the teacher 7"):
        kd.fit([kd.Term("soft", SoftTarget())], student, Tiny(classes=7), images)
    block = kd.Term("block", FeatureMSE(), pairs=[kd.Pair("stages.0.blocks.0", "stages.0.blocks.0")])
    with pytest.raises(ValueError, match=r"term 'block', .*\(4, 64, 6\), teacher \(4, 64, 10\).*adapter='linear'"):
        kd.fit([block], student, wide, images)
    cube = Tiny((8, 8))
    with pytest.raises(ValueError, match=r"term 'block', student: the layout .*NCHW or NHWC.*layout="):
        kd.fit([block], cube, teacher, images)
    stated = kd.Term("block", FeatureMSE(), pairs=block.pairs, layout="NCHW", adapter="linear")
    assert kd.fit([stated], cube, teacher, images).rows[0].layouts == ("NCHW", "NCHW")
    with pytest.raises(ValueError, match="no adapter 'linaer'"):
        kd.fit([kd.Term("block", FeatureMSE(), pairs=block.pairs, adapter="linaer")], student, wide, images)


@pytest.mark.parametrize("loss", [VID(), 0.5 * VkD(), OFD()], ids=["vid", "sum", "ofd"])
def test_a_loss_that_learns_takes_one_pair(loss: nn.Module, student: nn.Module, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"term 'blocks': its loss learns .* got 2 pairs; give each a term"):
        kd.Term("blocks", loss, pairs=kd.pair(student, teacher, "stages.*.blocks.-1"))


def test_a_loss_that_remembers_images_takes_one_pair(student: nn.Module, teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"term 'crd': its loss remembers one feature of each image.*got 2; give each"):
        kd.Term("crd", CRD(40, 4, 8), pairs=kd.pair(student, teacher, "stages.*.blocks.-1"))


def test_a_model_given_in_the_wrong_place_is_as_it_was(student: nn.Module, wide: nn.Module, images: Tensor) -> None:
    """A notebook goes on after the mistake."""
    student.stem.requires_grad_(False)
    before = [parameter.requires_grad for parameter in student.parameters()]
    terms = [kd.Term("block", FeatureMSE(), pairs=[kd.Pair("stem", "stem")])]
    with pytest.raises(ValueError, match="adapter"):
        kd.fit(terms, wide, student, images)
    misspelt = [kd.Term("block", FeatureMSE(), pairs=[kd.Pair("stem", "stm")])]
    for attempt in (
        lambda: kd.Teacher(student, misspelt, dtype=torch.bfloat16, autocast=False),
        lambda: kd.Teacher(student, terms, prepare={"big": nn.Identity()}),
        lambda: kd.Teacher(student, terms, dtype=torch.int8),
        lambda: kd.Teacher(student, terms, dtype="bf16"),
    ):
        with pytest.raises((ValueError, TypeError), match=r"stm|give the module itself|bfloat16, got"):
            attempt()
    assert [parameter.requires_grad for parameter in student.parameters()] == before
    assert all(module.training for module in student.modules())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert not any(module._forward_hooks for module in student.modules())


def test_an_adapter_belongs_to_one_pair(student: nn.Module, wide: nn.Module, images: Tensor) -> None:
    """Two pairs of one student tap would share it, whatever their shapes."""
    pairs = [kd.Pair("stem", "stem"), kd.Pair("stem", "stages.0.blocks.0")]
    with pytest.raises(
        ValueError, match=r"'stem' is compared with stem, stages\.0\.blocks\.0 through one adapter; give"
    ):
        kd.fit([kd.Term("block", FeatureMSE(), pairs=pairs, adapter="linear")], student, wide, images)
    same = [kd.Term("block", FeatureMSE(), pairs=[kd.Pair("stem", "stem")] * 2, adapter="linear")]
    kd.fit(same, student, copy.deepcopy(student), images)  # where none is needed, none is shared


def test_a_misfit_names_its_own_pair(student: nn.Module, images: Tensor) -> None:
    """Not the first of the term; and a loss of one's own, whose error knows neither term nor tap, as well."""
    narrow = Tiny((6, 10))
    pairs = kd.pair(student, narrow, "stages.*.blocks.-1")
    second = r"term 'block', stages\.1\.blocks\.1 against stages\.1\.blocks\.1: "
    with pytest.raises(ValueError, match=second + r".*\(4, 16, 8\).*; adapter='linear' on the term"):
        kd.fit([kd.Term("block", FeatureMSE(), pairs=pairs)], student, narrow, images)
    bare = kd.Term("block", lambda s, t: (s - t).square().mean(), pairs=pairs)
    with pytest.raises(ValueError, match=second + "The size of tensor a .*; adapter='linear', with view='tokens'"):
        kd.fit([bare], student, narrow, images)
    broken = kd.Term("block", lambda s, t: s.oops, pairs=pairs[:1])
    with pytest.raises(ValueError, match=r"term 'block', stages\.0.*no attribute 'oops'$"):
        kd.fit([broken], student, narrow, images)
    both = kd.Term("block", VID(), pairs=pairs[:1]), kd.Term("again", FeatureMSE(), pairs=pairs[:1])
    loss = kd.fit(both, student, narrow, images).terms[0].loss
    with pytest.raises(ValueError, match=second + "VID was built for sizes"):
        kd.fit([kd.Term("block", loss, pairs=pairs[1:])], student, narrow, images)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_loss_gives_one_number(student: nn.Module, teacher: nn.Module, images: Tensor, reduce: str) -> None:
    """Over several pairs a loss of each element was added up in silence."""
    given = [(nn.MSELoss(reduction="none"), r"a tensor \(4, 6, 8, 8\)"), (lambda s, t: 0.5, "float")]
    for loss, what in given:
        for pairs in ([kd.Pair("stem", "stem")], [kd.Pair("stem", "stem")] * 2):
            terms = [kd.Term("gap", loss, pairs=pairs, reduce=reduce)]
            with pytest.raises(
                ValueError, match=f"term 'gap': its loss gives {what}, not one number.*reduction='mean'"
            ):
                kd.fit(terms, student, teacher, images)
            with pytest.raises(ValueError, match=f"term 'gap': its loss gives {what}"):
                kd.Distiller(student, terms)(images, kd.Teacher(teacher, terms)(images))


def test_a_dry_run_leaves_the_modes_of_a_loss(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.BatchNorm1d(5).eval()

        def forward(self, s: Tensor, t: Tensor) -> Tensor:
            assert not self.training
            return (self.frozen(s) - t).square().mean()

    loss = Own()
    kd.fit([kd.Term("own", loss)], student, teacher, images)
    assert loss.training and not loss.frozen.training


def test_a_loss_that_learns_from_labels_alone_is_sized(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    class Probe(nn.Module):
        view, against = "embedding", ("labels",)

        def fit(self, s: Tensor, t: None) -> None:
            self.head = nn.Linear(s.shape[1], 5)

        def forward(self, s: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(s), labels)

    terms = [kd.Term("soft", SoftTarget()), kd.Term("probe", Probe(), pairs=[kd.Pair("stages.0.blocks.0")])]
    plan = kd.fit(terms, student, teacher, images)
    assert plan.terms[1].loss.head.weight.shape == (5, 6)
    assert (plan.rows[1].teacher, plan.rows[1].shapes[1]) == ("@labels", ())


@pytest.mark.parametrize("taps", ["@output", "stem"])
def test_a_student_that_answers_with_several_tensors_is_told_so(teacher: nn.Module, images: Tensor, taps: str) -> None:
    class Several(Tiny):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return super().forward(x), x

    with pytest.raises(RuntimeError, match="the student answers with tuple, not one tensor; wrap it"):
        kd.fit([kd.Term("gap", FeatureMSE(), pairs=[kd.Pair(taps, taps)])], Several(), teacher, images)


@pytest.mark.parametrize("view", ["tokens", "map", "embedding"])
@pytest.mark.parametrize("autocast", [False, True], ids=["pure", "autocast"])
def test_adapters_in_half_precision(
    student: nn.Module, wide: nn.Module, images: Tensor, view: str, autocast: bool
) -> None:
    """On a CPU too, which resizes in float32 only."""
    if not autocast:
        student, wide, images = student.bfloat16(), wide.bfloat16(), images.bfloat16()
    loss = lambda s, t: (s.float() - t.float()).square().mean()  # noqa: E731
    pairs = [kd.Pair("stages.1.blocks.1", "stages.0.blocks.1")]
    prepare = kd.Renormalize((0.5,) * 3, (0.2,) * 3, (0.4,) * 3, (0.1,) * 3, size=(8, 8))
    plan = kd.fit(
        [kd.Term("up", loss, pairs=pairs, view=view, adapter="linear")], student, wide, images, prepare=prepare
    )
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(wide, plan.terms, prepare=prepare)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        distiller(images, ask(images)).loss.backward()
    own = list(distiller.adapters.parameters())
    assert own and all(p.grad.any() and p.dtype == images.dtype for p in own)


def test_an_adapter_that_is_sized_under_autocast_has_the_students_precision(
    student: nn.Module, wide: nn.Module, images: Tensor
) -> None:
    pairs = [kd.Pair("stages.1.blocks.1", "stages.0.blocks.1")]
    with torch.autocast("cpu", torch.bfloat16):
        plan = kd.fit([kd.Term("up", FeatureMSE(), pairs=pairs, adapter="linear")], student, wide, images)
    assert {p.dtype for p in plan.terms[0].adapters["stages.1.blocks.1"].parameters()} == {torch.float32}


def test_an_adapter_takes_tokens_in_the_grid_of_the_images_that_come() -> None:
    """Not in that of the dry run; images of another aspect ratio, whose tokens may be as many, are refused."""

    class Net(nn.Module):
        def __init__(self, channels: int, stride: int) -> None:
            super().__init__()
            self.body, self.fc = nn.Conv2d(3, channels, 3, stride, 1), nn.Linear(channels, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x).mean((2, 3)))

    def by_hand(images: Tensor, seen_by_teacher: Tensor) -> Tensor:
        theirs = teacher.body(seen_by_teacher)
        mine = F.interpolate(student.body(images), theirs.shape[-2:], mode="bilinear", antialias=True)
        return F.mse_loss(torch.einsum("bchw,dc->bdhw", mine, weight), theirs)

    student, teacher = Net(8, 4), Net(12, 8)
    prepare = kd.Renormalize((0,) * 3, (1,) * 3, (0,) * 3, (1,) * 3, size=(64, 64))
    term = kd.Term("gap", FeatureMSE(), pairs=[kd.Pair("body", "body")], adapter="linear")
    plan = kd.fit([term], student, teacher, torch.randn(2, 3, 64, 64), prepare=prepare)
    weight = plan.terms[0].adapters["body"].linear.weight
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(teacher, plan.terms, prepare=prepare)
    for side in (64, 96, 128):
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(distiller(images, ask(images)).loss, by_hand(images, prepare(images)))
    ask.remove()
    plan = kd.fit([term], student, teacher, torch.randn(2, 3, 48, 64))
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(teacher, plan.terms)
    images = torch.randn(2, 3, 64, 48)
    with pytest.raises(ValueError, match=r"'gap', student: the adapter was sized for images of 48×64, these are 64×48"):
        distiller(images, ask(images))


@pytest.mark.parametrize("adapter", [None, "linear"])
def test_a_tap_without_gradient_is_refused_though_its_adapter_has_one(adapter: str | None, images: Tensor) -> None:
    student, teacher = Tiny(), Tiny()
    student.stem.requires_grad_(False)
    pairs = [kd.Pair("stem", "stages.1.blocks.1" if adapter else "stem")]
    terms = [kd.Term("gap", FeatureMSE(), pairs=pairs, adapter=adapter)]
    plan = kd.fit(terms, student, teacher, images)
    targets = kd.Teacher(teacher, plan.terms)(images)
    with pytest.raises(RuntimeError, match="trains nothing of the student: tap 'stem' carries no gradient"):
        kd.Distiller(student, plan.terms)(images, targets)


def test_a_layout_that_one_pair_shows_holds_for_all() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).mean((2, 3))

    pairs, images = [kd.Pair("a", "a"), kd.Pair("b", "b")], torch.randn(2, 3, 16, 16)
    narrow = kd.Term("narrow", FeatureMSE(), pairs=pairs[:1])  # 8 channels on 8×8
    with pytest.raises(ValueError, match="it could be NCHW or NHWC"):
        kd.fit([narrow], Net(), Net(), images)
    assert kd.fit([kd.Term("both", FeatureMSE(), pairs=pairs)], Net(), Net(), images).terms[0].layout == (
        "NCHW",
        "NCHW",
    )


def test_images_are_renormalised_in_their_own_precision(images: Tensor) -> None:
    bridge = kd.Renormalize((0.5,) * 3, (0.2,) * 3, (0.4,) * 3, (0.1,) * 3, size=(12, 12))
    exact = bridge(images)
    whole = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(bridge(whole), bridge(whole.float()), atol=0.1, rtol=1e-3)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        made = bridge(images.to(dtype))
        assert made.dtype == dtype
        assert (made.float() - exact).norm() < 0.01 * exact.norm()


class Tail(Tiny):
    """After its stem it does what no pass that ends there comes to."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.tail == "again":
            self.stem(torch.zeros_like(x[:, :3]))
        elif self.tail == "changes":
            x += 1
        else:
            raise IndexError("images of this size have no end")
        return x.mean((2, 3))


def test_a_teachers_tap_that_fires_again_behind_its_early_stop_is_found(student: nn.Module, images: Tensor) -> None:
    terms = [kd.Term("stem", FeatureMSE(), pairs=[kd.Pair("stem", "stem")])]
    for model, read in ((Tail("again"), terms), (kd.Panel({"a": Tail("again")}), None)):
        read = read or [kd.Term("stem", FeatureMSE(), pairs=[kd.Pair("stem", "a.stem")])]
        with pytest.raises(RuntimeError, match="tap 'stem' fired twice in one forward"):
            kd.fit(read, student, model, images)
    for harmless in ("changes", "fails"):
        assert kd.fit(terms, student, Tail(harmless), images).rows[0].shapes[1] == (4, 64, 6)


def test_a_student_that_is_its_own_teacher_is_refused(student: nn.Module, images: Tensor) -> None:
    """It would be frozen, and the first step would complain of a student that trains nothing."""
    wrapped = nn.Sequential(student)
    for teacher, answer in ((student, "@output"), (kd.Panel({"me": student}), "me"), (wrapped, "@output")):
        terms = [kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", answer)])]
        with pytest.raises(ValueError, match=r"the student is the teacher.*give the teacher a copy, copy\.deepcopy"):
            kd.fit(terms, student, teacher, images)
    assert all(parameter.requires_grad for parameter in student.parameters())
    kd.fit(terms, student, copy.deepcopy(student), images)
