"""Teacher and Distiller: gradients equal a hand-written loop's, the teacher never changes, terms come and go."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, randomise
from torch import Tensor, nn

import kdlib as kd
from kdlib.losses import OFD, VID, CrossEntropy, FeatureMSE, GramRelation, SoftTarget

MIXERS = "stages.*.blocks.-1.mixer"


def objective(student: nn.Module, teacher: nn.Module) -> list[kd.Term]:
    return [
        kd.Term("soft", SoftTarget(2.0), 0.7),
        kd.Term("label", CrossEntropy(), 0.3),
        kd.Term("mixer", FeatureMSE(), 0.5, pairs=kd.pair(student, teacher, MIXERS), reduce="sum"),
        kd.Term("relation", GramRelation(), 2.0, pairs=kd.pair(student, teacher, "stages.*.blocks.-1")),
    ]


def by_hand(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The same objective as a person would write it, with her own hooks."""
    seen: dict[tuple[str, str], Tensor] = {}
    names = [f"stages.{s}.blocks.1{part}" for s in (0, 1) for part in (".mixer", "")]
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out, key=(who, name): seen.__setitem__(key, out))
        for who, model in (("s", student), ("t", teacher))
        for name in names
    ]
    with torch.no_grad():
        target = teacher(images)
    logits = student(images)
    for handle in handles:
        handle.remove()
    loss = 0.7 * SOFT(logits, target) + 0.3 * F.cross_entropy(logits, labels)
    mixer = torch.stack([F.mse_loss(seen["s", n], seen["t", n]) for n in names[::2]]).sum()
    sides = [[tokens(ordered(seen[who, n])) for who in "st"] for n in names[1::2]]
    relation = torch.stack([RELATION(s, t) for s, t in sides]).mean()
    return loss + 0.5 * mixer + 2.0 * relation


RELATION, SOFT = GramRelation(), SoftTarget(2.0)
"""The losses themselves, which test_losses_definitions.py proves: their gradients are written by hand, and autograd's
of the definitions have other last digits."""


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def ordered(x: Tensor) -> Tensor:
    """Its gradient comes back as a map, not as transposed tokens; sums are then those of the engine, digit by digit."""
    if x.requires_grad:
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient.contiguous())
    return x


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_equal_a_hand_written_loop_to_the_last_digit(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor
) -> None:
    terms = objective(student, teacher)
    ask, distiller = kd.Teacher(teacher, terms), kd.Distiller(student, terms)
    torch.manual_seed(7)
    out = distiller(images, ask(images) | {"@labels": labels})
    out.loss.backward()
    got = gradients(student)
    student.zero_grad()
    torch.manual_seed(7)
    loss = by_hand(student, teacher, images, labels)
    loss.backward()
    assert out.loss.item() == loss.item()
    for mine, hers in zip(got, gradients(student), strict=True):
        assert torch.equal(mine, hers)


class ByHand(nn.Module):
    """The same objective without hooks: the student's forward written out, so that it compiles as one graph."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor, labels: Tensor, targets: dict[str, Tensor]) -> Tensor:
        model, seen = self.student, {}
        x = model.stem(images)
        for s, stage in enumerate(model.stages):
            x = stage.down(x)
            for b, block in enumerate(stage.blocks):
                seen[f"stages.{s}.blocks.{b}.mixer"] = mixed = block.mixer(x)
                seen[f"stages.{s}.blocks.{b}"] = x = x + block.mlp(torch.tanh(mixed))
        logits = model.head(model.drop(model.norm(x).mean((2, 3))))
        loss = 0.7 * SOFT(logits, targets["@output"]) + 0.3 * F.cross_entropy(logits, labels)
        names = [f"stages.{s}.blocks.1.mixer" for s in (0, 1)]
        loss = loss + 0.5 * torch.stack([F.mse_loss(seen[n], targets[n]) for n in names]).sum()
        sides = [[tokens(side[n[:-6]]) for side in (seen, targets)] for n in names]
        return loss + 2.0 * torch.stack([RELATION(s, t) for s, t in sides]).mean()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "tolerance"), [("aot_eager", 0.0), ("inductor", 1e-5)])
def test_compiled_whole_gradients_are_a_hand_written_compiled_loops(
    images: Tensor, labels: Tensor, backend: str, tolerance: float
) -> None:
    """Both as one graph: to the last digit with the same kernels; Inductor fuses the two graphs in different places."""
    student, teacher = randomise(Tiny(), 1), randomise(Tiny(), 2)
    student.drop.p = 0.0  # a compiled graph draws other random numbers
    terms = objective(student, teacher)
    ask, distiller = kd.Teacher(teacher, terms), kd.Distiller(student, terms)
    distiller.compile(fullgraph=True, backend=backend)
    ask.compile(fullgraph=True, backend=backend)
    targets = ask(images)
    out = distiller(images, targets | {"@labels": labels})
    out.loss.backward()
    got = gradients(student)
    twin = copy.deepcopy(student)
    twin.zero_grad()
    loss = torch.compile(ByHand(twin), fullgraph=True, backend=backend)(images, labels, targets)
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=tolerance / 10, atol=0)
    for mine, hers in zip(got, gradients(twin), strict=True):
        torch.testing.assert_close(mine, hers, rtol=tolerance, atol=tolerance / 10)
    distiller.set_weights({"mixer": 0.0})  # a schedule that switches a term off recompiles once and is right
    student.zero_grad()
    distiller(images, targets | {"@labels": labels}).loss.backward()
    muted = gradients(student)
    student.zero_grad()
    eager = kd.Distiller(student, [term for term in terms if term.name != "mixer"])
    eager(images, targets | {"@labels": labels}).loss.backward()
    for mine, hers in zip(muted, gradients(student), strict=True):
        torch.testing.assert_close(mine, hers, rtol=1e-5, atol=1e-6)


def test_a_moving_weight_does_not_recompile(images: Tensor, labels: Tensor) -> None:
    student, teacher = randomise(Tiny(), 1), randomise(Tiny(), 2)
    terms = objective(student, teacher)
    ask, distiller = kd.Teacher(teacher, terms), kd.Distiller(student, terms)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    distiller.compile(fullgraph=True, backend=count)
    targets = ask(images) | {"@labels": labels}
    losses = []
    for weight in (0.5, 0.4, 0.3, 0.0, 0.0):
        distiller.set_weights({"mixer": weight})
        losses.append(distiller(images, targets).loss.item())
    assert len(graphs) == 2, "one graph, and one more when the term goes to zero"
    assert losses[0] > losses[1] > losses[2] > losses[3]


def test_under_activation_checkpointing(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> None:
    from torch.utils.checkpoint import checkpoint

    terms = objective(student, teacher)
    ask, distiller = kd.Teacher(teacher, terms), kd.Distiller(student.eval(), terms)
    targets = ask(images) | {"@labels": labels}
    distiller(images, targets).loss.backward()
    plain = gradients(student)
    student.zero_grad()
    for stage in student.stages:
        for block in stage.blocks:
            forward = type(block).forward.__get__(block)
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    distiller(images, targets).loss.backward()
    for mine, hers in zip(gradients(student), plain, strict=True):
        assert torch.equal(mine, hers)


@pytest.mark.fault("teacher")
def test_the_teacher_does_not_change_by_one_bit(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor
) -> None:
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    terms = objective(student, teacher)
    ask, distiller = kd.Teacher(teacher.train(), terms), kd.Distiller(student, terms)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1)
    ask.train()
    for _ in range(3):
        distiller(images, ask(images) | {"@labels": labels}).loss.backward()
        optimizer.step()
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_no_teacher_in_the_state_dict(student: nn.Module, teacher: nn.Module) -> None:
    distiller = kd.Distiller(student, objective(student, teacher))
    assert set(distiller.state_dict()) == {f"student.{key}" for key in student.state_dict()}


def test_two_teachers_and_an_idle_one(student: nn.Module, teacher: nn.Module, wide: nn.Module, images: Tensor) -> None:
    panel = kd.Panel({"wide": wide, "twin": teacher})
    terms = [
        kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "wide")]),
        kd.Term(
            "mixer", FeatureMSE(), pairs=kd.pair(student, panel, MIXERS, f"twin.{MIXERS}"), schedule=kd.Window(until=1)
        ),
    ]
    ask = kd.Teacher(panel, terms)
    ran: list[str] = []
    for name, member in panel.items():
        member.head.register_forward_hook(lambda *_, name=name: ran.append(name))
        member.stem.register_forward_hook(lambda *_, name=name: ran.append(f"{name}.stem"))
    targets = ask(images)
    assert set(targets) == {"wide", "twin.stages.0.blocks.1.mixer", "twin.stages.1.blocks.1.mixer"}
    torch.testing.assert_close(targets["wide"], wide(images))
    assert ran[:3] == ["wide.stem", "wide", "twin.stem"] and "twin" not in ran, "twin stops after its last tap"
    ran.clear()
    ask.set_epoch(1, 2)
    assert set(ask(images)) == {"wide"}
    assert ran == ["wide.stem", "wide"], "twin is idle"


def test_sum_and_mean_over_pairs(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    values = {}
    for how in ("sum", "mean"):
        terms = [kd.Term("mixer", FeatureMSE(), pairs=kd.pair(student, teacher, MIXERS), reduce=how)]
        values[how] = kd.Distiller(student.eval(), terms)(images, kd.Teacher(teacher, terms)(images)).loss
    torch.testing.assert_close(values["sum"], 2 * values["mean"])


def test_what_two_terms_share_is_not_idle_while_one_of_them_is_on(student: nn.Module, images: Tensor) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, s: Tensor, t: Tensor) -> Tensor:
            return (self.scale * (s - t)).square().mean()

    shared, own = Scaled(), Scaled()
    terms = [kd.Term("on", shared), kd.Term("off", shared, 0.0), kd.Term("other", own, 0.0)]
    distiller, targets = kd.Distiller(student, terms), {"@output": torch.randn(4, 5)}
    assert distiller.idle() == [own.scale]
    distiller(images, targets).loss.backward()
    assert own.scale.grad is None and shared.scale.grad is not None


def test_a_loss_of_lists_against_labels_alone_is_given_lists(
    student: nn.Module, images: Tensor, labels: Tensor
) -> None:
    class Deep(nn.Module):
        lists, against = True, ("labels",)

        def forward(self, heads: list[Tensor], labels: Tensor) -> Tensor:
            assert len(heads) == 2
            return torch.stack([F.cross_entropy(head.flatten(1), labels) for head in heads]).sum()

    term = kd.Term("deep", Deep(), pairs=[kd.Pair("stem", "@labels"), kd.Pair("@output", "@labels")])
    assert kd.Distiller(student, [term])(images, {"@labels": labels}).loss.requires_grad


def test_a_loss_against_labels_asks_no_teacher_whatever_its_pairs_say(
    student: nn.Module, images: Tensor, labels: Tensor
) -> None:
    aux = kd.Term("aux", CrossEntropy(), pairs=[kd.Pair("head")])
    assert (aux.teacher_taps, aux.targets, aux.pairs) == ((), ("@labels",), (kd.Pair("head", "@labels"),))
    own = kd.Term("own", nn.CrossEntropyLoss(), pairs=[kd.Pair("@output", "@labels")])
    assert (own.teacher_taps, own.targets) == ((), ("@labels",))
    out = kd.Distiller(student, [aux, own])(images, {"@labels": labels})
    torch.testing.assert_close(out.terms["aux"], F.cross_entropy(out.logits, labels))
    torch.testing.assert_close(out.terms["own"], out.terms["aux"])
    with pytest.raises(ValueError, match="term 'own' reads '@labels', which the targets lack"):
        kd.Distiller(student, [own])(images, {})


def test_schedules_move_weights_and_skip_terms(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    calls = []

    def probe(s: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return (s - t).square().mean()

    terms = [
        kd.Term("always", SoftTarget(), 2.0),
        kd.Term("early", probe, 3.0, kd.Ramp(1.0, 0.0, 0, 2)),
    ]
    ask, distiller = kd.Teacher(teacher, terms), kd.Distiller(student.eval(), terms)
    for epoch, expected in enumerate((3.0, 1.5, 0.0)):
        calls.clear()
        distiller.set_epoch(epoch, 3)
        ask.set_epoch(epoch, 3)
        out = distiller(images, ask(images))
        assert distiller.weights_in_force() == {"always": 2.0, "early": expected}
        parts = {"always": 2.0, "early": expected}
        torch.testing.assert_close(out.loss, sum(parts[name] * value for name, value in out.terms.items()))
        assert (len(calls) == 1) == (expected > 0) and ("early" in out.terms) == (expected > 0)


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_what_no_live_term_trains_has_no_gradient(
    student: nn.Module, wide: nn.Module, images: Tensor, backend: str
) -> None:
    """The student behind the last tap, and the adapter of a term that is off; of one process nobody waits for them."""
    terms = [
        kd.Term("stem", FeatureMSE(), pairs=[kd.Pair("stem", "stem")], adapter="linear"),
        kd.Term("block", FeatureMSE(), 0.0, pairs=[kd.Pair("stages.0.blocks.0", "stem")], adapter="linear"),
    ]
    plan = kd.fit(terms, student, wide, images)
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(wide, plan.terms)
    if backend != "none":
        distiller.compile(fullgraph=True, backend=backend)
    targets = ask(images)
    names = {parameter: name for name, parameter in distiller.named_parameters()}
    off = {name for name in names.values() if name.startswith("adapters.block")}
    behind = {name for name in names.values() if name.startswith("student.") and not name.startswith("student.stem")}
    assert {names[parameter] for parameter in distiller.idle()} == off and off and behind
    distiller(images, targets).loss.backward()
    without = {name for parameter, name in names.items() if parameter.grad is None}
    if backend == "none":
        assert without == off | behind
    else:  # the answer, which the graph gives, has a gradient of zero there
        assert off <= without
        assert not any(parameter.grad.any() for parameter, name in names.items() if name in behind - without)
    distiller.set_weights({"stem": 0.0})
    distiller(images, targets).loss.backward()  # nothing is on: zero, and no error


def test_a_module_of_the_student_that_a_loss_holds_is_not_idle(student: nn.Module, images: Tensor) -> None:
    class Held(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, s: Tensor, t: Tensor) -> Tensor:
            return (s - t).square().mean()

    terms = [kd.Term("label", CrossEntropy()), kd.Term("off", Held(student.head), 0.0)]
    assert kd.Distiller(student, terms).idle() == []


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_leaves_a_term_alone_that_begins_later(
    student: nn.Module, wide: nn.Module, images: Tensor, optimizer: type[torch.optim.Optimizer]
) -> None:
    """Of a gradient of zero weight decay would erode it, and Adam's averages would be blind to its first steps."""
    pairs = [kd.Pair("stages.0.blocks.0", "stages.0.blocks.0")]
    terms = [
        kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "@output")]),
        kd.Term("late", FeatureMSE(), 1.0, kd.Window(start=20), pairs, adapter="linear"),
    ]
    plan = kd.fit(terms, student, wide, images)
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(wide, plan.terms)
    adapter = next(distiller.adapters.parameters())
    before, step = adapter.detach().clone(), optimizer(distiller.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(21):
        assert torch.equal(adapter, before)
        distiller.set_epoch(epoch, 21)
        ask.set_epoch(epoch, 21)
        step.zero_grad()
        distiller(images, ask(images)).loss.backward()
        step.step()
    moved = (adapter - before * (1 - 1e-3 * 0.05)).abs()
    assert moved.max() > 0
    if optimizer is torch.optim.AdamW:
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


def test_weights_in_force_keep_their_precision(student: nn.Module) -> None:
    distiller = kd.Distiller(student, [kd.Term("soft", SoftTarget(), 1e-8), kd.Term("label", CrossEntropy(), 0.3)])
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.float):
        convert(distiller)
        assert distiller.weights.dtype == torch.float32
        assert torch.equal(distiller.weights, torch.tensor([1e-8, 0.3]))


def test_a_teacher_that_somebody_put_into_training_mode_stays_as_it_was(teacher: nn.Module, images: Tensor) -> None:
    ask = kd.Teacher(teacher, [kd.Term("soft", SoftTarget())])
    expected, before = ask(images)["@output"], teacher.norm.running_mean.clone()
    teacher.train()
    assert torch.equal(ask(images)["@output"], expected) and torch.equal(teacher.norm.running_mean, before)
    panel = kd.Teacher(kd.Panel({"a": teacher}), [kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "a")])])
    teacher.train()  # a member, of which the panel knows nothing
    assert torch.equal(panel(images)["a"], expected) and torch.equal(teacher.norm.running_mean, before)
    teacher.norm.train()
    panel.set_epoch(0, 1)
    assert torch.equal(panel(images)["a"], expected) and torch.equal(teacher.norm.running_mean, before)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_taps_come_off_by_one_call_and_a_failure_leaves_none(
    student: nn.Module, teacher: nn.Module, wide: nn.Module, images: Tensor
) -> None:
    panel = kd.Panel({"twin": teacher, "wide": wide})
    pairs = [kd.Pair("stem", "twin.stem"), kd.Pair("stem:input", "wide.stem:input")]
    terms = [kd.Term(f"term{i}", FeatureMSE(), pairs=[pair]) for i, pair in enumerate(pairs)]
    ask, distiller = kd.Teacher(panel, terms), kd.Distiller(student, terms)
    assert (hooks(panel), hooks(student)) == (2, 2)
    ask.remove()
    distiller.remove()
    assert (hooks(panel), hooks(student)) == (0, 0)
    misspelt = [terms[0], kd.Term("x", FeatureMSE(), pairs=[kd.Pair("stem", "wide.stm")])]
    for attempt in (lambda: kd.fit(misspelt, student, panel, images), lambda: kd.Teacher(panel, misspelt)):
        with pytest.raises(ValueError, match="no tap 'stm'"):
            attempt()
    assert (hooks(panel), hooks(student)) == (0, 0)


def test_deepcopy_and_pickle(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> None:
    terms = objective(student, teacher)
    targets = kd.Teacher(teacher, terms)(images) | {"@labels": labels}
    distiller = kd.Distiller(student.eval(), terms)
    loss = distiller(images, targets).loss
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert torch.equal(twin(images, targets).loss, loss)
        twin(images, targets).loss.backward()
        assert all(p.grad is None for p in student.parameters())


def test_stored_targets_are_as_good_as_a_teacher(student: nn.Module, images: Tensor) -> None:
    distiller = kd.Distiller(student, [kd.Term("soft", SoftTarget())])
    assert distiller(images, {"@output": torch.randn(4, 5)}).loss.requires_grad


def test_teacher_options_leave_its_answers_alone(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    terms = objective(student, teacher)
    plain = kd.Teacher(teacher, terms)(images)
    last = kd.Teacher(teacher, terms, channels_last=True)(images)
    half = kd.Teacher(teacher, terms, dtype=torch.bfloat16)(images)
    for tap, value in plain.items():
        torch.testing.assert_close(last[tap], value)
        assert (half[tap].float() - value).norm() < 0.02 * value.norm()
        assert half[tap].dtype == torch.bfloat16


def test_a_teacher_without_autocast_computes_in_its_own_precision(
    student: nn.Module, teacher: nn.Module, images: Tensor
) -> None:
    terms, seen = objective(student, teacher), []
    plain = kd.Teacher(teacher, terms)(images)
    mean = next(iter(teacher.parameters())).detach().clone()
    pure = kd.Teacher(teacher, terms, dtype=torch.bfloat16, autocast=False)
    for layer in teacher.modules():
        layer.register_forward_hook(
            lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype, torch.is_autocast_enabled("cpu")))
        )
    with torch.autocast("cpu", torch.bfloat16):  # of the loop around it; its norms would answer in float32
        told = pure(images)
    assert seen and set(seen) == {(torch.bfloat16, torch.bfloat16, False)}
    assert torch.equal(next(iter(teacher.parameters())), mean.bfloat16())
    for tap, value in plain.items():
        assert 0 < (told[tap].float() - value).norm() < 0.05 * value.norm()
    assert kd.Teacher(teacher.double(), terms, dtype=torch.float64, autocast=False)(images)["@output"].dtype == (
        torch.float64
    )
    with pytest.raises(ValueError, match="dtype="):
        kd.Teacher(teacher, terms, autocast=False)


def test_features_read_in_half_precision_give_the_same_loss_but_for_rounding(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor
) -> None:
    terms = objective(student, teacher)
    found = {}
    for dtype in (None, torch.bfloat16):
        targets = kd.Teacher(teacher, terms, dtype=dtype)(images)
        torch.manual_seed(3)
        student.zero_grad()
        out = kd.Distiller(student, terms, dtype=dtype)(images, targets | {"@labels": labels})
        assert out.loss.dtype == torch.float32
        out.loss.backward()
        found[dtype] = (out.loss.detach(), *gradients(student))
    for exact, rounded in zip(*found.values(), strict=True):
        assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_a_loss_is_given_both_sides_in_the_precision_asked_for(
    student: nn.Module, teacher: nn.Module, images: Tensor
) -> None:
    class Sees(nn.Module):
        view = "tokens"

        def forward(self, s: Tensor, t: Tensor) -> Tensor:
            self.seen = s.dtype, t.dtype
            return (s.float() - t.float()).square().mean()

    loss = Sees()
    terms = [kd.Term("block", loss, pairs=kd.pair(student, teacher, "stages.*.blocks.-1"))]
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        targets = kd.Teacher(teacher, terms, dtype=dtype)(images)
        out = kd.Distiller(student, terms, dtype=dtype)(images, targets)
        assert loss.seen == (expected, expected) and out.logits.dtype == torch.float32


def test_a_teacher_takes_images_in_any_memory_layout(teacher: nn.Module, images: Tensor) -> None:
    frozen = kd.Teacher(teacher, [kd.Term("soft", kd.losses.SoftTarget())])
    plain = frozen(images)["@output"]
    wide = torch.cat([images, images], dim=-1)[..., : images.shape[-1]]
    for same in (images.to(memory_format=torch.channels_last), wide):
        assert torch.allclose(frozen(same)["@output"], plain, atol=1e-6)


def test_renormalize_gives_the_teacher_its_own_input(teacher: nn.Module, images: Tensor) -> None:
    prepare = kd.Renormalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), (0.1, 0.2, 0.3), (1.0, 0.5, 0.25), size=(16, 16))
    seen = kd.Teacher(teacher, [kd.Term("soft", SoftTarget())], prepare=prepare)(images)["@output"]
    pixels = F.interpolate(images, (16, 16), mode="bicubic", antialias=True)
    pixels = pixels * torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
    theirs = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)
    torch.testing.assert_close(seen, teacher(theirs))


def test_what_is_wrong_says_so(student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    soft = kd.Term("soft", SoftTarget())
    with pytest.raises(ValueError, match="two terms share the name 'soft'"):
        kd.Distiller(student, [soft, soft])
    with pytest.raises(ValueError, match="there are no terms"):
        kd.Distiller(student, [])
    with pytest.raises(ValueError, match="plain word"):
        kd.Term("a.b", SoftTarget())
    with pytest.raises(TypeError, match=r"term 'soft': its loss is the class SoftTarget; make one of it"):
        kd.Term("soft", SoftTarget)
    with pytest.raises(TypeError, match=r"term 'x': pairs are a list, .* got \('stem', 'stem'\)"):
        kd.Term("x", FeatureMSE(), pairs=("stem", "stem"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be"):
        kd.Term("soft", SoftTarget(), weight=-1.0)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        kd.Term("soft", SoftTarget(), reduce="max")
    with pytest.raises(ValueError, match="term 'x': no view 'maps'; known: logits, embedding, tokens, map, raw"):
        kd.Term("x", FeatureMSE(), view="maps")
    with pytest.raises(ValueError, match="term 'x': adapters has 'stemm', which it does not tap; it taps 'stem'"):
        kd.Term("x", FeatureMSE(), pairs=[kd.Pair("stem", "stem")], adapters={"stemm": nn.Identity()})
    with pytest.raises(ValueError, match="no tap 'stemm' in Tiny; did you mean 'stem'"):
        kd.Distiller(student, [kd.Term("x", FeatureMSE(), pairs=[kd.Pair("stemm", "stem")])])
    with pytest.raises(ValueError, match="the panel has twin"):
        kd.Teacher(kd.Panel({"twin": teacher}), [soft])
    with pytest.raises(ValueError, match=r"term 'soft' reads '@output', which the targets lack .*same terms"):
        kd.Distiller(student, [soft])(images, {})
    with pytest.raises(ValueError, match="term 'label' reads '@labels'"):
        kd.Distiller(student, [kd.Term("label", CrossEntropy())])(images, {"@output": images})
    with pytest.raises(ValueError, match="no term 'sft'; the terms are soft"):
        kd.Distiller(student, [soft]).set_weights({"sft": 1.0})
    with pytest.raises(ValueError, match="weight -1 of term 'soft': weights are finite numbers from 0 up"):
        kd.Distiller(student, [soft]).set_weights({"soft": -1.0})
    with pytest.raises(ValueError, match=r"term 'soft': its schedule gives the factor -0\.5 at epoch 3"):
        kd.Distiller(student, [kd.Term("soft", SoftTarget(), schedule=kd.Ramp(1.0, -1.0))]).set_epoch(3, 4)
    with pytest.raises(RuntimeError, match="trains nothing of the student: tap '@output'"):
        kd.Distiller(student.requires_grad_(False), [soft])(images, {"@output": torch.randn(4, 5)})
    with pytest.raises(ValueError, match=r"no size yet; call kdlib\.fit"):
        kd.Distiller(student, [kd.Term("x", FeatureMSE(), pairs=[kd.Pair("stem", "stem")], adapter="linear")])


@pytest.mark.parametrize("loss", [VID(), 0.5 * VID(), OFD()], ids=["alone", "summed", "ofd"])
def test_a_loss_without_its_parameters_is_refused(student: nn.Module, loss: nn.Module) -> None:
    """The optimizer, made next, would miss them."""
    with pytest.raises(ValueError, match=r"term 'it': (VID|OFD) has no parameters yet.*kdlib\.fit does it"):
        kd.Distiller(student, [kd.Term("it", loss, pairs=[kd.Pair("stem", "stem")])])


@pytest.mark.parametrize("name", ["values", "type", "train", "forward", "pop", "training"])
def test_a_term_may_be_called_as_a_method_of_modules(wide: nn.Module, images: Tensor, name: str) -> None:
    """So may the submodule that it taps, say the values of an attention."""

    class Student(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.stages[1].down(self.values(self.stem(x)))).mean((2, 3)))

    student = Student()
    pairs = [kd.Pair("values", "stem"), kd.Pair("stem", "stages.0.blocks.0")]
    plan = kd.fit([kd.Term(name, FeatureMSE(), pairs=pairs, adapter="linear")], student, wide, images)
    distiller, ask = kd.Distiller(student, plan.terms), kd.Teacher(wide, plan.terms)
    out = distiller(images, ask(images))
    out.loss.backward()
    assert list(out.terms) == [name] and all(p.grad.any() for p in distiller.adapters.parameters())
    assert list(distiller.adapters.state_dict()) == [f"{name}/.values/.linear.weight", f"{name}/.stem.linear.weight"]
    distiller.load_state_dict(distiller.state_dict())
    distiller.set_weights({name: 0.0})
    assert len(distiller.idle()) == 2


@pytest.mark.parametrize("name", ["values", "pop", "training", "a.b"])
def test_a_teacher_may_not_be_called_as_a_method_of_modules(teacher: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=f"a teacher cannot be called '{name}'.*choose another"):
        kd.Panel({name: teacher})
