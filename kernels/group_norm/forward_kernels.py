"""The kernels of the forward; what they do, and why so: forward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.rounding import rounded_to
from .tile import (
    affine,
    block_channels,
    block_groups,
    channel_values,
    exact_difference,
    membership,
    pixel_count,
    shifted,
    sigmoid,
    tile_offsets,
    tile_to_groups,
    to_channels,
)


@triton.jit
def _chunk_statistics(
    x_ptr,
    channel_bias,
    channel,
    exists,
    member,
    start,
    stop,
    pixels,
    CHANNELS: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Of the pixels from `start` to `stop`, per group: (pivot, mean - pivot, sum of (x - mean)^2)."""
    lanes = tl.arange(0, BLOCK_P)
    count = (CPG * (stop - start)).to(tl.float32)

    # The pivot is the mean of the first tile. The loop reads that tile again, from the L1 cache.
    mask = exists[:, None] & (start + lanes < stop)[None, :]
    offsets = tile_offsets(channel, start + lanes, pixels, CHANNELS, CHANNELS_LAST)
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + channel_bias[:, None]
    first_count = CPG * tl.minimum(stop - start, BLOCK_P)
    pivot = tile_to_groups(tl.where(mask, first, 0.0), member, GROUPS) / first_count.to(tl.float32)
    high, low = exact_difference(channel_bias, to_channels(pivot, member))

    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first_pixel in range(start, stop, BLOCK_P):
        pixel = first_pixel + lanes
        # Chunks are whole tiles but for the last, so no tile goes past the end of its chunk unmasked.
        mask = exists[:, None] & (pixel < pixels)[None, :]
        offsets = tile_offsets(channel, pixel, pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, shifted(x, high, low), 0.0)
        total += deviation
        squares += deviation * deviation
    rest = tile_to_groups(total, member, GROUPS) / count
    spread = tile_to_groups(squares, member, GROUPS) - count * rest * rest
    return pivot, rest, tl.where(spread < 0.0, 0.0, spread)


@triton.jit
def _activated(x, high, low, slope, offset, SILU: tl.constexpr):
    """y of a tile; `slope` has rstd in it."""
    u = shifted(x, high, low) * slope[:, None] + offset[:, None]
    if SILU:
        u = u * sigmoid(u)
    return u


@triton.jit
def _normalize_chunk(
    x_ptr,
    y_ptr,
    high,
    low,
    slope,
    offset,
    channel,
    exists,
    start,
    stop,
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK_P)
    for first_pixel in range(start, stop, BLOCK_P):
        pixel = first_pixel + lanes
        mask = exists[:, None] & (pixel < pixels)[None, :]
        offsets = tile_offsets(channel, pixel, pixels, CHANNELS, CHANNELS_LAST)
        # Nobody needs x again: it should not push what is still to be read out of the cache.
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        y = _activated(x.to(tl.float32), high, low, slope, offset, SILU)
        tl.store(y_ptr + offsets, rounded_to(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def one_program(
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    channel_bias_stride,
    scale_stride,
    shift_stride,
    pixel_units,
    eps,
    UNIT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Whole slabs of GROUPS groups; grid: blocks of groups, fastest, by samples."""
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    pixels = pixel_count(pixel_units, UNIT)
    block = tl.program_id(0) % BLOCKS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    x_ptr += n * CHANNELS * pixels
    y_ptr += n * CHANNELS * pixels
    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    member = membership(CPG, BLOCK_C, BLOCK_G)
    channel_bias = channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0)
    _, _, _, slope, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, exists
    )
    count = tl.full([BLOCK_G], CPG, tl.float32) * pixels

    if RESIDENT:
        pixel = tl.arange(0, BLOCK_P)
        mask = exists[:, None] & (pixel < pixels)[None, :]
        offsets = tile_offsets(channel, pixel, pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        biased = tl.where(mask, x + channel_bias[:, None], 0.0)
        pivot = tile_to_groups(biased, member, GROUPS) / count
        high, low = exact_difference(channel_bias, to_channels(pivot, member))
        deviation = tl.where(mask, shifted(x, high, low), 0.0)
        rest = tile_to_groups(deviation, member, GROUPS) / count
        spread = tile_to_groups(deviation * deviation, member, GROUPS) - count * rest * rest
        spread = tl.where(spread < 0.0, 0.0, spread)
    else:
        start = tl.zeros([], tl.int64)
        pivot, rest, spread = _chunk_statistics(
            x_ptr,
            channel_bias,
            channel,
            exists,
            member,
            start,
            start + pixels,
            pixels,
            CHANNELS,
            CPG,
            GROUPS,
            BLOCK_C,
            BLOCK_P,
            CHANNELS_LAST,
        )
        high, low = exact_difference(channel_bias, to_channels(pivot, member))

    rstd = tl.rsqrt(spread / count + eps)
    group, has_group = block_groups(block, NUM_GROUPS, GROUPS, BLOCK_G)
    tl.store(mean_ptr + n * NUM_GROUPS + group, pivot + rest, mask=has_group)
    tl.store(rstd_ptr + n * NUM_GROUPS + group, rstd, mask=has_group)
    low -= to_channels(rest, member)
    slope = slope * to_channels(rstd, member)

    if RESIDENT:
        y = _activated(x, high, low, slope, offset, SILU)
        tl.store(y_ptr + offsets, rounded_to(y, y_ptr.dtype.element_ty), mask=mask)
    else:
        _normalize_chunk(
            x_ptr,
            y_ptr,
            high,
            low,
            slope,
            offset,
            channel,
            exists,
            start,
            start + pixels,
            pixels,
            CHANNELS,
            BLOCK_P,
            CHANNELS_LAST,
            SILU,
        )


@triton.jit
def statistics(
    x_ptr,
    partial_ptr,
    channel_bias_ptr,
    channel_bias_stride,
    pixel_units,
    chunks,
    chunk_tiles,
    UNIT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Partial statistics, partial_ptr (batch, groups, 3, chunks): pivot, mean - pivot, sum of (x - mean)^2.

    Grid: blocks of groups, fastest, by chunks of pixels by samples.
    """
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    pixels = pixel_count(pixel_units, UNIT)
    block = tl.program_id(0) % BLOCKS
    chunk = (tl.program_id(0) // BLOCKS) % chunks
    n = (tl.program_id(0) // BLOCKS // chunks).to(tl.int64)
    start = chunk.to(tl.int64) * chunk_tiles * BLOCK_P
    stop = tl.minimum(start + chunk_tiles * BLOCK_P, pixels)
    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    channel_bias = channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0)
    pivot, rest, spread = _chunk_statistics(
        x_ptr + n * CHANNELS * pixels,
        channel_bias,
        channel,
        exists,
        membership(CPG, BLOCK_C, BLOCK_G),
        start,
        stop,
        pixels,
        CHANNELS,
        CPG,
        GROUPS,
        BLOCK_C,
        BLOCK_P,
        CHANNELS_LAST,
    )
    group, has_group = block_groups(block, NUM_GROUPS, GROUPS, BLOCK_G)
    where = partial_ptr + (n * NUM_GROUPS + group) * 3 * chunks + chunk
    tl.store(where, pivot, mask=has_group)
    tl.store(where + chunks, rest, mask=has_group)
    tl.store(where + 2 * chunks, spread, mask=has_group)


@triton.jit
def normalize(
    x_ptr,
    y_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    channel_bias_stride,
    scale_stride,
    shift_stride,
    pixel_units,
    eps,
    chunks,
    chunk_tiles,
    UNIT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """Merges the partial statistics of its groups and normalizes its chunk. Grid: that of `statistics`,
    backwards."""
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    pixels = pixel_count(pixel_units, UNIT)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program % BLOCKS
    chunk = (program // BLOCKS) % chunks
    n = (program // BLOCKS // chunks).to(tl.int64)

    group, has_group = block_groups(block, NUM_GROUPS, GROUPS, BLOCK_G)
    each = tl.arange(0, BLOCK_CHUNKS)
    valid = has_group[:, None] & (each < chunks)[None, :]
    first = partial_ptr + (n * NUM_GROUPS + group) * 3 * chunks
    where = first[:, None] + each[None, :]
    # Around the pivot of the first chunk, as the sums of a chunk are around its own.
    pivot = tl.load(first, mask=has_group, other=0.0)
    pivots = tl.load(where, mask=valid, other=0.0)
    rests = tl.load(where + chunks, mask=valid, other=0.0)
    spreads = tl.load(where + 2 * chunks, mask=valid, other=0.0)
    chunk_pixels = tl.zeros([], tl.int64) + chunk_tiles * BLOCK_P
    counts = CPG * tl.minimum(pixels - each * chunk_pixels, chunk_pixels)[None, :].to(tl.float32)
    count = tl.full([BLOCK_G], CPG, tl.float32) * pixels
    means = tl.where(valid, (pivots - pivot[:, None]) + rests, 0.0)
    rest = tl.sum(tl.where(valid, counts * means, 0.0), axis=1) / count
    apart = means - rest[:, None]
    spread = tl.sum(tl.where(valid, spreads + counts * apart * apart, 0.0), axis=1)
    rstd = tl.rsqrt(spread / count + eps)
    if chunk == 0:
        tl.store(mean_ptr + n * NUM_GROUPS + group, pivot + rest, mask=has_group)
        tl.store(rstd_ptr + n * NUM_GROUPS + group, rstd, mask=has_group)

    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    member = membership(CPG, BLOCK_C, BLOCK_G)
    channel_bias = channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0)
    _, _, _, slope, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, exists
    )
    high, low = exact_difference(channel_bias, to_channels(pivot, member))
    start = chunk * chunk_pixels
    _normalize_chunk(
        x_ptr + n * CHANNELS * pixels,
        y_ptr + n * CHANNELS * pixels,
        high,
        low - to_channels(rest, member),
        slope * to_channels(rstd, member),
        offset,
        channel,
        exists,
        start,
        tl.minimum(start + chunk_pixels, pixels),
        pixels,
        CHANNELS,
        BLOCK_P,
        CHANNELS_LAST,
        SILU,
    )
