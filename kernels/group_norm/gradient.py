"""What the kernels of the backward share on the device; formulas: backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.rounding import rounded_to
from .tile import shifted, sigmoid, tile_offsets, to_channels, to_groups


@triton.jit
def normalized(x, high, low, rstd_c):
    """xhat of a tile; (high, low) is channel_bias - mean."""
    return shifted(x, high, low) * rstd_c[:, None]


@triton.jit
def through_activation(grad, xhat, slope, offset, SILU: tl.constexpr):
    """du of a tile: grad * act'(u)."""
    if SILU:
        u = xhat * slope[:, None] + offset[:, None]
        s = sigmoid(u)
        grad = grad * (s * (1.0 + u * (1.0 - s)))
    return grad


@triton.jit
def chunk_sums(
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
        xhat = tl.where(mask, normalized(x, high, low, rstd_c), 0.0)
        du = through_activation(grad, xhat, slope, offset, SILU)
        sum1 += du
        sum2 += du * xhat
        sum3 += xhat
    return tl.sum(sum1, axis=1), tl.sum(sum2, axis=1), tl.sum(sum3, axis=1)


@triton.jit
def write_dx(
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
        xhat = normalized(x.to(tl.float32), high, low, rstd_c)
        du = through_activation(grad.to(tl.float32), xhat, slope, offset, SILU)
        dx = combined(du, xhat, slope, rstd_c, c1, c2, off)
        tl.store(dx_ptr + offsets, rounded_to(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combined(du, xhat, slope, rstd_c, c1, c2, off):
    """dx of a tile."""
    inner = slope[:, None] * du - c1[:, None] - (xhat - off[:, None]) * c2[:, None]
    return inner * rstd_c[:, None]


@triton.jit
def finish_channels(
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
    """From the sums over all pixels: writes what is per channel, returns c1, c2 and off, per group.

    sums_ptr (batch, 2, channels) takes S1 and S2 for `parameter_gradients`; each pointer may be None.
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
