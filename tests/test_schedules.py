"""Weights over time."""

from __future__ import annotations

import math
import pickle

import pytest

from kdlib.schedules import ALWAYS, Product, Ramp, Window, moment


@pytest.mark.parametrize(("until", "last"), [(80, 79), (1, 0), (0.5, 59), (1.0, 10_000)])
def test_a_window_counts_epochs_or_a_fraction(until: float, last: int) -> None:
    window = Window(until=until)
    assert window(last, 120) == 1
    if last < 120:
        assert window(last + 1, 120) == 0


def test_a_window_opens_at_its_start() -> None:
    assert [Window(2, 4)(epoch, 6) for epoch in range(6)] == [0, 0, 1, 1, 0, 0]
    assert ALWAYS(0, 1) == 1


def test_ramps() -> None:
    assert [Ramp()(epoch, 4) for epoch in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert Ramp(0.0, 1.0, 1, 3)(0, 4) == 0 and Ramp(0.0, 1.0, 1, 3)(3.5, 4) == 1
    assert Ramp(shape="cosine")(1, 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_wrong_moments_raise() -> None:
    with pytest.raises(ValueError, match="from 0, got -1"):
        Window(-1)
    with pytest.raises(ValueError, match=r"fraction of the run in \[0, 1\] .*got 1.5"):
        Window(until=1.5)
    with pytest.raises(ValueError, match="'linear' or 'cosine'"):
        Ramp(shape="square")
    with pytest.raises(ValueError, match="ends after it starts"):
        Ramp(start=3, until=2)(0, 4)
    assert moment(0.25, 120) == 30


def test_a_fraction_written_as_a_quotient_ends_at_its_epoch() -> None:
    for epochs in range(1, 601):
        for end in range(1, epochs):
            assert Window(until=end / epochs)(end - 1, epochs) and not Window(until=end / epochs)(end, epochs)


def test_a_product_is_that_of_its_factors_and_can_be_pickled() -> None:
    both = pickle.loads(pickle.dumps(Product((Window(1, 3), Ramp(1.0, 0.5, 1, 5)))))
    assert [both(epoch, 5) for epoch in range(5)] == [0, 1, 0.875, 0, 0]
