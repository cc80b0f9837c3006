"""Rounding a float32 result to the dtype it is stored in."""

from __future__ import annotations

import triton
import triton.language as tl

from .support import interpreted

# A constant of the kernels; Triton itself decides by the same variable.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded_to(value, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest and even on ties.

    Compiled code always does; Triton's interpreter cuts bfloat16 off instead, an error of up to a whole unit
    in the last place. There integers do the rounding, and the cut finds nothing left.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(dtype)
