"""The numbers behind the exact index of vq_nearest: how far scores are off, and the limit for candidates."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from fastldm.testing import live_backends

if "triton" not in live_backends("vq_nearest"):
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from fastldm.kernels.vq.bound import largest_of, limit_of, relative_error_few, relative_error_many, slack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(relative_error_few(3), 3), (relative_error_few(16), 16), (relative_error_many(64), 64)]
CASES += [(relative_error_many(3 * 4096), 4096)]


def test_relative_errors_are_those_of_the_analysis():
    assert relative_error_few(3) == pytest.approx(11 * 2.0**-24, rel=1e-5)
    assert relative_error_many(64) == pytest.approx(70 * 2.0**-22, rel=1e-4)


@triton.jit
def _slack(squares_ptr, largest_ptr, slack_ptr, RELATIVE: tl.constexpr, DIM: tl.constexpr):
    at = tl.arange(0, 1)
    found = slack(tl.load(squares_ptr + at), tl.load(largest_ptr), RELATIVE, DIM)
    tl.store(slack_ptr + at, found)


def slack_of(squares, largest, relative, dim):
    numbers = [torch.tensor([value], dtype=torch.float32, device=DEVICE) for value in (squares, largest, 0)]
    _slack[(1,)](*numbers, relative, dim, enable_fp_fusion=False)
    return numbers[2].item()


@pytest.mark.parametrize(("relative", "dim"), CASES)
@pytest.mark.parametrize("row", [2.0**-70, 1e-3, 1.0, 300.0, 2.0**50])
@pytest.mark.parametrize("code", [2.0**-70, 2.0**-30, 1.0, 7.0, 2.0**55])
def test_slack(row, code, relative, dim):
    """At least twice the error of a score and of the float64 distance, and no more than a percent above."""
    score = Fraction(relative) * Fraction(code) * Fraction(code + 2 * row)
    truth = Fraction(dim + 4, 2**53) * Fraction(row + code) ** 2
    underflow = Fraction(dim, 2**110) + Fraction(dim, 2**125) * Fraction(row + code)
    # The sums of the squares that it is computed from are themselves off by up to dim roundings.
    below = 1 - dim * 2.0**-24
    found = Fraction(slack_of(below * row**2, below * code**2, relative, dim))
    assert found >= 2 * (score + truth + underflow)
    found = Fraction(slack_of(row**2, code**2, relative, dim))
    # Beside the underflow, squares that underflow in the sums are made up for.
    lost = Fraction(relative) * Fraction(dim, 2**58) * Fraction(row + code)
    lost += Fraction(dim, 2**105) + Fraction(dim, 2**122) * Fraction(row + code)
    assert found <= Fraction(101, 50) * (score + truth + lost)


@pytest.mark.parametrize(("relative", "dim"), CASES)
def test_slack_where_squares_underflow(relative, dim):
    """Components of 2^-64, the squares of which may be flushed to 0."""
    length = Fraction(math.isqrt(dim), 2**64)
    assert Fraction(slack_of(0.0, 0.0, relative, dim)) >= 2 * Fraction(relative) * 3 * length**2
    row = Fraction(1, 2**27)
    assert Fraction(slack_of(float(row**2), 0.0, relative, dim)) >= 4 * Fraction(relative) * row * length


@pytest.mark.parametrize(
    ("squares", "largest"),
    [(1.0, 2e38), (1.0, math.inf), (math.inf, 1.0), (math.inf, 0.0), (math.nan, 1.0), (3e38, 3e38)],
)
def test_slack_where_scores_overflow(squares, largest):
    assert slack_of(squares, largest, *CASES[0]) == math.inf


@triton.jit
def _limit(least_ptr, slack_ptr, limit_ptr):
    at = tl.arange(0, 1)
    tl.store(limit_ptr + at, limit_of(tl.load(least_ptr + at), tl.load(slack_ptr + at)))


@pytest.mark.parametrize("least", [0.0, -0.0, 1.0, -1.0, 3.7, -(2.0**-149), 1e-40, -3e38, 2.0**24 - 1])
@pytest.mark.parametrize("slack", [2.0**-149, 1e-9, 2.0**-25, 1.0, 3.1, 1e30, math.inf])
def test_limit(least, slack):
    """The last float32 number that is not past least + slack, in float64."""
    numbers = [torch.tensor([value], dtype=torch.float32, device=DEVICE) for value in (least, slack, 0)]
    _limit[(1,)](*numbers)
    found = numbers[2].cpu()
    if math.isinf(slack):
        assert found == math.inf
        return
    following = torch.nextafter(found, torch.tensor(math.inf))
    assert found.item() <= numbers[0].item() + numbers[1].item() < following.item()


@triton.jit
def _largest(numbers_ptr, count, largest_ptr):
    tl.store(largest_ptr, largest_of(numbers_ptr, count, 256))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_largest(count):
    numbers = torch.rand(count, device=DEVICE)
    numbers[-1] = 2.0
    padded = torch.cat([numbers, torch.full((300,), torch.inf, device=DEVICE)])
    found = torch.zeros(1, device=DEVICE)
    _largest[(1,)](padded, count, found)
    assert found == 2.0
