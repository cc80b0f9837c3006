"""Group norm in C++ for the CPU: `csrc/cpu/group_norm.cpp`.

The kernels take two dense layouts, (batch, channels, pixels) and (batch, pixels, channels), in which the
order of the pixels is free. Everything else is copied into the nearer one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(x, *args) -> str | None:
    if x.dtype not in _DTYPES:
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got {x.device}"
    return None


def _supports_backward(grad, x, *args) -> str | None:
    return _supports(x)


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x, or a copy of it, in one of the two layouts, and whether that is the one with the channels last.

    The kernels trust what this says.
    """
    if x.is_contiguous():
        return x, False
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    channels_last = _innermost_is_channels(x)
    # Pixels in any order, as long as they are dense: sorted by stride, they have to be contiguous.
    order = sorted(range(2, x.dim()), key=lambda dim: x.stride(dim), reverse=True)
    order = (0, *order, 1) if channels_last else (0, 1, *order)
    if x.permute(order).is_contiguous():
        return x, channels_last
    if channels_last:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), True
    return x.contiguous(), False


def _innermost_is_channels(x: Tensor) -> bool:
    return x.shape[1] > 1 and all(
        x.stride(1) <= x.stride(dim) for dim in range(2, x.dim()) if x.shape[dim] > 1
    )


def _float32(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype is torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()


def _forward(kernel, x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift):
    dense, channels_last = _dense(x)
    y = torch.empty_like(dense)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    kernel(
        dense,
        channels_last,
        num_groups,
        eps,
        activation is not None,
        _float32(weight),
        _float32(bias),
        _float32(channel_bias),
        _float32(scale),
        _float32(shift),
        y,
        mean,
        rstd,
    )
    return (y if dense is x else in_layout_of(y, x)), mean, rstd


def _backward(
    kernel, grad, x, mean, rstd, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, needed
):
    dense, channels_last = _dense(x)
    parameters = (weight, bias, channel_bias, scale, shift)
    grad_x = torch.empty_like(dense) if needed[0] else None
    grads = [
        torch.empty_like(p, dtype=torch.float32, memory_format=torch.contiguous_format) if need else None
        for p, need in zip(parameters, needed[1:])
    ]
    kernel(
        grad if grad.stride() == dense.stride() else in_layout_of(grad, dense),
        dense,
        mean,
        rstd,
        channels_last,
        num_groups,
        eps,
        activation is not None,
        *map(_float32, parameters),
        grad_x,
        *grads,
    )
    results = [
        x.new_empty(0) if g is None else g if g.dtype == p.dtype else g.to(p.dtype)
        for g, p in zip(grads, parameters)
    ]
    if grad_x is None:
        grad_x = x.new_empty(0)
    elif dense is not x:
        grad_x = in_layout_of(grad_x, x)
    return (grad_x, *results)


def implementation() -> Implementation:
    """Needs the compiled library to be loaded."""
    operations = torch.ops.fastldm_cpu
    return Implementation(
        forward=partial(_forward, operations.group_norm_forward.default),
        backward=partial(_backward, operations.group_norm_backward.default),
        supports=_supports,
        supports_backward=_supports_backward,
    )
