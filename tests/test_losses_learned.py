"""Sizes, heads, schedules and precision of the losses that learn; and what wrappers pass on."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from laws import finite, fresh, leaves, subject
from torch import nn

from kdlib import losses
from kdlib.losses.learned import run

torch.set_num_threads(1)


def maps(channels=6, batch=4, grid=4):
    return torch.randn(batch, channels, grid, grid)


@pytest.mark.parametrize("kind", [losses.SimKD, losses.SRRL])
def test_the_teachers_head_is_held_frozen_and_never_saved(kind):
    head = nn.Linear(8, 5)
    before = copy.deepcopy(head.state_dict())
    loss = kind()
    loss.fit(maps(6), maps(8), head)
    assert not any("held" in name or "head" in name for name in loss.state_dict())
    shapes = {tuple(p.shape) for p in loss.parameters()}
    assert (5, 8) not in shapes
    loss.train()
    assert not loss.held[0].training
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    loss(maps(6), maps(8)).backward()
    optimizer.step()
    for mine in (loss.held[0], head):
        assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert head.weight.requires_grad, "the teacher's own head is left alone"
    assert all(p.grad is None for p in loss.held[0].parameters())
    saved = io.BytesIO()
    torch.save(loss.state_dict(), saved)
    other = kind(student_channels=6, teacher_channels=8, head=head)
    other.load_state_dict(loss.state_dict())


def test_the_head_moves_with_the_loss():
    loss = losses.SRRL(student_channels=6, teacher_channels=8, head=nn.Linear(8, 5)).double()
    assert loss.held[0].weight.dtype == torch.float64
    assert loss.to("meta").held[0].weight.device.type == "meta"


def test_the_head_is_copied_and_pickled():
    loss = losses.SimKD(student_channels=6, teacher_channels=8, head=nn.Linear(8, 5)).eval()
    student = maps(6)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other.predict(student), loss.predict(student))
        assert other.held[0] is not loss.held[0]


def test_a_missing_head_is_named():
    loss = losses.SRRL(student_channels=6, teacher_channels=8)
    with pytest.raises(ValueError, match="SRRL needs the teacher's classifier"):
        loss(maps(6), maps(8))


def test_the_gradient_passes_through_the_head():
    loss = losses.SRRL(alpha=0.0, student_channels=6, teacher_channels=8, head=nn.Linear(8, 5))
    student = maps(6).requires_grad_()
    loss(student, maps(8)).backward()
    assert student.grad.abs().sum() > 0


def test_half_of_the_sizes_is_an_error():
    with pytest.raises(ValueError, match="all of its sizes or none"):
        losses.VID(student_channels=3)


def test_precision_of_parameters_does_not_matter():
    """Parameters in bfloat16 (a model cast whole) still compute in float32, and running statistics are kept."""
    loss = losses.SimKD(student_channels=6, teacher_channels=8)
    half = copy.deepcopy(loss).bfloat16()
    student, teacher = maps(6).bfloat16(), maps(8).bfloat16()
    value = half(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(student, teacher).item(), rel=0.02)
    value.backward()
    assert half.project[0].weight.grad.dtype == torch.bfloat16
    assert half.project[1].running_mean.abs().sum() > 0
    assert half.project[1].num_batches_tracked == 1


def test_run_is_the_module_itself_in_its_own_precision():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert torch.equal(run(module, x), module(x))
    assert run(module, x.double()).dtype == torch.float64


def test_ofd_takes_its_margin_from_the_examples():
    torch.manual_seed(0)
    teacher = torch.randn(64, 3, 8, 8) * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1) + 0.3
    loss = losses.OFD()
    loss.fit(teacher, teacher)
    negative = torch.stack([channel[channel < 0].mean() for channel in teacher.movedim(1, 0)])
    torch.testing.assert_close(loss.margin.flatten(), negative, rtol=0.05, atol=0.01)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.fill_(0.3)
    from_norm = losses.OFD(norm, student_channels=3, teacher_channels=3)
    torch.testing.assert_close(from_norm.margin.flatten(), negative, rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match="margin"):
        losses.OFD(student_channels=3, teacher_channels=3)(teacher, teacher)
    assert "margin" in loss.state_dict()


def test_ofd_takes_its_margin_from_a_state_dict():
    """Also one that lies deeper, and not from a state dict without it."""
    fitted, (student, teacher) = losses.OFD(), torch.randn(2, 4, 3, 5, 5)
    fitted.fit(student, teacher)
    held = nn.ModuleDict({"ofd": losses.OFD(student_channels=3, teacher_channels=3)})
    state = {f"ofd.{name}": value for name, value in fitted.state_dict().items()}
    held.load_state_dict({name: value for name, value in state.items() if "margin" not in name}, strict=False)
    with pytest.raises(ValueError, match="has no margin"):
        held["ofd"](student, teacher)
    held.load_state_dict(state)
    for loss in (held["ofd"], copy.deepcopy(held["ofd"]), pickle.loads(pickle.dumps(held["ofd"]))):
        assert torch.equal(loss.eval()(student, teacher), fitted.eval()(student, teacher))
    held["ofd"].fit(student, torch.randn(4, 3, 5, 5))
    assert torch.equal(held["ofd"].margin, fitted.margin), "what was loaded is not found anew"


def test_ofd_margin_of_a_channel_that_is_never_negative():
    margin = losses.overhaul.margin_of(torch.tensor([0.1]), torch.tensor([5.0]))
    assert margin.item() == pytest.approx(-0.3)


@pytest.mark.parametrize("sizes", [(6, 10), (10, 6), (6, 6)])
def test_vkd_projects_orthogonally_and_stays_so(sizes):
    torch.manual_seed(0)
    loss = losses.VkD(*sizes)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    student, teacher = torch.randn(8, 4, sizes[0]), torch.randn(8, 4, sizes[1])
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        values.append(loss(student, teacher))
        values[-1].backward()
        optimizer.step()
    weight = loss.weight
    small = weight @ weight.T if sizes[1] < sizes[0] else weight.T @ weight
    torch.testing.assert_close(small, torch.eye(min(sizes)), atol=1e-5, rtol=0)
    assert values[-1] < values[0]


@pytest.mark.parametrize("shape", [(10, 6), (6, 10), (6, 6)])
def test_vkd_keeps_a_matrix_that_is_orthogonal_already(shape):
    torch.manual_seed(0)
    loss = losses.VkD(shape[1], shape[0]).double()
    signs = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)[: shape[1]]
    matrix = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64)) * signs
    with torch.no_grad():
        loss.projection.copy_(matrix)
    torch.testing.assert_close(loss.weight, matrix)
    with torch.no_grad():
        loss.projection.mul_(3)
    torch.testing.assert_close(loss.weight, matrix), "scale does not matter"


def test_vid_survives_a_large_scale():
    loss = losses.VID(student_channels=3, teacher_channels=3)
    with torch.no_grad():
        loss.rho.fill_(1e4)
    loss(maps(3), maps(3)).backward()
    assert loss.rho.grad.isfinite().all()


def test_mgd_masks_what_it_says():
    channel, spatial = (
        losses.MGD(kind, ratio=0.5, student_channels=4, teacher_channels=4) for kind in ("channel", "spatial")
    )
    student = torch.ones(2, 4, 5, 5, requires_grad=True)
    for loss in (channel, spatial):
        loss.generate = nn.Identity()
        student.grad = None
        loss(student, torch.zeros(2, 4, 5, 5)).backward()
        kept = student.grad != 0
        assert 0 < kept.float().mean() < 1
        same = kept.flatten(2).float().var(-1) if loss is channel else kept.float().var(1)
        assert same.max() == 0
    default = {kind: (losses.MGD(kind).ratio, losses.MGD(kind).alpha) for kind in ("channel", "spatial")}
    assert default == {"channel": (0.15, 7e-5), "spatial": (0.65, 2e-5)}


class TestLearnableTemperature:
    def logits(self):
        torch.manual_seed(0)
        return torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)

    def test_gradient_is_that_of_the_formula_times_lambda(self):
        student, teacher = self.logits()
        for epoch, factor in ((0, 0.0), (5, -0.5), (10, -1.0), (50, -1.0)):
            loss = losses.LearnableTemperature(losses.SoftTarget())
            loss.set_epoch(epoch, 100)
            loss(student, teacher).backward()
            theta = torch.tensor(1.0, requires_grad=True)
            temperature = 1 + 20 * theta.sigmoid()
            p, q = (teacher / temperature).softmax(1), (student.detach() / temperature).softmax(1)
            ((p * (p.log() - q.log())).sum(1).mean() * temperature**2).backward()
            torch.testing.assert_close(loss.theta.grad.squeeze(), factor * theta.grad, rtol=1e-3, atol=1e-7)

    def test_it_ascends_while_the_student_descends(self):
        student, teacher = self.logits()
        loss = losses.LearnableTemperature(losses.SoftTarget())
        before = loss(student, teacher)
        before.backward()
        with torch.no_grad():
            loss.theta -= 0.1 * loss.theta.grad / loss.theta.grad.abs()
        assert loss(student, teacher) > before

    def test_schedule_is_saved_and_passed_through(self):
        inner = losses.LearnableTemperature(losses.SoftTarget(), ramp=4)
        outer = losses.Standardized(inner) + losses.SoftTarget()
        outer.set_epoch(2, 10)
        assert inner.lambda_.item() == pytest.approx(-0.5)
        assert any(name.endswith("lambda_") for name in outer.state_dict())

    def test_reaches_the_parts_of_a_sum(self):
        student, teacher = self.logits()
        grads = []
        for held in (losses.SoftTarget(), 0.5 * losses.SoftTarget() + 0.5 * losses.SoftTarget()):
            loss = losses.LearnableTemperature(held)
            loss(student, teacher).backward()
            grads.append(loss.theta.grad)
        torch.testing.assert_close(*grads)

    def test_the_teacher_still_gets_no_gradient(self):
        student, teacher = self.logits()
        teacher.requires_grad_()
        losses.LearnableTemperature(losses.SoftTarget())(student, teacher).backward()
        assert teacher.grad is None


class TestWrappers:
    def test_they_need_what_they_hold_needs(self):
        loss = losses.Standardized(losses.DKD())
        assert loss.against == ("teacher", "labels")
        assert not loss.soft_labels
        logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
        z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
        torch.testing.assert_close(loss(-logits, logits, labels), losses.DKD()(-z, z, labels))
        labels_only = losses.Standardized(losses.CrossEntropy())
        assert labels_only.soft_labels
        torch.testing.assert_close(labels_only(logits, labels), losses.CrossEntropy()(z, labels))

    def test_top_k_with_the_rest_keeps_the_probabilities(self):
        student, teacher = torch.randn(2, 4, 9)
        loss = losses.TopK(losses.SoftTarget(), 8, rest=True)
        torch.testing.assert_close(loss(student, teacher), losses.SoftTarget()(student, teacher))
        coarse = losses.TopK(losses.SoftTarget(), 3, rest=True)
        p, top = teacher.softmax(1).topk(3)
        q = student.softmax(1).gather(1, top)
        p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
        torch.testing.assert_close(coarse(student, teacher), (p * (p / q).log()).sum(1).mean())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: losses.TopK(losses.DKD(), 3), "DKD needs"),
            (lambda: losses.TopK(losses.SoftTarget(), 0), "at least 1"),
            (lambda: losses.TopK(losses.SoftTarget(), 9)(torch.zeros(2, 5), torch.zeros(2, 5)), "at least 9"),
            (lambda: losses.Standardized(losses.FeatureMSE()), "between logits, FeatureMSE reads tokens"),
            (lambda: losses.Standardized(losses.SoftTarget())(torch.zeros(2, 1), torch.zeros(2, 1)), "2 classes"),
            (lambda: losses.FSP() + losses.PKD(), "all take lists or none"),
            (lambda: losses.FeatureMSE("l1"), "must be one of None, 'l2', 'layer', 'batch'"),
            (lambda: losses.MGD("pixel"), "mask must be one of 'channel', 'spatial'"),
            (lambda: losses.MGD(ratio=1.0), r"ratio must be in \[0, 1\)"),
            (lambda: losses.AttentionTransfer(1.5), "integer"),
            (lambda: losses.ICKD("coco"), "variant must be one of"),
            (lambda: losses.OFD(reduction="mean"), "reduction must be one of"),
            (lambda: losses.OFD(project=False, student_channels=3, teacher_channels=4), "equal channels"),
            (lambda: losses.OFD(torch.zeros(3), student_channels=3, teacher_channels=4), "margin has 3 channels"),
            (lambda: losses.SRRL(project=False, student_channels=3, teacher_channels=4), "equal channels"),
            (lambda: losses.CRD(10, momentum=1.0), "momentum"),
            (lambda: losses.VID(variance=1e-6), "above eps"),
            (lambda: losses.CCKD(max_p=0), "max_p"),
            (lambda: losses.DKD(temperature=0), "temperature must be a positive number"),
            (lambda: losses.DKD()(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2).long()), "2 classes"),
            (lambda: losses.DKD()(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3).long()), r"labels \(B,\)"),
            (lambda: losses.FSP()([maps()], [maps()]), "at least 2"),
            (lambda: losses.FSP()(maps(), maps()), "takes lists"),
            (lambda: losses.FSP()([maps(), maps()], [maps(), maps(7)]), "at level 1"),
            (lambda: losses.PKD()(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)), "two values a channel"),
            (lambda: losses.RKDAngle()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), "embeddings"),
            (lambda: losses.ChannelMean()(torch.zeros(2, 3), torch.zeros(2, 3)), "maps"),
            (lambda: losses.VkD(3, 3)(torch.zeros(2, 3), torch.zeros(3, 3)), "one batch"),
        ],
    )
    def test_errors_say_what_to_do(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_only_losses_are_held(self):
        with pytest.raises(TypeError, match="holds a loss"):
            losses.Standardized("soft_target")


def test_a_sum_fits_its_parts_and_knows_their_needs():
    loss = losses.SimKD() + 0.5 * losses.SRRL() + losses.PKD()
    assert loss.wants_head
    student = maps(8)
    loss.fit(student, maps(8), nn.Linear(8, 5))
    assert loss(student, maps(8)).isfinite()
    assert len(list(loss.parameters())) == 9 + 3
    both = losses.DKD() + losses.CrossEntropy()
    assert (0.5 * losses.SoftTarget()).floor == 0 and (0.5 * losses.VID()).floor is None
    assert both.against == ("teacher", "labels") and not both.soft_labels
    assert (losses.SoftTarget() + losses.CrossEntropy()).soft_labels


@pytest.mark.parametrize(("temperature", "half"), [(0.07, False), (0.07, True), (1e-3, False), (1e-3, True)])
def test_the_constant_of_crd_does_not_overflow(temperature, half):
    """Of a large data set, a small temperature or in half precision; and it stays that of the first batch."""
    torch.manual_seed(0)
    loss = losses.CRD(100_000, dim=4, negatives=64, temperature=temperature, student_size=5, teacher_size=6)
    loss = loss.half() if half else loss
    exact = copy.deepcopy(loss).double()
    indices, contrast = torch.tensor([4, 9, 7]), torch.randint(100_000, (3, 65))
    first = None
    for _ in range(3):
        student, teacher = torch.randn(3, 5), torch.randn(3, 6)
        value = finite_value(loss, student, teacher, indices, contrast)
        expected = finite_value(exact, student.double(), teacher.double(), indices, contrast)
        first = loss.z.clone() if first is None else first
        assert torch.equal(loss.z, first)
        assert value == pytest.approx(expected, rel=0.02 if half else 1e-5)
        if temperature == 0.07 and not half:
            assert (loss.z > 1e5).all(), "Z itself, where it fits"
    again = losses.CRD(100_000, dim=4, negatives=64, temperature=temperature, student_size=5, teacher_size=6)
    again.load_state_dict(loss.state_dict())
    expected = finite_value(loss, student, teacher, indices, contrast)
    assert finite_value(again, student, teacher, indices, contrast) == pytest.approx(expected, rel=1e-3)


def finite_value(loss, student, teacher, *given):
    student = student.clone().requires_grad_()
    value = loss(student, teacher, *given)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    return value.item()


def test_crd_remembers_while_it_trains_only():
    torch.manual_seed(0)
    loss = losses.CRD(20, dim=4, negatives=8, student_size=5, teacher_size=6)
    student, teacher, indices = torch.randn(3, 5), torch.randn(3, 6), torch.tensor([4, 9, 4])
    before = loss.memory_student.clone()
    loss.eval()(student, teacher, indices)
    assert torch.equal(loss.memory_student, before) and (loss.z < 0).all()
    loss.train()(student, teacher, indices)
    changed = (loss.memory_student != before).any(1).nonzero().flatten()
    assert changed.tolist() == [4, 9]
    z = loss.z.clone()
    u = nn.functional.normalize(loss.embed_student(student))
    expected = nn.functional.normalize(0.5 * before[4] + 0.5 * u[2], dim=0)
    torch.testing.assert_close(loss.memory_student[4], expected), "of two the last counts"
    loss(student, teacher, indices)
    assert torch.equal(loss.z, z), "constants are those of the first batch"


def test_crd_adds_up_a_million_negatives():
    """At ImageNet's size, where sums of logarithms in float32 would leave three digits."""
    torch.manual_seed(0)
    loss = losses.CRD(1_281_167, dim=2, student_size=3, teacher_size=3).eval()
    student, teacher, indices = torch.randn(16, 3), torch.randn(16, 3), torch.arange(16)
    contrast = torch.randint(loss.samples, (16, 1 + loss.negatives))
    value = loss(student, teacher, indices, contrast).item()
    exact = loss.double()(student.double(), teacher.double(), indices, contrast).item()
    assert value == pytest.approx(exact, rel=2e-6)


def test_close_samples_keep_their_distances():
    """Distances within a tight cluster far from the others, where a Gram matrix in float32 has no digit left."""
    torch.manual_seed(0)
    points = torch.cat([torch.randn(6, 16) * 1e-3 + 100, torch.randn(6, 16)])
    d = losses.rkd._distances(points)
    exact = torch.cdist(points.double(), points.double())
    torch.testing.assert_close(d.double(), exact, rtol=1e-4, atol=1e-6)


def test_dkd_is_exact_where_a_mask_of_minus_1000_is_not():
    """Logits beyond 1000 outweigh a subtracted mask; they do not outweigh -inf."""
    student = torch.tensor([[3000.0, -2000.0, -1999.0]], dtype=torch.float64)
    teacher = torch.tensor([[5000.0, -1999.0, -2000.0]], dtype=torch.float64)
    value = losses.DKD(alpha=0.0, beta=1.0, temperature=1.0)(student, teacher, torch.tensor([0]))
    p, q = math.e / (1 + math.e), 1 / (1 + math.e)
    assert value.item() == pytest.approx((p - q) * math.log(p / q))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_inductor_agrees(name):
    """Both passes, compiled whole into code of the CPU."""
    torch._dynamo.reset()
    case = subject(name)
    inputs = case.inputs()
    loss = case.fitted(inputs)
    expected = finite(case, copy.deepcopy(loss), inputs)
    grads = [leaf.grad for leaf in leaves(inputs[0])]
    again = (fresh(inputs[0]), *inputs[1:])
    value = finite(case, torch.compile(loss, fullgraph=True), again)
    torch._dynamo.reset()
    if case.random:  # inductor draws other numbers
        return
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for leaf, grad in zip(leaves(again[0]), grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e10, 1e18])
def test_attention_does_not_depend_on_the_scale_of_a_map(scale):
    """Powers of it would overflow, or vanish."""
    features = maps()
    for loss in (losses.AttentionTransfer(4), losses.AttentionTransfer(4, "paper")):
        assert loss(scale * features, features).item() < 1e-6
        assert loss(maps(), scale * features).isfinite()
    negative = -maps().abs()
    assert losses.AttentionTransfer(1)(scale * negative, negative).item() < 1e-6


def test_small_values_keep_their_digits():
    """A student close to its teacher, in float32, against float64."""
    torch.manual_seed(0)
    teacher = torch.randn(64, 128)
    student = teacher + 0.01 * torch.randn(64, 128)
    for loss in (losses.PKT(), losses.CosineDistance(), losses.RKDDistance(), losses.RKDAngle(), losses.SoftTarget()):
        single, double = loss(student, teacher).item(), loss(student.double(), teacher.double()).item()
        assert single == pytest.approx(double, rel=2e-3), type(loss).__name__


def test_cosine_of_a_zero_vector_is_zero():
    zero, one = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for student, teacher in ((zero, one), (one, zero), (zero, zero)):
        assert losses.CosineDistance()(student, teacher).item() == pytest.approx(1.0)
