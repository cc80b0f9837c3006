"""How sure a measured number is: 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastldm.errors import InputError

# 97.5% quantiles: of the normal distribution, and of Student's t of 1, 2, ... degrees of freedom.
_Z = 1.959963984540054
_T = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)


@dataclass(frozen=True)
class Score:
    """`right` pictures out of `total`."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of the accuracy (Wilson 1927)."""
        p, n = self.accuracy, self.total
        centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
        half = _Z / (1 + _Z * _Z / n) * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n))
        # At 0 and 1 the bounds meet the accuracy, up to rounding.
        return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))

    def __add__(self, other: Score) -> Score:
        return Score(self.right + other.right, self.total + other.total)


def difference(one: Score, other: Score) -> tuple[float, tuple[float, float]]:
    """One accuracy minus the other and its 95% interval (Newcombe 1998, method 10), of independent scores.

    Pictures drawn from the same noise are positively correlated: for them the interval is too wide, not too
    narrow.
    """
    p, q = one.accuracy, other.accuracy
    (low_p, high_p), (low_q, high_q) = one.interval, other.interval
    value = p - q
    return value, (
        value - math.hypot(p - low_p, high_q - q),
        value + math.hypot(high_p - p, q - low_q),
    )


def mean(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of measurements and its 95% interval by Student's t (1908), which holds for few of them too.

    Raises:
        InputError: for fewer than two, of which nobody knows how much they scatter.
    """
    count = len(values)
    if count < 2:
        raise InputError(f"{count} measurements do not show how much they scatter; take two or more")
    value = float(np.mean(values))
    half = _t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return value, (value - half, value + half)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """How many times as large ours are: the geometric mean of what each pair says, and its 95% interval.

    Args:
        ours, theirs: measured in turns, each pair under the same load; above 0, as many of both.

    Raises:
        InputError: for fewer than two pairs.
    """
    value, (low, high) = mean([math.log(one / other) for one, other in zip(ours, theirs, strict=True)])
    return math.exp(value), (math.exp(low), math.exp(high))


def _t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Cornish and Fisher's expansion about the normal quantile, here off by less than 1e-4.
    z, n = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
