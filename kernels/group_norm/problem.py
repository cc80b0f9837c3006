"""A call of group norm as its kernels see it: two dense layouts, pointers or None, and row strides."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.launch import next_power_of_two
from ..common.layout import dense_layout

# One block of channels is at least one group, and a tile has to fit in the registers of a program.
MAX_CHANNELS_PER_GROUP = 8192


class Problem(NamedTuple):
    """Sizes; `pixels` is the number of positions of a channel, `itemsize` bytes of an element of x."""

    batch: int
    num_groups: int
    channels_per_group: int
    pixels: int
    channels_last: bool
    itemsize: int

    @property
    def channels(self) -> int:
        return self.num_groups * self.channels_per_group

    def block_channels(self, groups: int) -> int:
        """Lanes for the channels of `groups` neighbouring groups."""
        return next_power_of_two(groups * self.channels_per_group)

    def blocks(self, groups: int) -> int:
        """Programs for all channels of a sample."""
        return -(-self.num_groups // groups)


def describe(x: Tensor, num_groups: int) -> tuple[Tensor, Problem]:
    """x in one of the two layouts (a copy if it is in neither), and the sizes."""
    x, channels_last = dense_layout(x)
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    # One pixel is in both layouts; the one with the channels last reads it in vectors.
    channels_last = channels_last or pixels == 1
    return x, Problem(batch, num_groups, channels // num_groups, pixels, channels_last, x.element_size())


def sizes(problem: Problem, groups: int, block_pixels: int) -> dict[str, Any]:
    """The arguments that say what a tile is, for every kernel here.

    The number of pixels is handed over in units of its greatest power of two up to 16, so that the compiler
    knows how rows are aligned: Triton itself tells only multiples of 16 from the rest.
    """
    unit = gcd(problem.pixels, 16)
    return {
        "pixel_units": problem.pixels // unit,
        "UNIT": unit,
        "NUM_GROUPS": problem.num_groups,
        "CPG": problem.channels_per_group,
        "GROUPS": groups,
        "BLOCK_G": next_power_of_two(groups),
        "BLOCK_C": problem.block_channels(groups),
        "BLOCK_P": block_pixels,
        "CHANNELS_LAST": problem.channels_last,
    }


def parameters(
    weight: Tensor | None,
    bias: Tensor | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> dict[str, Any]:
    """Pointers and row strides. Rows of (N, C) may lie apart, as halves of one projection do."""
    found: dict[str, Any] = {}
    for name, value in (("weight", weight), ("bias", bias)):
        found[f"{name}_ptr"] = None if value is None else value.contiguous()
    for name, value in (("channel_bias", channel_bias), ("scale", scale), ("shift", shift)):
        if value is not None and value.stride(1) != 1:
            value = value.contiguous()
        found[f"{name}_ptr"] = value
        found[f"{name}_stride"] = 0 if value is None else value.stride(0)
    return found


def float32_like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)
