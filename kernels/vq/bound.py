"""How far off the float32 scores of vq_nearest can be, and what follows for the candidates.

With z' = z - c and e' = e - c, for any c, the score s_k = ||e'_k||^2 - 2 z'.e'_k is the squared distance
less ||z'||^2, which is the same for all codes. c is the mean of some codes, rounded to float32: the
smaller e', the smaller the errors. With E >= ||e'_k|| for all k, every score that a kernel computes is
within

    error = relative (E^2 + 2 ||z'|| E) + tiny

of s_k. u = 2^-24 is the unit roundoff of float32, and n roundings amount to g(n) = n u / (1 - n u) at
most (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).

`search_few.py` subtracts c in float32 (z') or float64 (e'), takes ||e'||^2 in float64, rounds both to
float32 and adds ||e'||^2 + (-2 z'_1) e'_1 + ... by D fused or unfused multiply-adds: relative = g(D + 8).
D for the additions, 1 for products that are not fused with them, 2 for rounding z' and e', 1 for rounding
||e'||^2.

`search_many.py` splits the rounded z' and e', scaled by powers of two, into float16 parts, x = hi + mid +
rest. float16 has 11 bits: |mid| <= 2^-11 |x|, |rest| <= 2^-22 |x| + 2^-25 (subnormal). It adds, on the
tensor cores, the products mid hi and hi mid, and then hi hi; each product has 22 bits and is exact in
float32. Of z'.e' are missing mid mid, rest e' and z' rest: 3 * 2^-22 ||z'|| ||e'|| and, as the largest
component is scaled to 2^7, 2 * 2^-32 sqrt(D) ||z'|| E for the subnormal rests. Tensor cores align the
products of a step and the accumulator to the largest of them and cut off what falls below; NVIDIA does
not document how, measurements find at least 23 bits kept (Fasi, Higham, Mikaitis and Pranesh, Numerical
behavior of NVIDIA tensor cores, PeerJ Computer Science 7, 2021; Khattak and Mikaitis, arXiv 2512.07004).
With steps of b >= 4 products, b + 1 numbers lose less than 2^-23 of the largest of them, and the sum less
than 2^-23 of it: for each product (1 + 2 / b) 2^-23 of the sum of all absolute values. That sum is at most
2^-10 (1 + 2^-10) ||z'|| ||e'|| while mid hi and hi mid are added and (1 + 2^-9) ||z'|| ||e'|| then, so that
the additions of D products (padding included) are off by less than D 2^-22 ||z'|| ||e'|| together. Where D
is taken in several chunks the three kinds alternate: 3 D. Rounding z', e' and ||e'||^2 and the last one or
two operations make 5 u. So relative = (additions + 6) v / (1 - (additions + 6) v), v = 2^-22.

`finish.py` computes scores again from the same numbers, in float32 by multiply-adds, within both bounds.

`tiny` is for what underflows, in float32 (operations that flush subnormals included: less than 2^-126
each, up to 2^-126 (||z'|| + E) where z' or e' does) and in the scaling of `search_many.py` (2^-110 for a
product).

The float64 distance that decides, as fastldm/reference/vq.py adds it up, is itself off from ||z - e||^2
by at most (D + 4) 2^-53 (||z'|| + E)^2. So the nearest code, ties included, is among those whose score is
at most `slack`, twice the sum of both bounds, above any other computed score: it is enough to compare
their float64 distances. In particular it is enough to do so for the codes up to the least score plus
slack, and scores that are computed a second time in another order may be compared with the same limit.
"""

from __future__ import annotations

import triton
import triton.language as tl


def relative_error_few(dim: int) -> float:
    return _relative(dim + 8, 2.0**-24)


def relative_error_many(additions: int) -> float:
    return _relative(additions + 6, 2.0**-22)


def _relative(roundings: int, unit: float) -> float:
    return roundings * unit / (1.0 - roundings * unit)


@triton.jit
def slack(squares, largest_squares, RELATIVE: tl.constexpr, DIM: tl.constexpr):
    """Of rows with ||z'||^2 = `squares`, E^2 = `largest_squares`; infinity where a score may overflow.

    The factor pays for the rounding of these few operations and of the two sums of at most 4096 squares.
    """
    # Squares that underflow are missing in the sums.
    missing: tl.constexpr = DIM * 2.0**-120
    length = tl.sqrt(squares + missing)
    largest = tl.sqrt(largest_squares + missing)
    size = largest * (largest + 2.0 * length)
    reach = length + largest
    truth = (DIM + 4) * 2.0**-53 * (reach * reach)
    tiny = DIM * 2.0**-107 + DIM * 2.0**-124 * reach
    error = RELATIVE * size + truth + tiny
    return tl.where(size < 1e38, 2.0 * (1.0 + 2.0**-9) * error, float("inf"))


@triton.jit
def limit_of(least, slack):
    """The score up to which codes can be the nearest: the last float32 number up to least + slack."""
    limit = least.to(tl.float64) + slack.to(tl.float64)
    rounded = limit.to(tl.float32)
    bits = rounded.to(tl.int32, bitcast=True)
    before = tl.where(rounded > 0.0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    rounded = tl.where(rounded.to(tl.float64) > limit, before, rounded)
    return tl.where(slack < float("inf"), rounded, float("inf"))


@triton.jit
def largest_of(largest_ptr, count, BLOCK: tl.constexpr):
    """The largest of `count` numbers >= 0."""
    largest = tl.zeros((BLOCK,), tl.float32)
    at = tl.arange(0, BLOCK)
    for first in range(0, count, BLOCK):
        largest = tl.maximum(largest, tl.load(largest_ptr + first + at, mask=first + at < count, other=0.0))
    return tl.max(largest, axis=0)
