"""Group norm in CUDA C++: `csrc/cuda/group_norm_forward.cu`, `csrc/cuda/group_norm_backward.cu`.

The kernels take the layouts of `fastldm.kernels.common.layout` and parameters in any of the dtypes, whose
rows may lie apart, and make their own working memory.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of
from fastldm.kernels.common.layout import dense_layout
from fastldm.kernels.common.target import target_of
from fastldm.native.cuda.support import refuse
from fastldm.native.group_norm import run_forward

# csrc/cuda/group_norm_plan.h has the same.
MAX_CHANNELS_PER_GROUP = 2048
MAX_PIXELS = 1 << 30
MAX_GROUPS = 1 << 27
MAX_CHANNELS = 1 << 30
MAX_ELEMENTS = 1 << 32
# Of a slab with the channels last, in the backward: 40 bytes a channel and a table of 24 KiB are 99 KiB.
MAX_CHANNELS_IN_99_KIB = 1900


def supports(x, num_groups, weight, bias, eps, activation, *per_sample) -> str | None:
    batch, channels = x.shape[:2]
    per_group = channels // num_groups
    if per_group > MAX_CHANNELS_PER_GROUP:
        return f"takes up to {MAX_CHANNELS_PER_GROUP} channels per group, got {per_group}"
    if batch * num_groups >= MAX_GROUPS:
        return f"takes less than 2^27 groups of all samples, got {batch * num_groups}"
    if channels > MAX_CHANNELS:
        return f"takes up to 2^30 channels, got {channels}"
    pixels = x.shape[2:].numel()
    if pixels > MAX_PIXELS:
        return f"takes up to 2^30 pixels, got {pixels}"
    if per_group * pixels >= MAX_ELEMENTS:
        return f"takes less than 2^32 elements per group, got {per_group * pixels}"
    return refuse(x, *(p for p in (weight, bias, *per_sample) if p is not None))


def supports_backward(grad, x, mean, rstd, *args) -> str | None:
    reason = refuse(grad) or supports(x, *args[:-1])
    if reason is not None:
        return reason
    room = target_of(x.device).shared_memory
    if room <= 99 << 10 and _channels_last(x):
        channels = _slab_channels(x, args[0])
        if channels > MAX_CHANNELS_IN_99_KIB:
            reason = (
                f"takes slabs of up to {MAX_CHANNELS_IN_99_KIB} channels in the backward of channels-last "
                f"tensors on a GPU whose blocks have {room >> 10} KiB of shared memory, not {channels}"
            )
    return reason


def _slab_channels(x: Tensor, num_groups: int) -> int:
    """Of the most groups that `group_norm_groups` in csrc/cuda/group_norm_plan.h takes together."""
    per_group, itemsize = x.shape[1] // num_groups, x.element_size()
    vector, least = 16 // itemsize, -(-128 // (per_group * itemsize))
    step = vector // math.gcd(vector, per_group)
    channels = -(-least // step) * step * per_group
    return channels if channels <= MAX_CHANNELS_PER_GROUP else least * per_group


def key(direction: str, args: tuple) -> dict[str, str | int | bool]:
    """As tables.py wants it; batch and pixels up to the next power of two."""
    x, num_groups = (args[0], args[1]) if direction == "forward" else (args[1], args[4])
    batch, channels = x.shape[:2]
    pixels = x.shape[2:].numel()
    return {
        "channels_per_group": channels // num_groups,
        "num_groups": num_groups,
        "pixels": 1 << max(0, pixels - 1).bit_length(),
        "batch": 1 << max(0, batch - 1).bit_length(),
        "channels_last": pixels > 1 and _channels_last(x),
        "itemsize": x.element_size(),
    }


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.stride(1) == 1


def dense_rows(parameter: Tensor | None) -> Tensor | None:
    """Of (C,) or (N, C): rows may lie apart, as halves of one projection do, or be all one."""
    dense = parameter is None or parameter.stride(-1) == 1 or parameter.shape[-1] == 1
    return parameter if dense else parameter.contiguous()


def run_backward(
    kernel, grad, x, mean, rstd, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, needed
):
    dense, channels_last = dense_layout(x)
    parameters = (weight, bias, channel_bias, scale, shift)
    grad_x = torch.empty_like(dense) if needed[0] else None
    grads = [
        torch.empty_like(p, memory_format=torch.contiguous_format) if need else None
        for p, need in zip(parameters, needed[1:])
    ]
    kernel(
        grad if grad.stride() == dense.stride() else in_layout_of(grad, dense),
        dense,
        mean.contiguous(),
        rstd.contiguous(),
        channels_last,
        num_groups,
        activation is not None,
        *map(dense_rows, parameters),
        grad_x,
        *grads,
    )
    first = x.new_empty(0) if grad_x is None else in_layout_of(grad_x, x)
    return (first, *(x.new_empty(0) if g is None else g for g in grads))


def implementation() -> Implementation:
    """Needs the compiled library to be loaded."""
    operations = torch.ops.fastldm_cuda
    return Implementation(
        forward=partial(run_forward, operations.group_norm_forward.default, dense_rows),
        backward=partial(run_backward, operations.group_norm_backward.default),
        supports=supports,
        supports_backward=supports_backward,
    )
