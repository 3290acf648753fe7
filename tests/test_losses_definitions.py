"""Each loss is its plain definition, value and gradients, in float64 and on inputs that hypothesis draws."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import Subject, each, fresh, leaves, subject
from losses_plain import PLAIN

from kdlib import losses
from kdlib.losses import LOSSES

torch.set_num_threads(1)


def test_every_loss_has_a_plain_definition():
    assert PLAIN.keys() == LOSSES.keys()


def compare(case: Subject, loss, inputs):
    plain_loss, again = copy.deepcopy(loss), (fresh(inputs[0]), *(each(x, torch.Tensor.detach) for x in inputs[1:]))
    value = case.value(loss, inputs)
    value.backward()
    torch.manual_seed(1)
    expected = PLAIN[case.name](plain_loss, *again)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)
    for leaf, other in zip(leaves(inputs[0]), leaves(again[0]), strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-7 * float(other.grad.abs().max()) + 1e-12)


@pytest.mark.parametrize("name", sorted(PLAIN))
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(2, 6),
    classes=st.integers(3, 9),
    channels=st.sampled_from([2, 6, 12]),
    height=st.integers(1, 5),
    width=st.integers(2, 5),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.1, 3.0),
)
def test_loss_is_its_definition(name, batch, classes, channels, height, width, seed, scale):
    case = subject(name)
    case.classes = classes
    inputs = case.inputs(
        batch=batch, dtype=torch.float64, seed=seed, scale=scale, grid=(height, width), channels=channels
    )
    compare(case, case.fitted(inputs).double(), inputs)


@pytest.mark.parametrize("name", ["attention_transfer", "nst", "gram_relation", "vid", "mgd", "simkd", "ofd", "vkd"])
def test_channels_may_differ(name):
    case = subject(name)
    (student, *_), (_, teacher) = (case.inputs(dtype=torch.float64, channels=c, seed=c) for c in (6, 10))
    compare(case, case.fitted((student, teacher)).double(), (student, teacher))


@pytest.mark.parametrize("name", ["attention_transfer", "nst", "vid", "simkd", "ickd", "pkd", "channel_mean"])
@pytest.mark.parametrize("grids", [((6, 5), (3, 5)), ((2, 4), (4, 4)), ((6, 2), (3, 4))])
def test_grids_may_differ(name, grids):
    case = subject(name)
    (student, *_), (_, teacher) = (case.inputs(dtype=torch.float64, grid=grid, seed=grid[0]) for grid in grids)
    compare(case, case.fitted((student, teacher)).double(), (student, teacher))


@pytest.mark.parametrize(
    ("loss", "plain"),
    [
        (
            losses.AttentionTransfer(3, "paper"),
            lambda s, t: _gap(s.abs(), t.abs(), 3).norm(dim=1),
        ),
        (losses.AttentionTransfer(4, "code"), lambda s, t: _gap(s, t, 4).square()),
        (losses.ICKD("imagenet"), lambda s, t: PLAIN["ickd"](None, s, t) / 4),
        (
            losses.FeatureMSE("l2"),
            lambda s, t: (_unit(s) - _unit(t)) ** 2,
        ),
        (losses.FeatureMSE("layer"), lambda s, t: (_standard(s, 1) - _standard(t, 1)) ** 2),
        (losses.FeatureMSE("batch"), lambda s, t: (_standard(s, (0, 2, 3)) - _standard(t, (0, 2, 3))) ** 2),
        (losses.CCKD("bilinear", reduction="sum", variant="paper"), lambda s, t: ((s @ s.T - t @ t.T) ** 2).sum()),
        (losses.GramRelation(normalize=False), lambda s, t: (s @ s.mT - t @ t.mT) ** 2),
    ],
    ids=lambda x: repr(x) if isinstance(x, losses.Loss) else "",
)
def test_variants(loss, plain):
    torch.manual_seed(0)
    shape = {"map": (4, 6, 3, 5), "tokens": (4, 9, 5), "embedding": (4, 8)}[loss.view]
    shape = (4, 6, 3, 5) if isinstance(loss, losses.FeatureMSE) else shape
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(loss(student, teacher), plain(student, teacher).mean())


def test_variants_with_labels_and_lists():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    labels = torch.tensor([0, 5, 2, 2])
    p, log_q, y = teacher.softmax(1), student.log_softmax(1), torch.nn.functional.one_hot(labels, 6)
    expected = -(((1 + p) ** 1.5 * y + p * (1 - y)) * log_q).sum(1).mean()
    torch.testing.assert_close(losses.OFA(1.5, variant="paper")(student, teacher, labels), expected)
    s, t = ([torch.randn(4, c, 3, 5, dtype=torch.float64) for c in (2, 3)] for _ in range(2))
    torch.testing.assert_close(losses.FSP("paper")(s, t), losses.FSP()(s, t) * 2 * 3)


def _unit(x):
    return x / x.norm(dim=1, keepdim=True)


def _gap(s, t, p):
    return _unit(s.pow(p).sum(1).flatten(1)) - _unit(t.pow(p).sum(1).flatten(1))


def _standard(x, axes):
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize(("n", "c", "c_t"), [(4, 9, 9), (40, 3, 3), (40, 3, 5), (4, 9, 2), (30, 8, 8)])
def test_both_forms_of_the_gram_gap(n, c, c_t):
    from kdlib.losses.algebra import gram_gap

    s, t = torch.randn(2, n, c, dtype=torch.float64), torch.randn(2, n, c_t, dtype=torch.float64)
    torch.testing.assert_close(gram_gap(s, t), (s @ s.mT - t @ t.mT).square().sum())


def test_crd_scores_are_the_same_in_both_forms():
    few, many = (losses.CRD(SIZE, 4, n, student_size=5, teacher_size=5) for SIZE, n in ((30, 60), (30, 5)))
    for loss in (few, many):
        u, contrast = torch.randn(3, 4), torch.randint(30, (3, 1 + loss.negatives))
        expected = (loss.memory_teacher[contrast] * u[:, None]).sum(-1) / loss.temperature
        torch.testing.assert_close(loss._scores(loss.memory_teacher, u, contrast), expected)
