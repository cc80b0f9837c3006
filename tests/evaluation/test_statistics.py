"""Confidence intervals against published numbers, exact counts and their own coverage."""

import numpy as np
import pytest

from fastldm.evaluation.statistics import Score, bootstrap, difference


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    # Newcombe (1998), table II, method 10 (score intervals without continuity correction).
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0000),
        ((10, 10), (0, 10), 0.6075, 1.0000),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_differences_of_proportions_are_the_published_ones(one, other, low, high):
    value, interval = difference(Score(*one), Score(*other))
    assert value == pytest.approx(one[0] / one[1] - other[0] / other[1])
    assert interval == pytest.approx((low, high), abs=1e-4)
    swapped, mirrored = difference(Score(*other), Score(*one))
    assert swapped == -value
    assert mirrored == pytest.approx((-interval[1], -interval[0]))


def test_a_difference_covers_the_truth_in_about_95_percent_of_experiments():
    rng, p, q, n, hits = np.random.default_rng(0), 0.8, 0.6, 80, 0
    for _ in range(600):
        low, high = difference(Score(int(rng.binomial(n, p)), n), Score(int(rng.binomial(n, q)), n))[1]
        hits += low <= p - q <= high
    # 0.95 with four standard errors of 600 draws to either side.
    assert 0.914 <= hits / 600 <= 0.986


def test_a_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    values = np.random.default_rng(1).normal(3, 2, 400)
    value, (low, high) = bootstrap([values], np.mean)
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert low < value < high


def test_a_bootstrap_draws_each_sample_by_itself():
    ratio, (low, high) = bootstrap([[8.0] * 5, [2.0, 4.0]], lambda a, b: a.mean() / b.mean())
    assert ratio == pytest.approx(8 / 3)
    assert (low, high) == (2.0, 4.0)
    assert bootstrap([[1.0, 2.0]], np.median) == bootstrap([[1.0, 2.0]], np.median)
