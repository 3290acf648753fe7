"""Where digits would be lost: samples that lie close together, distributions that nearly agree, classes masked out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from losses_plain import PLAIN

from kdlib import losses
from kdlib.losses import rkd
from kdlib.losses.algebra import kl

torch.set_num_threads(1)


def measured(loss, student, *against):
    student = student.clone().requires_grad_()
    value = loss(student, *against)
    value.backward()
    return value.detach(), student.grad


def apart(found, expected):
    """Largest difference, relative to the largest entry."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def close_together(radius, samples):
    """Eight samples of 128 numbers, of which so many lie in a cluster."""
    drawn = torch.Generator().manual_seed(0)
    points = torch.randn(8, 128, generator=drawn)
    points[1:samples] = points[0] + radius * torch.randn(samples - 1, 128, generator=drawn)
    return points, torch.randn(8, 128, generator=drawn)


@pytest.mark.parametrize("piece", [rkd.PIECE, 3 * 8 * 128], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", ["rkd_angle", "rkd_distance"])
@pytest.mark.parametrize(
    ("radius", "samples"), [(1e-3, 2), (1e-4, 2), (1e-5, 2), (1e-6, 2), (1e-3, 5), (1e-4, 5), (1e-3, 8), (1e-4, 8)]
)
def test_relations_of_samples_that_lie_close_together(monkeypatch, name, radius, samples, piece):
    monkeypatch.setattr(rkd, "PIECE", piece)
    student, teacher = close_together(radius, samples)
    for s, t in ((student, teacher), (teacher, student)):
        loss = losses.LOSSES[name]()
        value, gradient = measured(loss, s, t)
        exact, expected = measured(lambda *x: PLAIN[name](None, *x), s.double(), t.double())
        assert apart(value, exact) < 1e-5
        assert apart(gradient, expected) < 1e-5


@pytest.mark.parametrize("piece", [rkd.PIECE, 2 * 4 * 3])
def test_angles_may_be_differentiated_twice(monkeypatch, piece):
    monkeypatch.setattr(rkd, "PIECE", piece)
    student, teacher = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: rkd.angle_gap(s, teacher), student)
    assert torch.autograd.gradgradcheck(lambda s: rkd.angle_gap(s, teacher), student)


def test_samples_closer_than_1e_12_coincide():
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = []
    for gap in (0.0, 1e-13, 1e-11):
        student[1] = student[0]
        student[1, 0] += gap
        value, gradient = measured(losses.RKDAngle(), student, teacher)
        assert gradient.isfinite().all()
        values.append(value.item())
    assert values[1] == pytest.approx(values[0], rel=1e-9) != pytest.approx(values[2], rel=1e-3)


BETWEEN_LOGITS = {
    "soft_target": losses.SoftTarget(2.0),
    "ttm": losses.TTM(),
    "wttm": losses.WTTM(),
    "binary": losses.Binary(),
    "dkd": losses.DKD(temperature=2.0),
    "nkd": losses.NKD(),
    "ofa": losses.OFA(variant="paper"),
    "cross_entropy": losses.CrossEntropy(),
    "top_k": losses.TopK(losses.SoftTarget(), 6),
}


@pytest.mark.parametrize("who", ["both", "teacher", "student"])
@pytest.mark.parametrize("name", BETWEEN_LOGITS)
def test_masked_classes(name, who):
    """Value and gradient are those of classes that are as good as impossible; infinite where the teacher wants one."""
    loss = BETWEEN_LOGITS[name]
    student, teacher = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[0, 3] = masked[2, 4:] = True

    def given(level, dtype):
        s, t = (
            x.to(dtype).masked_fill(masked, level) if who in (side, "both") else x.to(dtype)
            for x, side in ((student, "student"), (teacher, "teacher"))
        )
        needs = {"teacher": t, "labels": t.softmax(1) if name == "cross_entropy" else labels}
        return s, *(needs[need] for need in loss.against)

    value, gradient = measured(loss, *given(-torch.inf, torch.float32))
    assert gradient.isfinite().all()
    if who == "student":
        assert value == torch.inf
        return
    exact, expected = measured(partial(PLAIN[name], loss), *given(-300.0, torch.float64))
    assert apart(value, exact) < 1e-5
    assert apart(gradient, expected) < 1e-5


def test_a_learned_temperature_learns_nothing_from_masked_classes():
    student, teacher = torch.randn(2, 4, 6)
    kept = losses.LearnableTemperature(losses.SoftTarget())
    masked = losses.LearnableTemperature(losses.SoftTarget())
    masked(*(x.masked_fill(torch.arange(6) > 3, -torch.inf) for x in (student, teacher))).backward()
    kept(student[:, :4], teacher[:, :4]).backward()
    torch.testing.assert_close(masked.theta.grad, kept.theta.grad)


def test_the_rest_of_the_top_classes_may_be_masked_whole():
    student, teacher = (x.masked_fill(torch.arange(6) > 3, -torch.inf) for x in torch.randn(2, 4, 6))
    value, gradient = measured(losses.TopK(losses.SoftTarget(), 4, rest=True), student, teacher)
    expected, other = measured(losses.SoftTarget(), student[:, :4], teacher[:, :4])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :4], other)
    assert not gradient[:, 4:].any()


def test_a_masked_class_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[2.0, 1.0, -torch.inf]])
    assert losses.SoftTarget()(student, teacher).item() == pytest.approx(0.46211716)


NEARLY = {
    "soft_target": losses.SoftTarget(4.0),
    "ttm": losses.TTM(exponent=1.0),
    "wttm": losses.WTTM(exponent=1.0),
    "binary": losses.Binary(),
    "dkd": losses.DKD(),
    "channel_wise": losses.ChannelWise(4.0),
}


@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("name", NEARLY)
def test_distributions_that_nearly_agree(name, noise):
    """A divergence is quadratic in the gap, and what rounds in float32 is linear in it."""
    loss = NEARLY[name]
    drawn = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(64, 1000, generator=drawn)
    student = teacher + noise * torch.randn(64, 1000, generator=drawn)
    if name == "channel_wise":
        student, teacher = student.view(8, 8, 25, 40), teacher.view(8, 8, 25, 40)
    labels = [torch.arange(64)] if "labels" in loss.against else []
    value, gradient = measured(loss, student, teacher, *labels)
    exact, expected = measured(partial(PLAIN[name], loss), student.double(), teacher.double(), *labels)
    assert apart(value, exact) < 1e-3
    assert apart(gradient, expected) < 1e-6 / noise, "what the rounding of logits leaves of it"


def test_a_divergence_is_never_negative():
    drawn = torch.Generator().manual_seed(0)
    for noise in (1e-3, 1e-5, 1e-7, 0.0):
        teacher = torch.randn(64, 1000, generator=drawn).log_softmax(1)
        student = (teacher + noise * torch.randn(64, 1000, generator=drawn)).log_softmax(1)
        assert (kl(student, teacher) >= 0).all()


def test_a_divergence_has_both_its_gradients_and_theirs():
    def divergence(q, p):
        return kl(q.log_softmax(-1), p.log_softmax(-1))

    logits = [(3 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(divergence, logits) and torch.autograd.gradgradcheck(divergence, logits)
    by_q, by_p = torch.autograd.grad(divergence(*logits).sum(), logits)
    q, p = (x.softmax(-1) for x in logits)
    torch.testing.assert_close(by_q, q - p)
    plain = torch.nn.functional.kl_div(
        logits[0].log_softmax(-1), logits[1].log_softmax(-1), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(by_p, torch.autograd.grad(plain, logits[1])[0])


@pytest.mark.parametrize("name", ["soft_target", "ttm", "dkd"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_losses_with_a_backward_pass_of_their_own_go_through_torch_func(name):
    """A gradient a sample, as torch.func makes it, is that of the sample alone."""
    loss = losses.LOSSES[name]()
    student, teacher, labels = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 3, 6, 3])
    against = [teacher, labels][: len(loss.against)]
    each = torch.vmap(torch.func.grad(loss))(student[:, None], *(x[:, None] for x in against))
    for i in range(4):
        alone = student[i : i + 1].requires_grad_()
        (expected,) = torch.autograd.grad(loss(alone, *(x[i : i + 1] for x in against)), alone)
        torch.testing.assert_close(each[i], expected)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("eps", [1e-7, 1e-12, 1e-30])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_neighbours_in_the_opposite_direction(size, eps, variant):
    """Whose cosine of -1 rounds below it; of one number each all cosines are 1 or -1."""
    drawn = torch.Generator().manual_seed(0)
    loss = losses.PKT(eps, variant)
    for _ in range(10):
        student, teacher = torch.randn(2, 6, size, generator=drawn)
        teacher[1], teacher[2] = -teacher[0], -3 * teacher[0]
        opposite = student.clone()
        opposite[4] = -opposite[3]
        for s in (student, opposite, teacher):
            value, gradient = measured(loss, s, teacher)
            assert value.isfinite() and gradient.isfinite().all()
        if eps == 1e-7 and size > 1:
            exact, _ = measured(partial(PLAIN["pkt"], loss), student.double(), teacher.double())
            assert apart(loss(student, teacher), exact) < 1e-4


@pytest.mark.parametrize("level", [0.0, 0.1, 100.1])
@pytest.mark.parametrize("classes", [10, 37, 1000])
@pytest.mark.parametrize(
    "loss",
    [losses.DIST(variant="paper"), losses.Standardized(losses.SoftTarget(), "paper")],
    ids=["dist", "standardized"],
)
def test_equal_logits_have_no_direction(loss, classes, level):
    """As of a classifier that begins at zero: what its mean leaves by rounding is not brought to unit length."""
    student, teacher = torch.full((16, classes), level), torch.randn(16, classes)
    value, gradient = measured(loss, student, teacher)
    exact, expected = measured(loss, torch.full_like(student, level, dtype=torch.float64), teacher.double())
    assert apart(value, exact) < 1e-5
    assert apart(gradient, expected) < 1e-4


def test_one_distribution_stands_against_many() -> None:
    q, p = (torch.randn(*shape, dtype=torch.float64).log_softmax(-1) for shape in ((5,), (3, 5)))
    torch.testing.assert_close(kl(q, p), (p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(torch.func.vmap(kl, (None, 0))(q, p), kl(q, p))
