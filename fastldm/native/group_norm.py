"""Group norm in C++ for the CPU: `csrc/cpu/group_norm.cpp`.

The kernels take two dense layouts, (batch, channels, pixels) and (batch, pixels, channels), in which the
order of the pixels is free. Everything else is copied into the nearer one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of
from fastldm.kernels.common.layout import dense_layout

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(x, *args) -> str | None:
    if x.dtype not in _DTYPES:
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got {x.device}"
    return None


def _supports_backward(grad, x, *args) -> str | None:
    return _supports(x)


def _float32(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or (parameter.dtype is torch.float32 and parameter.is_contiguous()):
        return parameter
    return parameter.to(torch.float32).contiguous()


def run_forward(
    kernel, converted, x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of a kernel that writes into tensors made here; `converted(parameter)` is what it
    takes of one, or None."""
    dense, channels_last = dense_layout(x)
    y = torch.empty_like(dense)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    kernel(
        dense,
        channels_last,
        num_groups,
        eps,
        activation is not None,
        *map(converted, (weight, bias, channel_bias, scale, shift)),
        y,
        mean,
        rstd,
    )
    return (y if dense is x else in_layout_of(y, x)), mean, rstd


def _backward(
    kernel, grad, x, mean, rstd, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, needed
):
    dense, channels_last = dense_layout(x)
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
        forward=partial(run_forward, operations.group_norm_forward.default, _float32),
        backward=partial(_backward, operations.group_norm_backward.default),
        supports=_supports,
        supports_backward=_supports_backward,
    )
