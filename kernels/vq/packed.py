"""The packed codebook: the centred codes by dimension, e'_1 of all, e'_2 of all, ..., and ||e'||^2 of all.

In few dimensions it is float32, in many it is two float16 parts with a scale for each tile of codes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def centre_of(codebook_ptr, stride_k, stride_cd, num_codes, d, DIM: tl.constexpr, SAMPLE: tl.constexpr):
    """Near the mean of the components d (BLOCK_D): the mean of SAMPLE codes, float32."""
    code = (tl.arange(0, SAMPLE).to(tl.int64) * num_codes) // SAMPLE
    at = codebook_ptr + code[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_cd
    value = tl.load(at, mask=(d < DIM)[None, :], other=0.0).to(tl.float32)
    return tl.sum(value * (1.0 / SAMPLE), axis=0)


@triton.jit
def code_at(position, LANES: tl.constexpr, DEPTH: tl.constexpr):
    """The code at a position: a block has LANES * DEPTH of them, and a place DEPTH neighbouring codes in one
    lane, LANES positions apart."""
    within = position % (LANES * DEPTH)
    return position - within + within % LANES * DEPTH + within // LANES


@triton.jit
def component(packed_ptr, low, scale, position, mask, HALVES: tl.constexpr):
    """One component of e' at the positions of the codes, float32. `packed_ptr` is where that of all codes
    begins, and its lower half `low` further on."""
    value = tl.load(packed_ptr + position, mask=mask, other=0.0).to(tl.float32)
    if HALVES:
        value = (value + tl.load(packed_ptr + low + position, mask=mask, other=0.0).to(tl.float32)) * scale
    return value
