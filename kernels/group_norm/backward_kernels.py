"""The kernels of the backward; what they do, and why so: backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.rounding import rounded_to
from .gradient import chunk_sums, combined, finish_channels, normalized, through_activation, write_dx
from .tile import (
    affine,
    block_channels,
    block_groups,
    channel_values,
    exact_difference,
    membership,
    pixel_count,
    tile_offsets,
    to_channels,
)


@triton.jit
def one_program(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    dx_ptr,
    sums_ptr,
    dchannel_bias_ptr,
    dscale_ptr,
    dshift_ptr,
    channel_bias_stride,
    scale_stride,
    shift_stride,
    pixel_units,
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
    """Whole slabs of GROUPS groups; grid: blocks of groups, fastest, by samples. dx_ptr may be None."""
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    block = tl.program_id(0) % BLOCKS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    pixels = pixel_count(pixel_units, UNIT)
    grad_ptr += n * CHANNELS * pixels
    x_ptr += n * CHANNELS * pixels
    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    member = membership(CPG, BLOCK_C, BLOCK_G)
    mean_c = channel_values(mean_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0)
    rstd_c = channel_values(rstd_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0)
    channel_bias = channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0)
    high, low = exact_difference(channel_bias, mean_c)
    weight, bias, _, slope, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, exists
    )

    start = tl.zeros([], tl.int64)
    if RESIDENT:
        pixel = tl.arange(0, BLOCK_P)
        mask = exists[:, None] & (pixel < pixels)[None, :]
        offsets = tile_offsets(channel, pixel, pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, normalized(x, high, low, rstd_c), 0.0)
        du = through_activation(grad, xhat, slope, offset, SILU)
        sum1 = tl.sum(du, axis=1)
        sum2 = tl.sum(du * xhat, axis=1)
        sum3 = tl.sum(xhat, axis=1)
    else:
        sum1, sum2, sum3 = chunk_sums(
            grad_ptr,
            x_ptr,
            high,
            low,
            rstd_c,
            slope,
            offset,
            channel,
            exists,
            start,
            start + pixels,
            pixels,
            CHANNELS,
            BLOCK_C,
            BLOCK_P,
            CHANNELS_LAST,
            SILU,
        )
    c1, c2, off = finish_channels(
        sum1,
        sum2,
        sum3,
        weight,
        bias,
        slope,
        rstd_c,
        member,
        channel,
        exists,
        n,
        pixels,
        sums_ptr,
        dchannel_bias_ptr,
        dscale_ptr,
        dshift_ptr,
        NUM_GROUPS,
        CPG,
    )
    if dx_ptr is not None:
        c1 = to_channels(c1, member)
        c2 = to_channels(c2, member)
        off = to_channels(off, member)
        dx_ptr += n * CHANNELS * pixels
        if RESIDENT:
            dx = combined(du, xhat, slope, rstd_c, c1, c2, off)
            tl.store(dx_ptr + offsets, rounded_to(dx, dx_ptr.dtype.element_ty), mask=mask)
        else:
            write_dx(
                grad_ptr,
                x_ptr,
                dx_ptr,
                high,
                low,
                rstd_c,
                slope,
                offset,
                c1,
                c2,
                off,
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
def sums(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    channel_bias_stride,
    scale_stride,
    shift_stride,
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
    SILU: tl.constexpr,
):
    """S1, S2 and S3 of a chunk, to partial_ptr (batch, chunks, 3, channels).

    Grid: blocks of groups, fastest, by chunks of pixels by samples.
    """
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    pixels = pixel_count(pixel_units, UNIT)
    block = tl.program_id(0) % BLOCKS
    chunk = (tl.program_id(0) // BLOCKS) % chunks
    n = (tl.program_id(0) // BLOCKS // chunks).to(tl.int64)
    start = chunk.to(tl.int64) * chunk_tiles * BLOCK_P
    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    _, _, _, slope, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, exists
    )
    high, low = exact_difference(
        channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0),
        channel_values(mean_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0),
    )
    sum1, sum2, sum3 = chunk_sums(
        grad_ptr + n * CHANNELS * pixels,
        x_ptr + n * CHANNELS * pixels,
        high,
        low,
        channel_values(rstd_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0),
        slope,
        offset,
        channel,
        exists,
        start,
        tl.minimum(start + chunk_tiles * BLOCK_P, pixels),
        pixels,
        CHANNELS,
        BLOCK_C,
        BLOCK_P,
        CHANNELS_LAST,
        SILU,
    )
    where = partial_ptr + (n * chunks + chunk) * 3 * CHANNELS + channel
    tl.store(where, sum1, mask=exists)
    tl.store(where + CHANNELS, sum2, mask=exists)
    tl.store(where + 2 * CHANNELS, sum3, mask=exists)


@triton.jit
def coefficients(
    partial_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    scale_stride,
    coefficients_ptr,
    sums_ptr,
    dchannel_bias_ptr,
    dscale_ptr,
    dshift_ptr,
    pixel_units,
    chunks,
    UNIT: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    CPG: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Adds up the chunks, BLOCK_CHUNKS at a time in order; c1, c2 and off to (batch, 3, groups).

    Grid: blocks of groups, fastest, by samples.
    """
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    block = tl.program_id(0) % BLOCKS
    n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    sum1 = tl.zeros([BLOCK_C], tl.float32)
    sum2 = tl.zeros([BLOCK_C], tl.float32)
    sum3 = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        each = first + tl.arange(0, BLOCK_CHUNKS)
        mask = (each < chunks)[:, None] & exists[None, :]
        where = partial_ptr + (n * chunks + each)[:, None] * (3 * CHANNELS) + channel[None, :]
        sum1 += tl.sum(tl.load(where, mask=mask, other=0.0), axis=0)
        sum2 += tl.sum(tl.load(where + CHANNELS, mask=mask, other=0.0), axis=0)
        sum3 += tl.sum(tl.load(where + 2 * CHANNELS, mask=mask, other=0.0), axis=0)
    weight, bias, _, slope, _ = affine(
        weight_ptr, bias_ptr, scale_ptr, None, scale_stride, 0, n, channel, exists
    )
    c1, c2, off = finish_channels(
        sum1,
        sum2,
        sum3,
        weight,
        bias,
        slope,
        channel_values(rstd_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0),
        membership(CPG, BLOCK_C, BLOCK_G),
        channel,
        exists,
        n,
        pixel_count(pixel_units, UNIT),
        sums_ptr,
        dchannel_bias_ptr,
        dscale_ptr,
        dshift_ptr,
        NUM_GROUPS,
        CPG,
    )
    group, has_group = block_groups(block, NUM_GROUPS, GROUPS, BLOCK_G)
    where = coefficients_ptr + n * 3 * NUM_GROUPS + group
    tl.store(where, c1, mask=has_group)
    tl.store(where + NUM_GROUPS, c2, mask=has_group)
    tl.store(where + 2 * NUM_GROUPS, off, mask=has_group)


@triton.jit
def input_gradient(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    coefficients_ptr,
    weight_ptr,
    bias_ptr,
    channel_bias_ptr,
    scale_ptr,
    shift_ptr,
    dx_ptr,
    channel_bias_stride,
    scale_stride,
    shift_stride,
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
    SILU: tl.constexpr,
):
    """dx of a chunk. Grid: that of `sums`, backwards, so that what is still in the L2 cache is read first."""
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    BLOCKS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    pixels = pixel_count(pixel_units, UNIT)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program % BLOCKS
    chunk = (program // BLOCKS) % chunks
    n = (program // BLOCKS // chunks).to(tl.int64)
    start = chunk.to(tl.int64) * chunk_tiles * BLOCK_P
    channel, exists = block_channels(block, NUM_GROUPS, CPG, GROUPS, BLOCK_C)
    _, _, _, slope, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, exists
    )
    group = channel // CPG
    coefficients = n * 3 * NUM_GROUPS + group
    high, low = exact_difference(
        channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0),
        channel_values(mean_ptr, n * NUM_GROUPS + group, exists, 0.0),
    )
    write_dx(
        grad_ptr + n * CHANNELS * pixels,
        x_ptr + n * CHANNELS * pixels,
        dx_ptr + n * CHANNELS * pixels,
        high,
        low,
        channel_values(rstd_ptr, n * NUM_GROUPS + group, exists, 0.0),
        slope,
        offset,
        channel_values(coefficients_ptr, coefficients, exists, 0.0),
        channel_values(coefficients_ptr, coefficients + NUM_GROUPS, exists, 0.0),
        channel_values(coefficients_ptr, coefficients + 2 * NUM_GROUPS, exists, 0.0),
        channel,
        exists,
        start,
        tl.minimum(start + chunk_tiles * BLOCK_P, pixels),
        pixels,
        CHANNELS,
        BLOCK_P,
        CHANNELS_LAST,
        SILU,
    )


@triton.jit
def parameter_gradients(
    sums_ptr,
    scale_ptr,
    dweight_ptr,
    dbias_ptr,
    scale_stride,
    batch,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight and dbias, either pointer may be None, of sums_ptr (batch, 2, channels). Grid: blocks of
    channels."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < CHANNELS
    dweight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, batch, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (n < batch)[:, None] & exists[None, :]
        where = n[:, None] * (2 * CHANNELS) + channel[None, :]
        scale = n[:, None] * scale_stride + channel[None, :]
        gain = channel_values(scale_ptr, scale, mask, 0.0) + 1.0
        dbias += gain * tl.load(sums_ptr + where, mask=mask, other=0.0)
        dweight += gain * tl.load(sums_ptr + CHANNELS + where, mask=mask, other=0.0)
    if dweight_ptr is not None:
        total = tl.sum(dweight, axis=0)
        tl.store(dweight_ptr + channel, rounded_to(total, dweight_ptr.dtype.element_ty), mask=exists)
    if dbias_ptr is not None:
        total = tl.sum(dbias, axis=0)
        tl.store(dbias_ptr + channel, rounded_to(total, dbias_ptr.dtype.element_ty), mask=exists)
