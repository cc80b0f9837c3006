"""Backward of group norm, without atomics.

Formulas: `fastldm/reference/group_norm.py`. xhat and the slope of the activation are found anew from x with the
whole affine part. Of each channel of a sample, over its pixels,

    S1 = sum du,   S2 = sum du * xhat,   S3 = sum xhat,   with du = grad * act'(u),

and everything else is arithmetic on these: with A = weight * (1 + scale) and m elements in a group,

    c1 = sum_c A S1 / m,   c2 = sum_c A S2 / m,   dx = rstd (A du - c1 - xhat c2)
    dchannel_bias = sum dx = rstd (A S1 - pixels c1 - c2 S3)
    dshift = S1,   dscale = weight S2 + bias S1,   dweight = sum_n (1 + scale) S2,   dbias = sum_n (1 + scale) S1

The sum of xhat over a group is 0; what `off = sum_c S3 / m` it is instead comes from a saved mean that float32
rounded, and is subtracted from every xhat (from the sums, after the fact).

As the forward: "resident", x and grad stay in registers (2 reads, 1 write); "sweep", the slab is read a second
time out of the caches; "split", `_sums` per chunk of pixels, `_coefficients` merges them in fixed order, `_dx`
(4 reads, 1 write). dweight and dbias need all samples: `_parameters`, a small kernel at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, ceil_div, next_power_of_two
from ..common.layout import laid_out_as
from ..common.rounding import rounded_to
from ..common.target import Target, target_of
from .configs import choose_backward
from .problem import Problem, describe, float32_like, parameters, sizes
from .tile import (
    affine,
    block_channels,
    block_groups,
    channel_values,
    membership,
    pixel_count,
    sigmoid,
    tile_offsets,
    to_channels,
    to_groups,
)


@triton.jit
def _normalized(x, mean_c, rstd_c, channel_bias):
    """xhat of a tile; x - mean first, which is exact where both are large."""
    return ((x - mean_c[:, None]) + channel_bias[:, None]) * rstd_c[:, None]


@triton.jit
def _through_activation(grad, xhat, slope, offset, SILU: tl.constexpr):
    """du of a tile: grad * act'(u)."""
    if SILU:
        u = xhat * slope[:, None] + offset[:, None]
        s = sigmoid(u)
        grad = grad * (s * (1.0 + u * (1.0 - s)))
    return grad


@triton.jit
def _chunk_sums(
    grad_ptr,
    x_ptr,
    mean_c,
    rstd_c,
    channel_bias,
    slope,
    offset,
    channel,
    exists,
    start,
    stop,
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """S1, S2 and S3 of the pixels from `start` to `stop`, per channel."""
    lanes = tl.arange(0, BLOCK_P)
    sum1 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum2 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum3 = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first_pixel in range(start, stop, BLOCK_P):
        pixel = first_pixel + lanes
        # Chunks are whole tiles but for the last, so no tile goes past the end of its chunk unmasked.
        mask = exists[:, None] & (pixel < pixels)[None, :]
        offsets = tile_offsets(channel, pixel, pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        xhat = tl.where(mask, _normalized(x, mean_c, rstd_c, channel_bias), 0.0)
        du = _through_activation(grad, xhat, slope, offset, SILU)
        sum1 += du
        sum2 += du * xhat
        sum3 += xhat
    return tl.sum(sum1, axis=1), tl.sum(sum2, axis=1), tl.sum(sum3, axis=1)


@triton.jit
def _dx_chunk(
    grad_ptr,
    x_ptr,
    dx_ptr,
    mean_c,
    rstd_c,
    channel_bias,
    slope,
    offset,
    c1,
    c2,
    off,
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
        # Nobody needs these again: they should not push what is still to be read out of the cache.
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        xhat = _normalized(x.to(tl.float32), mean_c, rstd_c, channel_bias)
        du = _through_activation(grad.to(tl.float32), xhat, slope, offset, SILU)
        dx = _combined(du, xhat, slope, rstd_c, c1, c2, off)
        tl.store(dx_ptr + offsets, rounded_to(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combined(du, xhat, slope, rstd_c, c1, c2, off):
    """dx of a tile."""
    inner = slope[:, None] * du - c1[:, None] - (xhat - off[:, None]) * c2[:, None]
    return inner * rstd_c[:, None]


@triton.jit
def _finish_channels(
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
    NUM_GROUPS: tl.constexpr,
    CPG: tl.constexpr,
):
    """From the sums over all pixels: writes what is per channel of a sample, returns c1, c2 and off, per group.

    sums_ptr (batch, 2, channels) takes S1 and S2 for `_parameters`; each pointer may be None.
    """
    count = (CPG * pixels).to(tl.float32)
    off = to_groups(sum3, member) / count
    off_c = to_channels(off, member)
    sum2 -= off_c * sum1
    c1 = to_groups(slope * sum1, member) / count
    c2 = to_groups(slope * sum2, member) / count
    CHANNELS: tl.constexpr = NUM_GROUPS * CPG
    where = n * CHANNELS + channel
    if sums_ptr is not None:
        tl.store(sums_ptr + n * CHANNELS + where, sum1, mask=exists)
        tl.store(sums_ptr + (n + 1) * CHANNELS + where, sum2, mask=exists)
    if dchannel_bias_ptr is not None:
        length = pixels.to(tl.float32)
        rest = sum3 - off_c * length
        total = slope * sum1 - length * to_channels(c1, member) - to_channels(c2, member) * rest
        tl.store(
            dchannel_bias_ptr + where,
            rounded_to(rstd_c * total, dchannel_bias_ptr.dtype.element_ty),
            mask=exists,
        )
    if dscale_ptr is not None:
        dscale = weight * sum2 + bias * sum1
        tl.store(dscale_ptr + where, rounded_to(dscale, dscale_ptr.dtype.element_ty), mask=exists)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + where, rounded_to(sum1, dshift_ptr.dtype.element_ty), mask=exists)
    return c1, c2, off


@triton.jit
def _one_program(
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
        xhat = tl.where(mask, _normalized(x, mean_c, rstd_c, channel_bias), 0.0)
        du = _through_activation(grad, xhat, slope, offset, SILU)
        sum1 = tl.sum(du, axis=1)
        sum2 = tl.sum(du * xhat, axis=1)
        sum3 = tl.sum(xhat, axis=1)
    else:
        sum1, sum2, sum3 = _chunk_sums(
            grad_ptr,
            x_ptr,
            mean_c,
            rstd_c,
            channel_bias,
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
    c1, c2, off = _finish_channels(
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
            dx = _combined(du, xhat, slope, rstd_c, c1, c2, off)
            tl.store(dx_ptr + offsets, rounded_to(dx, dx_ptr.dtype.element_ty), mask=mask)
        else:
            _dx_chunk(
                grad_ptr,
                x_ptr,
                dx_ptr,
                mean_c,
                rstd_c,
                channel_bias,
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
def _sums(
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
    sum1, sum2, sum3 = _chunk_sums(
        grad_ptr + n * CHANNELS * pixels,
        x_ptr + n * CHANNELS * pixels,
        channel_values(mean_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0),
        channel_values(rstd_ptr, n * NUM_GROUPS + channel // CPG, exists, 0.0),
        channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0),
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
def _coefficients(
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
    c1, c2, off = _finish_channels(
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
def _dx(
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
    """dx of a chunk. Grid: that of `_sums`, backwards, so that what is still in the L2 cache is read first."""
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
    _dx_chunk(
        grad_ptr + n * CHANNELS * pixels,
        x_ptr + n * CHANNELS * pixels,
        dx_ptr + n * CHANNELS * pixels,
        channel_values(mean_ptr, n * NUM_GROUPS + group, exists, 0.0),
        channel_values(rstd_ptr, n * NUM_GROUPS + group, exists, 0.0),
        channel_values(channel_bias_ptr, n * channel_bias_stride + channel, exists, 0.0),
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
def _parameters(
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


class BackwardPlan(NamedTuple):
    """Run in order, the launches fill the gradients (None where not needed): dx in the layout that the kernels
    read, the parameters' contiguous."""

    launches: list[Launch]
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dchannel_bias: Tensor | None
    dscale: Tensor | None
    dshift: Tensor | None


def plan_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needed: list[bool],
    target: Target,
) -> BackwardPlan:
    """Arguments as the backward operation in `fastldm.ops.group_norm`; x not empty."""
    x, problem = describe(x, num_groups)
    if grad.stride() != x.stride():
        grad = laid_out_as(grad, x)
    config = choose_backward(problem, target)
    dx = torch.empty_like(x) if needed[0] else None
    dweight, dbias, dchannel_bias, dscale, dshift = (
        torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
        for p, need in zip((weight, bias, channel_bias, scale, shift), needed[1:])
    )
    sums = float32_like(x, problem.batch, 2, problem.channels) if needed[1] or needed[2] else None
    given = parameters(weight, bias, channel_bias, scale, shift)
    inputs = {"grad_ptr": grad, "x_ptr": x, "mean_ptr": mean.contiguous(), "rstd_ptr": rstd.contiguous()}
    per_channel = {
        "sums_ptr": sums,
        "dchannel_bias_ptr": dchannel_bias,
        "dscale_ptr": dscale,
        "dshift_ptr": dshift,
    }
    silu = activation is not None
    if config.way != "split":
        resident = config.way == "resident"
        block_pixels = next_power_of_two(problem.pixels) if resident else config.block_pixels
        arguments = {
            **inputs,
            **given,
            **sizes(problem, config.groups, block_pixels),
            **per_channel,
            "dx_ptr": dx,
            "SILU": silu,
            "RESIDENT": resident,
        }
        grid = (problem.batch * problem.blocks(config.groups),)
        launches = [Launch(_one_program, grid, arguments, config.num_warps)]
    else:
        launches = _split(problem, config, inputs, given, per_channel, dx, silu)
    if sums is not None:
        block = min(32, next_power_of_two(problem.channels))
        arguments = {
            "sums_ptr": sums,
            "scale_ptr": given["scale_ptr"],
            "scale_stride": given["scale_stride"],
            "dweight_ptr": dweight,
            "dbias_ptr": dbias,
            "batch": problem.batch,
            "CHANNELS": problem.channels,
            "BLOCK_N": min(64, next_power_of_two(problem.batch)),
            "BLOCK_C": block,
        }
        launches.append(Launch(_parameters, (ceil_div(problem.channels, block),), arguments, 4))
    return BackwardPlan(launches, dx, dweight, dbias, dchannel_bias, dscale, dshift)


def _split(problem: Problem, config, inputs, given, per_channel, dx, silu) -> list[Launch]:
    x = inputs["x_ptr"]
    chunk_tiles = ceil_div(ceil_div(problem.pixels, config.block_pixels), config.chunks)
    chunks = ceil_div(problem.pixels, chunk_tiles * config.block_pixels)
    partial = float32_like(x, problem.batch, chunks, 3, problem.channels)
    coefficients = float32_like(x, problem.batch, 3, problem.num_groups)
    shared = {
        **inputs,
        **given,
        **sizes(problem, config.groups, config.block_pixels),
        "chunks": chunks,
        "chunk_tiles": chunk_tiles,
        "SILU": silu,
    }
    grid = (problem.batch * problem.blocks(config.groups) * chunks,)
    one_group = sizes(problem, 1, 1)
    del one_group["BLOCK_P"], one_group["CHANNELS_LAST"]
    merge = {
        "partial_ptr": partial,
        "rstd_ptr": inputs["rstd_ptr"],
        **{name: given[name] for name in ("weight_ptr", "bias_ptr", "scale_ptr", "scale_stride")},
        "coefficients_ptr": coefficients,
        **per_channel,
        **one_group,
        "chunks": chunks,
        # A tile of 2048 sums, which four warps load in one go.
        "BLOCK_CHUNKS": max(1, min(next_power_of_two(chunks), 2048 // one_group["BLOCK_C"])),
    }
    launches = [
        Launch(_sums, grid, {**shared, "partial_ptr": partial}, config.num_warps),
        Launch(_coefficients, (problem.batch * problem.num_groups,), merge, 4),
    ]
    if dx is not None:
        arguments = {**shared, "coefficients_ptr": coefficients, "dx_ptr": dx}
        launches.append(Launch(_dx, grid, arguments, config.num_warps))
    return launches


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dchannel_bias, dscale, dshift); empty where not needed."""
    plan = plan_backward(
        grad,
        x,
        mean,
        rstd,
        num_groups,
        weight,
        bias,
        eps,
        activation,
        channel_bias,
        scale,
        shift,
        needed,
        target_of(x.device),
    )
    for launch in plan.launches:
        launch.run()
    _, *found = plan
    inputs = (x, weight, bias, channel_bias, scale, shift)
    return tuple(x.new_empty(0) if g is None else laid_out_as(g, like) for g, like in zip(found, inputs))
