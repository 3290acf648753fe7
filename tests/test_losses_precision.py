"""Where digits would be lost: samples that lie close together, distributions that nearly agree, classes masked out."""

from __future__ import annotations

import pytest
import torch
from losses_plain import PLAIN

from kdlib import losses
from kdlib.losses import rkd

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
