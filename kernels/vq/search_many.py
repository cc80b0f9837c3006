"""The scores of vq_nearest in many dimensions, on the tensor cores.

Rows and codes are split into two float16 numbers for each component, scaled by powers of two: one scale
for each row, one for each tile of codes. Three products of the parts give z'.e' to about the error of
float32 (`bound.py`). A program has a tile of rows and goes over the tiles of codes. For each row and
column of a tile it keeps the least score, which tile had it, and the least score of all others; at the
end the columns are merged. `finish.py` takes it from there, with single codes as places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bound import largest_of, slack
from .packed import centre_of


@triton.jit
def scales_for(largest):
    """Powers of two: `up`, for which up * largest is in 2^7 .. 2^8 or below, and 1 / up."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 8)
    up = ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, ((exponent - 7) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(value):
    """float16 hi and mid with value = hi + mid but for the rounding of mid."""
    hi = value.to(tl.float16)
    return hi, (value - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def shifted_codes(codebook_ptr, stride_k, stride_cd, num_codes, centre, code, d, DIM: tl.constexpr):
    """Components d (BLOCK_D) of the codes (CODES) less the centre: (CODES, BLOCK_D), float64."""
    mask = (code < num_codes)[:, None] & (d < DIM)[None, :]
    at = codebook_ptr + code[:, None] * stride_k + d.to(tl.int64)[None, :] * stride_cd
    value = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    return tl.where(mask, value - centre.to(tl.float64)[None, :], 0.0)


@triton.jit(do_not_specialize=["num_codes"])
def pack_many(
    codebook_ptr,
    stride_k,
    stride_cd,
    num_codes,
    packed_ptr,
    norms_ptr,
    scales_ptr,
    padded,
    centre_ptr,
    largest_ptr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """packed (2, PADDED_DIM, padded), hi and mid, norms (padded), centre (DIM); and for each program, that is
    for each tile of codes, what packed has to be multiplied with to scales, and the largest norm to largest.

    Codes past the last one are at the distance infinity, dimensions past the last one are 0.
    """
    pid = tl.program_id(0)
    code = pid.to(tl.int64) * CODES + tl.arange(0, CODES)
    squares = tl.zeros((CODES,), tl.float64)
    largest = tl.zeros((CODES,), tl.float32)
    for first in range(0, PADDED_DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        centre = centre_of(codebook_ptr, stride_k, stride_cd, num_codes, d, DIM, SAMPLE)
        if pid == 0:
            tl.store(centre_ptr + d, centre, mask=d < DIM)
        shifted = shifted_codes(codebook_ptr, stride_k, stride_cd, num_codes, centre, code, d, DIM)
        squares += tl.sum(shifted * shifted, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(shifted.to(tl.float32)), axis=1))
    up, down = scales_for(tl.max(largest, axis=0))
    for first in range(0, PADDED_DIM, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        centre = centre_of(codebook_ptr, stride_k, stride_cd, num_codes, d, DIM, SAMPLE)
        shifted = shifted_codes(codebook_ptr, stride_k, stride_cd, num_codes, centre, code, d, DIM)
        hi, mid = halves(shifted.to(tl.float32) * up)
        at = packed_ptr + d.to(tl.int64)[None, :] * padded + code[:, None]
        tl.store(at, hi)
        tl.store(at + tl.full((), PADDED_DIM, tl.int64) * padded, mid)
    norms = squares.to(tl.float32)
    tl.store(norms_ptr + code, tl.where(code < num_codes, norms, float("inf")))
    tl.store(largest_ptr + pid, tl.max(norms, axis=0))
    tl.store(scales_ptr + pid, down)


@triton.jit
def shifted_rows(start, stride_d, inside, centre_ptr, d, DIM: tl.constexpr):
    """Components d (BLOCK_D) of the rows that begin at `start` (ROWS), less the centre: (ROWS, BLOCK_D)."""
    mask = inside[:, None] & (d < DIM)[None, :]
    value = tl.load(start[:, None] + d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    centre = tl.load(centre_ptr + d, mask=d < DIM, other=0.0)
    return tl.where(mask, value - centre[None, :], 0.0)


@triton.jit
def add_products(total, hi, mid, packed, low):
    """total + (hi + mid) (e_hi + e_mid) without mid e_mid: the small products first, so that they round as
    little as they are. `packed` are the addresses of e_hi, `low` further on is e_mid."""
    code_hi = tl.load(packed)
    total = tl.dot(mid, code_hi, total)
    total = tl.dot(hi, tl.load(packed + low), total)
    return tl.dot(hi, code_hi, total)


@triton.jit(do_not_specialize=["num_rows", "inner", "largest_count", "tiles", "tiles_per_split"])
def search_many(
    z_ptr,
    num_rows,
    inner,
    stride_outer,
    stride_inner,
    stride_d,
    packed_ptr,
    norms_ptr,
    scales_ptr,
    padded,
    centre_ptr,
    largest_ptr,
    largest_count,
    least_ptr,
    others_ptr,
    place_ptr,
    slack_ptr,
    tiles,
    tiles_per_split,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """A tile of rows and tiles_per_split tiles of codes: least, others and place (splits, rows), slack
    (rows).

    CHUNKS of BLOCK_D dimensions; more than one are read and split anew for each tile of codes.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    inside = row < num_rows
    start = z_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    block_d = tl.arange(0, BLOCK_D)
    squares = tl.zeros((ROWS,), tl.float32)
    largest = tl.zeros((ROWS,), tl.float32)
    for chunk in range(CHUNKS):
        value = shifted_rows(start, stride_d, inside, centre_ptr, chunk * BLOCK_D + block_d, DIM)
        squares += tl.sum(value * value, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(value), axis=1))
    up, down = scales_for(largest)
    if CHUNKS == 1:
        value = shifted_rows(start, stride_d, inside, centre_ptr, block_d, DIM)
        hi, mid = halves(value * up[:, None])

    begin = split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tiles)
    column = tl.arange(0, CODES)
    low = tl.full((), BLOCK_D * CHUNKS, tl.int64) * padded
    best = tl.full((ROWS, CODES), float("inf"), tl.float32)
    second = tl.full((ROWS, CODES), float("inf"), tl.float32)
    tile_of_best = tl.full((ROWS, CODES), 0, tl.int32) + begin
    for tile in range(begin, end):
        code = tile * CODES + column
        packed = packed_ptr + block_d.to(tl.int64)[:, None] * padded + code[None, :]
        product = tl.zeros((ROWS, CODES), tl.float32)
        if CHUNKS == 1:
            product = add_products(product, hi, mid, packed, low)
        else:
            for chunk in range(CHUNKS):
                value = shifted_rows(start, stride_d, inside, centre_ptr, chunk * BLOCK_D + block_d, DIM)
                hi, mid = halves(value * up[:, None])
                product = add_products(product, hi, mid, packed, low)
                packed += tl.full((), BLOCK_D, tl.int64) * padded
        scale = -2.0 * down * tl.load(scales_ptr + tile)
        score = tl.fma(
            product, tl.broadcast_to(scale[:, None], (ROWS, CODES)), tl.load(norms_ptr + code)[None, :]
        )
        second = tl.minimum(second, tl.maximum(best, score))
        tile_of_best = tl.where(score < best, tile, tile_of_best)
        best = tl.minimum(best, score)

    least = tl.min(best, axis=1)
    winner = tl.argmin(best, axis=1)
    here = column[None, :] == winner[:, None]
    others = tl.min(tl.where(here, second, best), axis=1)
    place = tl.max(tl.where(here, tile_of_best, 0), axis=1) * CODES + winner
    at = split.to(tl.int64) * num_rows + row
    tl.store(least_ptr + at, least, mask=inside)
    tl.store(others_ptr + at, others, mask=inside)
    tl.store(place_ptr + at, tl.minimum(place, padded - 1), mask=inside)
    if split == 0:
        tl.store(
            slack_ptr + row,
            slack(squares, largest_of(largest_ptr, largest_count, 256), RELATIVE, DIM),
            mask=inside,
        )
