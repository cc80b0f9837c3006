"""The packed codebook: the centred codes by dimension, e'_1 of all, e'_2 of all, ..., and ||e'||^2 of all."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def centre_of(codebook_ptr, stride_k, stride_cd, num_codes, d, SAMPLE: tl.constexpr):
    """Near the mean of component d: the mean of SAMPLE codes."""
    code = (tl.arange(0, SAMPLE).to(tl.int64) * num_codes) // SAMPLE
    value = tl.load(codebook_ptr + code * stride_k + d * stride_cd).to(tl.float32)
    return tl.sum(value * (1.0 / SAMPLE), axis=0)


@triton.jit
def code_at(position, LANES: tl.constexpr, DEPTH: tl.constexpr):
    """The code at a position: a block has LANES * DEPTH of them, and a place DEPTH neighbouring codes in one lane,
    LANES positions apart."""
    within = position % (LANES * DEPTH)
    return position - within + within % LANES * DEPTH + within // LANES


@triton.jit
def component(packed_ptr, scales_ptr, padded, d, position, mask, HALVES: tl.constexpr):
    """e'_d at the positions, float32."""
    at = packed_ptr + d * padded + position
    return tl.load(at, mask=mask, other=0.0)
