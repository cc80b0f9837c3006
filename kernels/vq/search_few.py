"""The scores of vq_nearest in few dimensions, on the float32 pipes.

A program has a tile of rows in registers and goes over the packed codes, LANES of them at a time. For
each row and lane it keeps the least score of a place, which place, and the least score of all other
places. A place is DEPTH codes, one after the other in one lane, so that a pair of a row and a code costs
D multiply-adds and one minimum, and all else comes once in DEPTH pairs. At the end the lanes are merged.
`finish.py` takes it from there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bound import largest_of, slack
from .packed import centre_of, code_at


@triton.jit(do_not_specialize=["num_codes"])
def pack_few(
    codebook_ptr,
    stride_k,
    stride_cd,
    num_codes,
    packed_ptr,
    norms_ptr,
    padded,
    centre_ptr,
    largest_ptr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """packed (DIM, padded), norms (padded), centre (DIM), and the largest norm of each program to largest.

    Codes past the last one are at the distance infinity.
    """
    pid = tl.program_id(0)
    position = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = code_at(position, LANES, DEPTH)
    exists = code < num_codes
    squares = tl.zeros((BLOCK,), tl.float64)
    for d in tl.static_range(DIM):
        one = tl.full((1,), d, tl.int32)
        centre = tl.sum(centre_of(codebook_ptr, stride_k, stride_cd, num_codes, one, DIM, SAMPLE), axis=0)
        value = tl.load(
            codebook_ptr + code * stride_k + tl.full((), d, tl.int64) * stride_cd, mask=exists, other=0.0
        )
        shifted = tl.where(exists, value.to(tl.float64) - centre.to(tl.float64), 0.0)
        squares += shifted * shifted
        tl.store(packed_ptr + tl.full((), d, tl.int64) * padded + position, shifted.to(tl.float32))
        if pid == 0:
            tl.store(centre_ptr + d, centre)
    norms = squares.to(tl.float32)
    tl.store(norms_ptr + position, tl.where(exists, norms, float("inf")))
    tl.store(largest_ptr + pid, tl.max(norms, axis=0))


@triton.jit(do_not_specialize=["num_rows", "inner", "largest_count", "blocks", "blocks_per_split"])
def search_few(
    z_ptr,
    num_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    packed_ptr,
    norms_ptr,
    padded,
    centre_ptr,
    largest_ptr,
    largest_count,
    least_ptr,
    others_ptr,
    place_ptr,
    slack_ptr,
    blocks,
    blocks_per_split,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    UNROLL: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """A tile of rows and blocks_per_split blocks of codes: least, others and place (splits, rows), slack
    (rows)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    inside = row < num_rows
    start = z_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    lane = tl.arange(0, LANES)
    rows = ()
    components = ()
    squares = tl.zeros((ROWS,), tl.float32)
    for d in tl.static_range(DIM):
        value = tl.load(start + tl.full((), d, tl.int64) * stride_d, mask=inside, other=0.0).to(tl.float32)
        value -= tl.load(centre_ptr + d)
        squares = tl.fma(value, value, squares)
        rows = rows + ((-2.0 * value)[:, None],)  # noqa: RUF005
        components = components + (packed_ptr + tl.full((), d, tl.int64) * padded + lane,)  # noqa: RUF005

    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, blocks)
    best = tl.full((ROWS, LANES), float("inf"), tl.float32)
    second = tl.full((ROWS, LANES), float("inf"), tl.float32)
    block_of_best = tl.full((ROWS, LANES), 0, tl.int32) + begin
    for block in range(begin, end):
        least = tl.full((ROWS, LANES), float("inf"), tl.float32)
        for first in range(0, DEPTH, UNROLL):
            for step in tl.static_range(UNROLL):
                position = block * (LANES * DEPTH) + (first + step) * LANES
                score = tl.load(norms_ptr + position + lane)[None, :]
                for d in tl.static_range(DIM):
                    score = tl.fma(rows[d], tl.load(components[d] + position)[None, :], score)
                least = tl.minimum(least, score)
        second = tl.minimum(second, tl.maximum(best, least))
        block_of_best = tl.where(least < best, block, block_of_best)
        best = tl.minimum(best, least)

    least = tl.min(best, axis=1)
    winner = tl.argmin(best, axis=1)
    here = lane[None, :] == winner[:, None]
    others = tl.min(tl.where(here, second, best), axis=1)
    place = tl.max(tl.where(here, block_of_best, 0), axis=1) * LANES + winner
    at = split.to(tl.int64) * num_rows + row
    tl.store(least_ptr + at, least, mask=inside)
    tl.store(others_ptr + at, others, mask=inside)
    tl.store(place_ptr + at, place, mask=inside)
    if split == 0:
        largest = largest_of(largest_ptr, largest_count, 256)
        tl.store(slack_ptr + row, slack(squares, largest, RELATIVE, DIM), mask=inside)
