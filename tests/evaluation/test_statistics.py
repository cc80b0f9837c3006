"""Confidence intervals against published numbers, exact counts and their own coverage."""

import numpy as np
import pytest

from fastldm.errors import InputError
from fastldm.evaluation.statistics import Score, difference, mean, ratio


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


@pytest.mark.parametrize(
    ("count", "quantile"),
    # Student's t at 97.5%, of published tables.
    [(2, 12.706), (4, 3.182), (5, 2.776), (11, 2.228), (12, 2.201), (21, 2.086), (31, 2.042), (121, 1.980)],
)
def test_a_mean_has_the_interval_of_student(count, quantile):
    values = np.random.default_rng(count).normal(3, 2, count)
    value, (low, high) = mean(values)
    error = values.std(ddof=1) / count**0.5
    assert value == pytest.approx(values.mean())
    # Half of the tables' last digit.
    assert (high - low) / 2 / error == pytest.approx(quantile, abs=5e-4)
    assert (high + low) / 2 == pytest.approx(value)


@pytest.mark.parametrize("turns", [4, 5])
def test_a_ratio_of_few_turns_covers_the_truth_in_about_95_percent_of_experiments(turns):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        load = rng.normal(0, 0.3, turns)
        ours, theirs = (np.exp(load + rng.normal(0, 0.05, turns)) * scale for scale in (3, 1))
        value, (low, high) = ratio(ours, theirs)
        assert low < value < high
        hits += low <= 3 <= high
    # 0.95 with four standard errors of 2000 draws to either side.
    assert 0.930 <= hits / 2000 <= 0.970


def test_one_measurement_has_no_interval():
    with pytest.raises(InputError, match="two or more"):
        mean([1.0])
    with pytest.raises(InputError, match="two or more"):
        ratio([1.0], [2.0])
