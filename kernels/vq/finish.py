"""The second half of vq_nearest: from the least scores of each row to its nearest code.

`search_few.py` or `search_many.py` leaves for each row, and each of the splits of the codebook that share
it, the least score of a place (`depth` neighbouring codes), which place, and the least score of all other
places. Where the latter is past the limit of `bound.py`, the nearest code is in the former, and the
float64 distances of its codes say which. In the other rows, which are open, the scores of all codes are
computed again, from the packed codebook, and the codes within the limit are compared by their float64
distances: one row at a time, or a few at once where many rows of a tile are open. Distances are added up
as in fastldm/reference/vq.py, which takes a compiler that fuses nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bound import limit_of
from .packed import code_at, component


@triton.jit(do_not_specialize=["num_rows", "inner", "num_codes", "splits"])
def finish(
    z_ptr,
    num_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    codebook_ptr,
    stride_k,
    stride_cd,
    num_codes,
    packed_ptr,
    norms_ptr,
    scales_ptr,
    padded,
    centre_ptr,
    least_ptr,
    others_ptr,
    place_ptr,
    slack_ptr,
    splits,
    index_ptr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
    SCALED: tl.constexpr,
    LOW: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    RANKED: tl.constexpr,
    TOGETHER: tl.constexpr,
    TOGETHER_RANKED: tl.constexpr,
):
    """least, others and place (splits, rows) and slack (rows) to index int64 (rows).

    SCALED is the number of codes with one scale, 0 if there are no scales; LOW the dimension at which the
    lower halves of the components begin.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    inside = row < num_rows
    least = tl.full((ROWS,), float("inf"), tl.float32)
    others = tl.full((ROWS,), float("inf"), tl.float32)
    place = tl.zeros((ROWS,), tl.int32)
    for split in range(splits):
        at = tl.full((), split, tl.int64) * num_rows + row
        new = tl.load(least_ptr + at, mask=inside, other=float("inf"))
        others = tl.minimum(others, tl.load(others_ptr + at, mask=inside, other=float("inf")))
        others = tl.minimum(others, tl.maximum(least, new))
        place = tl.where(new < least, tl.load(place_ptr + at, mask=inside, other=0), place)
        least = tl.minimum(least, new)
    limit = limit_of(least, tl.load(slack_ptr + row, mask=inside, other=0.0))

    index = place * DEPTH
    if DEPTH > 1:
        codes = index[:, None] + tl.arange(0, DEPTH)[None, :]
        exists = inside[:, None] & (codes < num_codes)
        start = z_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
        distance = tl.zeros((ROWS, DEPTH), tl.float64)
        for step in tl.static_range(DIM):
            d = tl.full((), step, tl.int64)
            value = tl.load(start + d * stride_d, mask=inside, other=0.0).to(tl.float64)
            code = codebook_ptr + codes.to(tl.int64) * stride_k + d * stride_cd
            difference = value[:, None] - tl.load(code, mask=exists, other=0.0).to(tl.float64)
            distance += difference * difference
        nearest = tl.min(tl.where(exists, distance, float("inf")), axis=1)
        index = tl.min(tl.where(distance == nearest[:, None], codes, num_codes - 1), axis=1)
        index = tl.minimum(index, num_codes - 1)

    waiting = (inside & ~(others > limit)).to(tl.int32)
    count = tl.sum(waiting, axis=0)
    while count > 0:
        if count > 2:
            waiting, index = rank(
                waiting,
                index,
                limit,
                first_row,
                z_ptr,
                inner,
                stride_outer,
                stride_inner,
                stride_d,
                codebook_ptr,
                stride_k,
                stride_cd,
                num_codes,
                packed_ptr,
                norms_ptr,
                scales_ptr,
                padded,
                centre_ptr,
                DIM,
                UNROLL,
                SCALED,
                LOW,
                LANES,
                DEPTH,
                ROWS,
                TOGETHER_RANKED,
                TOGETHER,
            )
        else:
            waiting, index = rank(
                waiting,
                index,
                limit,
                first_row,
                z_ptr,
                inner,
                stride_outer,
                stride_inner,
                stride_d,
                codebook_ptr,
                stride_k,
                stride_cd,
                num_codes,
                packed_ptr,
                norms_ptr,
                scales_ptr,
                padded,
                centre_ptr,
                DIM,
                UNROLL,
                SCALED,
                LOW,
                LANES,
                DEPTH,
                ROWS,
                RANKED,
                1,
            )
        count = tl.sum(waiting, axis=0)
    tl.store(index_ptr + row, index.to(tl.int64), mask=inside)


@triton.jit
def rank(
    waiting,
    index,
    limit,
    first_row,
    z_ptr,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    codebook_ptr,
    stride_k,
    stride_cd,
    num_codes,
    packed_ptr,
    norms_ptr,
    scales_ptr,
    padded,
    centre_ptr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
    SCALED: tl.constexpr,
    LOW: tl.constexpr,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    RANKED: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """(waiting, index) of the tile after the first TOGETHER rows that wait (1, else 0) have got their index.

    It takes RANKED codes at a time.
    """
    order = tl.cumsum(waiting, axis=0)
    slot = tl.arange(0, TOGETHER)
    taken = (waiting[None, :] > 0) & (order[None, :] == slot[:, None] + 1)
    used = tl.max(taken.to(tl.int32), axis=1) > 0
    row_limit = tl.max(tl.where(taken, limit[None, :], float("-inf")), axis=1)
    row = first_row + tl.sum(tl.where(taken, tl.arange(0, ROWS)[None, :], 0), axis=1)
    start = z_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner

    low = tl.full((), LOW, tl.int64) * padded
    # In a row of NaN, as in one of infinity, no code is nearer than the first.
    nearest = tl.full((TOGETHER,), float("inf"), tl.float64)
    found = tl.zeros((TOGETHER,), tl.int32)
    for base in range(0, padded, RANKED):
        position = base + tl.arange(0, RANKED)
        code = code_at(position, LANES, DEPTH)
        exists = code < num_codes
        scale = tl.load(scales_ptr + position // SCALED, mask=exists, other=0.0) if SCALED > 0 else 1.0
        score = tl.zeros((TOGETHER, RANKED), tl.float32)
        score += tl.load(norms_ptr + position, mask=exists, other=0.0)[None, :]
        for first in range(0, DIM, UNROLL):
            for step in tl.static_range(UNROLL):
                d = tl.full((), first + step, tl.int64)
                centre = tl.load(centre_ptr + d)
                value = tl.load(start + d * stride_d, mask=used, other=0.0).to(tl.float32) - centre
                packed = component(packed_ptr + d * padded, low, scale, position, exists, SCALED > 0)
                score = tl.fma(-2.0 * value[:, None], packed[None, :], score)
        candidate = (used[:, None] & exists[None, :]) & ~(score > row_limit[:, None])
        wanted = tl.max(candidate.to(tl.int32), axis=0) > 0
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            distance = tl.zeros((TOGETHER, RANKED), tl.float64)
            for first in range(0, DIM, UNROLL):
                for step in tl.static_range(UNROLL):
                    d = tl.full((), first + step, tl.int64)
                    value = tl.load(start + d * stride_d, mask=used, other=0.0).to(tl.float64)
                    at = codebook_ptr + code.to(tl.int64) * stride_k + d * stride_cd
                    number = tl.load(at, mask=wanted, other=0.0).to(tl.float64)
                    difference = value[:, None] - number[None, :]
                    distance += difference * difference
            distance = tl.where(candidate, distance, float("inf"))
            least = tl.min(distance, axis=1)
            same = candidate & (distance == least[:, None])
            lowest = tl.min(tl.where(same, code[None, :], num_codes), axis=1)
            closer = (least < nearest) | ((least == nearest) & (lowest < found))
            found = tl.where(closer, lowest, found)
            nearest = tl.where(closer, least, nearest)
    chosen = tl.max(taken.to(tl.int32), axis=0)
    index = tl.where(chosen > 0, tl.sum(tl.where(taken, found[:, None], 0), axis=0), index)
    return waiting - chosen, index
