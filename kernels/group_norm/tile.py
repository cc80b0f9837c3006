"""What the group norm kernels share on the device.

A tile is [BLOCK_C channels, BLOCK_P pixels]: the channels of GROUPS whole neighbouring groups, with masked
lanes up to the next power of two, in either layout. Channels and groups exchange values by membership, a
small 0/1 matrix [BLOCK_C, BLOCK_G], since CPG (channels per group) is rarely a power of two. `where`, not a
product, keeps a NaN in its group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_channels(
    block, NUM_GROUPS: tl.constexpr, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Channels of a block of groups, and which of the lanes are channels."""
    lane = tl.arange(0, BLOCK_C)
    channel = block * (GROUPS * CPG) + lane
    return channel, (lane < GROUPS * CPG) & (channel < NUM_GROUPS * CPG)


@triton.jit
def block_groups(block, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Groups of a block, and which of the lanes are groups."""
    lane = tl.arange(0, BLOCK_G)
    group = block * GROUPS + lane
    return group, (lane < GROUPS) & (group < NUM_GROUPS)


@triton.jit
def pixel_count(pixel_units, UNIT: tl.constexpr):
    """Pixels of a channel, int64; also where Triton makes `pixel_units` a constant, because it is 1."""
    return pixel_units * tl.full([], UNIT, tl.int64)


@triton.jit
def membership(CPG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    return (tl.arange(0, BLOCK_C) // CPG)[:, None] == tl.arange(0, BLOCK_G)[None, :]


@triton.jit
def to_groups(per_channel, member):
    """Sums over the channels of each group; lanes beyond the channels must be 0."""
    return tl.sum(tl.where(member, per_channel[:, None], 0.0), axis=0)


@triton.jit
def to_channels(per_group, member):
    """The value of its group for each channel."""
    return tl.sum(tl.where(member, per_group[None, :], 0.0), axis=1)


@triton.jit
def tile_to_groups(tile, member, GROUPS: tl.constexpr):
    """Sums over the channels and pixels of each group, [BLOCK_G]."""
    if GROUPS == 1:
        total = tl.sum(tile) + tl.zeros([1], tl.float32)
    else:
        total = to_groups(tl.sum(tile, axis=1), member)
    return total


@triton.jit
def tile_offsets(channel, pixel, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a tile lies in a sample; int64, which the elements of a group may need."""
    if CHANNELS_LAST:
        offsets = pixel.to(tl.int64)[None, :] * CHANNELS + channel[:, None]
    else:
        offsets = channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    return offsets


@triton.jit
def channel_values(pointer, offsets, mask, default):
    """A parameter per channel in float32; `default` where there is none."""
    if pointer is None:
        values = tl.full(offsets.shape, default, tl.float32)
    else:
        values = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def exact_difference(a, b):
    """(high, low) with the sum a - b, exactly, and high the difference in float32 (Knuth's two-sum)."""
    high = a - b
    taken = high - a
    low = (a - (high - taken)) - (b + taken)
    return high, low


@triton.jit
def shifted(x, high, low):
    """x + (high + low) of a tile, for pairs per channel: exact where x and high cancel."""
    return (x + high[:, None]) + low[:, None]


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, n, channel, exists):
    """weight, bias and 1 + scale as they are, and slope and offset of u = xhat * slope + offset."""
    weight = channel_values(weight_ptr, channel, exists, 1.0)
    bias = channel_values(bias_ptr, channel, exists, 0.0)
    gain = channel_values(scale_ptr, n * scale_stride + channel, exists, 0.0) + 1.0
    shift = channel_values(shift_ptr, n * shift_stride + channel, exists, 0.0)
    return weight, bias, gain, weight * gain, bias * gain + shift


@triton.jit
def sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))
