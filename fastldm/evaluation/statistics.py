"""How sure a measured number is: 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054


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


def bootstrap(
    samples: Sequence[Sequence[float]],
    statistic: Callable[..., float],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, tuple[float, float]]:
    """A statistic of samples and its 95% percentile interval (Efron 1979), each sample drawn anew by itself.

    Args:
        samples: one or more, each of any length from 1.
        statistic: takes an array (N,) per sample.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(sample, np.float64) for sample in samples]
    values = [statistic(*(rng.choice(array, len(array)) for array in arrays)) for _ in range(draws)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(statistic(*arrays)), (float(low), float(high))
