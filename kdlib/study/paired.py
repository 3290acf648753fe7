"""The same thing over several seeds: mean, spread, and differences seed by seed with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, nan, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % quantile of Student's t with 1, 2, … 30 degrees of freedom."""

MOST = len(T975) + 1
"""Values that a mean can be taken of."""


class Mean(NamedTuple):
    """A mean over seeds."""

    mean: float
    sd: float
    """Sample standard deviation (over n - 1); nan for one value."""
    half: float
    """Half the width of the 95 % interval of the mean, by Student's t; infinite for one value."""
    n: int


def mean(values: Sequence[float]) -> Mean:
    """Mean, standard deviation and 95 % interval of independent values.

    Raises:
        ValueError: no values, or more than 31.
    """
    n = len(values)
    if not 1 <= n <= MOST:
        raise ValueError(f"a mean over seeds takes 1 to {MOST} values (got {n})")
    if n == 1:
        return Mean(float(values[0]), nan, inf, 1)
    sd = stdev(values)
    return Mean(fmean(values), sd, T975[n - 2] * sd / sqrt(n), n)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Mean | None:
    """``ours - theirs`` seed by seed, over the seeds that both have; None if there is none.

    Pairing takes out what a seed does to both (the order of the images, the teachers): the interval is then that of the
    difference, usually a good deal narrower than those of the two means.
    """
    seeds = sorted(set(ours) & set(theirs))
    return mean([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
