"""Each loss is its plain definition, value and gradients, in float64 and on inputs that hypothesis draws."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import CASES, Subject, choices, each, fresh, label, leaves, subject
from losses_plain import PLAIN

from kdlib import losses
from kdlib.losses import LOSSES
from kdlib.losses.algebra import unit

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


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=label)
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
def test_loss_is_its_definition(name, chosen, batch, classes, channels, height, width, seed, scale):
    case = subject(name, **chosen)
    case.classes = classes
    inputs = case.inputs(
        batch=batch, dtype=torch.float64, seed=seed, scale=scale, grid=(height, width), channels=channels
    )
    compare(case, case.fitted(inputs).double(), inputs)


@pytest.mark.parametrize("name", ["attention_transfer", "nst", "gram_relation", "vid", "mgd", "sim_kd", "ofd", "vk_d"])
def test_channels_may_differ(name):
    case = subject(name)
    (student, *_), (_, teacher) = (case.inputs(dtype=torch.float64, channels=c, seed=c) for c in (6, 10))
    compare(case, case.fitted((student, teacher)).double(), (student, teacher))


@pytest.mark.parametrize("name", ["attention_transfer", "nst", "vid", "sim_kd", "ickd", "pkd", "channel_mean"])
@pytest.mark.parametrize("grids", [((6, 5), (3, 5)), ((2, 4), (4, 4)), ((6, 2), (3, 4))])
def test_grids_may_differ(name, grids):
    case = subject(name)
    (student, *_), (_, teacher) = (case.inputs(dtype=torch.float64, grid=grid, seed=grid[0]) for grid in grids)
    compare(case, case.fitted((student, teacher)).double(), (student, teacher))


ARGUMENTS = {
    "soft_target": [{"temperature": 0.5}, {"temperature": 7.0}],
    "hard_label": [{"label_smoothing": 0.1}],
    "cross_entropy": [{"label_smoothing": 0.3}],
    "dkd": [{"alpha": 0.5, "beta": 2.0, "temperature": 1.0}, {"alpha": 0.0, "temperature": 2.0}],
    "nkd": [{"gamma": 0.7, "temperature": 3.0}],
    "dist": [{"beta": 2.0, "gamma": 0.5, "temperature": 4.0}, {"beta": 3.0, "temperature": 2.0, "variant": "paper"}],
    "ttm": [{"exponent": 1.0}, {"exponent": 2.0}],
    "wttm": [{"exponent": 1.0}, {"exponent": 0.5}],
    "ofa": [{"eps": 1.0}, {"eps": 2.0, "temperature": 3.0}, {"eps": 1.2, "temperature": 2.0, "variant": "paper"}],
    "class_correlation": [{"temperature": 1.0}],
    "batch_correlation": [{"temperature": 0.7}],
    "binary": [{"temperature": 2.0}],
    "learnable_temperature": [{"start": 2.0, "span": 5.0, "initial": -0.5}],
    "attention_transfer": [{"p": 1}, {"p": 3}, {"p": 4}, {"p": 1.5, "variant": "paper"}, {"p": 3, "variant": "paper"}],
    "channel_wise": [{"temperature": 0.3}, {"temperature": 4.0}],
    "mgd": [{"ratio": 0.5, "alpha": 1e-2}, {"mask": "spatial", "ratio": 0.0}],
    "vid": [{"variance": 0.1, "eps": 1e-2, "hidden": 3}],
    "ofd": [{"project": False}, {"project": False, "reduction": "batchmean"}],
    "srrl": [{"alpha": 0.3, "beta": 2.0}, {"project": False}],
    "sim_kd": [{"factor": 1}, {"factor": 3}],
    "review_kd": [{"hidden": 3}],
    "gram_relation": [{"normalize": False}],
    "pkt": [{"eps": 1e-2}, {"eps": 1e-4, "variant": "paper"}],
    "cckd": [
        {"gamma": 1.5, "max_p": 5},
        {"kernel": "bilinear", "reduction": "sum", "variant": "paper"},
        {"max_p": 1, "reduction": "sum"},
    ],
    "info_nce": [{"temperature": 0.5}, {"symmetric": True}],
    "crd": [{"temperature": 0.5, "momentum": 0.0}, {"temperature": 0.5, "variant": "paper"}],
}
"""Arguments away from their defaults and from single choices."""


@pytest.mark.parametrize(("name", "chosen"), [(n, c) for n in ARGUMENTS for c in ARGUMENTS[n]], ids=label)
def test_arguments(name, chosen):
    """Also with more samples than channels, and with fewer."""
    case = subject(name, **chosen)
    for batch, channels in ((3, 8), (9, 4)):
        inputs = case.inputs(batch=batch, dtype=torch.float64, seed=batch, channels=channels)
        compare(case, case.fitted(inputs).double(), inputs)


def test_every_number_that_a_loss_takes_is_tried():
    """An argument that no test moves from its default could do nothing at all."""
    apart = {"loss", "ramp", "start", "k", "rest", "margin", "head", "samples", "dim", "negatives"}
    for name, loss in LOSSES.items():
        tried = {argument for chosen in [*choices(name), *ARGUMENTS.get(name, [])] for argument in chosen}
        sizes = {
            argument for argument in inspect.signature(loss).parameters if argument.endswith(("_channels", "_size"))
        }
        assert inspect.signature(loss).parameters.keys() - tried - sizes - apart == set(), name


def test_features_are_normalised_along_the_channels_of_maps_too():
    student, teacher = torch.randn(2, 4, 6, 3, 5, dtype=torch.float64)
    for normalize in ("l2", "layer", "batch"):
        loss = losses.FeatureMSE(normalize)
        s, t = (x.flatten(2).mT for x in (student, teacher))
        torch.testing.assert_close(loss(student, teacher), PLAIN["feature_mse"](loss, s, t))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_lose_nothing_but_their_rounding(dtype):
    """FeatureMSE keeps the difference in half: an exact value, a gradient rounded once more, a right second one."""
    from kdlib.losses import FeatureMSE

    student = torch.randn(3, 5, 7).to(dtype).requires_grad_()
    teacher = torch.randn(3, 5, 7)
    exact = student.detach().double().requires_grad_()
    plain = (exact - teacher.double()).square().mean()
    value = FeatureMSE()(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), plain, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    (by_definition,) = torch.autograd.grad(plain, exact)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), by_definition, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    (second,) = torch.autograd.grad(gradient.float().sum(), student)
    torch.testing.assert_close(second.float(), torch.full_like(teacher, 2 / 105), rtol=0.01, atol=0)
    with torch.inference_mode():
        seen = teacher.clone()
    torch.testing.assert_close(FeatureMSE()(student, seen), value)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gap_of_token_grams_may_be_differentiated_twice(normalize):
    from kdlib.losses.token_gap import gram_gap

    given = [torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    compute = partial(gram_gap, normalize=normalize)
    assert torch.autograd.gradcheck(compute, given) and torch.autograd.gradgradcheck(compute, given)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_relation_of_half_precision_tokens_loses_nothing_but_their_rounding(dtype, normalize):
    """Even under autocast: an exact value, a gradient rounded once. A zero token does no harm."""
    student, teacher = torch.randn(2, 3, 10, 16).to(dtype)
    student[0, 0], teacher[1, 2] = 0, 0
    exact, student = student.double().requires_grad_(), student.requires_grad_()
    loss = losses.GramRelation(normalize)
    u, v = (unit(x) if normalize else x for x in (exact, teacher.double()))
    plain = (u @ u.mT - v @ v.mT).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), plain, rtol=1e-5, atol=0)
    (gradient,), (by_definition,) = torch.autograd.grad(value, student), torch.autograd.grad(plain, exact)
    assert gradient.dtype == dtype
    away = torch.linalg.vector_norm(gradient.double() - by_definition) / torch.linalg.vector_norm(by_definition)
    assert away < torch.finfo(dtype).eps
    with torch.inference_mode():
        seen = teacher.clone()
    torch.testing.assert_close(loss(student, seen), value)


def test_a_label_of_minus_100_is_left_out_by_cross_entropy_and_told_by_the_others():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    labels = torch.tensor([1, -100, 2, 3])
    kept = torch.tensor([0, 2, 3])
    torch.testing.assert_close(
        losses.CrossEntropy()(student, labels), losses.CrossEntropy()(student[kept], labels[kept])
    )
    assert losses.CrossEntropy()(student, torch.full((4,), -100)).isnan()
    for name in ("dkd", "nkd", "ofa"):
        for wrong in (labels, labels.clamp(min=-1), labels.masked_fill(labels < 0, 5)):
            with pytest.raises(ValueError, match="need a label from 0 to 4 for every sample, got another "):
                LOSSES[name]()(student, teacher, wrong)


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 5, 4, 3)])
def test_logits_at_each_position_are_told_what_to_do(shape):
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    for loss, against in ((losses.SoftTarget(), torch.zeros(shape)), (losses.CrossEntropy(), labels)):
        with pytest.raises(ValueError, match=r"flattened into samples first \(docs/howto/sequences\.md\)"):
            loss(torch.zeros(shape), against)


def test_a_sum_hands_on_what_a_part_alone_asks():
    class Masked(losses.Loss):
        against = ("teacher", "mask")

        def forward(self, student, teacher, mask):
            return ((student - teacher).square() * mask[:, None]).sum()

    both = losses.CrossEntropy() + 2 * Masked()
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, 0, 4])
    mask = torch.tensor([True, False, True])
    assert both.against == ("teacher", "labels", "mask")
    expected = losses.CrossEntropy()(student, labels) + 2 * (student - teacher)[mask].square().sum()
    torch.testing.assert_close(both(student, teacher, labels, mask), expected)
