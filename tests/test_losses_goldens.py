"""Every stored reference case: value within 1e-5, gradients within 1e-4 of the largest entry (float64: 1e-9)."""

from __future__ import annotations

import pytest
import torch
from losses_reference import GOLDENS, REFERENCES, Case, compare

torch.set_num_threads(1)

FILES = sorted(path.stem for path in GOLDENS.glob("*.npz"))


def test_every_file_is_compared():
    assert sorted(REFERENCES) == FILES


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("file", FILES)
def test_float32_agrees_with_the_reference(file, index):
    errors = compare(Case(file, index, torch.float32))
    assert errors.value <= 1e-5
    assert errors.grad <= 1e-4
    assert errors.paramgrad <= 1e-4


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("file", FILES)
def test_float64_agrees_with_the_reference(file, index):
    errors = compare(Case(file, index, torch.float64))
    assert errors.value <= 1e-9
    assert errors.grad <= 1e-9
    assert errors.paramgrad <= 1e-4, "stored in float32 only"
