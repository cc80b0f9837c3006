"""Group norm with what diffusion models put around it: channel bias before, scale, shift and SiLU after."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm import dispatch
from fastldm.checks import shown
from fastldm.errors import InputError
from fastldm.ops._library import check_number, check_tensor, define, refuse_transforms


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`act(GN(x + channel_bias[n, c]) * (1 + scale[n, c]) + shift[n, c])`.

    Args:
        x: (N, C, *spatial) of 2 to 5 dimensions, floating point; contiguous, channels-last or any other dense
            layout.
        num_groups: divides C.
        weight, bias: the affine part of GN, (C,), floating point; float32 parameters with a bfloat16 or
            float16 `x` are fine.
        eps: added to the variance.
        activation: None or "silu".
        channel_bias, scale, shift: (N, C), floating point (the time embedding of a residual block, before or
            after).
        backend: "auto" or the name of a backend, which is a requirement.

    Returns:
        Shape and dtype of `x`, strides of `torch.empty_like(x)`. Statistics are float32 (float64 for
        float64). Where |mean| > 256 std in a group, or its sum of squares overflows in float32 (|x| past 1e16
        or so), "reference", "cpu" and, on the CPU, "torch" lose nothing; others may lose digits or give NaN,
        as does PyTorch's own group norm, which "auto" takes for small tensors whose gradient is wanted.
        Autocast changes nothing: the statistics do not profit from a smaller dtype, and casting `x` up, as
        PyTorch does on CUDA, doubles the memory traffic of an operation that is memory traffic only.

    Raises:
        InputTypeError: an argument that is not floating point.
        InputError: shapes or devices that do not fit together, an unknown activation.
        UnsupportedError: a backend asked for by name cannot do this call; differentiation by torch.func
            (grad, vjp, ...) or in forward mode.
    """
    refuse_transforms("group_norm", x, weight, bias, channel_bias, scale, shift)
    args = prepare(
        x,
        num_groups,
        weight,
        bias,
        eps,
        activation=activation,
        channel_bias=channel_bias,
        scale=scale,
        shift=shift,
    )
    return _group_norm(*args, backend)[0]


def prepare(
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    activation=None,
    channel_bias=None,
    scale=None,
    shift=None,
) -> tuple:
    """The checked arguments of the operation, without the backend."""
    check_tensor("x", x)
    check_number("num_groups", num_groups, int)
    check_number("eps", eps)
    if not 2 <= x.dim() <= 5:
        raise InputError(f"x must be (N, C, *spatial) with 2 to 5 dimensions, got shape {tuple(x.shape)}")
    batch, channels = x.shape[0], x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise InputError(
            f"num_groups must divide the channels, got {num_groups} groups for {channels} channels"
        )
    if activation not in (None, "silu"):
        raise InputError(f"activation must be None or 'silu', got {shown(activation)}")
    if weight is not None:
        _check_parameter("weight", weight, (channels,), x)
    if bias is not None:
        _check_parameter("bias", bias, (channels,), x)
    if channel_bias is not None:
        _check_parameter("channel_bias", channel_bias, (batch, channels), x)
    if scale is not None:
        _check_parameter("scale", scale, (batch, channels), x)
    if shift is not None:
        _check_parameter("shift", shift, (batch, channels), x)
    return x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift


def _check_parameter(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_tensor(name, value)
    if value.shape != shape:
        raise InputError(
            f"{name} must be {'(C,)' if len(shape) == 1 else '(N, C)'} = {shape}, got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise InputError(f"{name} must be on the device of x, {x.device}, got {value.device}")


# Positions in the schema of x, weight, bias, channel_bias, scale, shift.
_TENSOR_INPUTS = (0, 2, 3, 6, 7, 8)


def _stats_like(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty(
        (x.shape[0], num_groups), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )


def _kernel(x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, backend):
    if x.numel() == 0:
        mean, rstd = _stats_like(x, num_groups).zero_(), _stats_like(x, num_groups).zero_()
        y = torch.empty_like(x)
    else:
        args = (x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift)
        y, mean, rstd = dispatch.run("group_norm", "forward", backend, args, dispatch.current_state())
    dispatch.remember(mean)
    return y, mean, rstd


def _fake(x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, backend):
    return torch.empty_like(x), _stats_like(x, num_groups), _stats_like(x, num_groups)


def _backward_kernel(
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
    backend,
):
    if x.numel() == 0:
        grads = _backward_fake(
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
            backend,
        )
        return tuple(g.zero_() for g in grads)
    args = (
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
    )
    return dispatch.run("group_norm", "backward", backend, args, dispatch.remembered(mean))


def _backward_fake(
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
    backend,
):
    inputs = (x, weight, bias, channel_bias, scale, shift)
    # The gradient of x has the layout of x, those of the parameters are contiguous whatever these are.
    layouts = (torch.preserve_format, *(torch.contiguous_format,) * 5)
    return tuple(
        torch.empty_like(i, memory_format=layout) if n else x.new_empty(0)
        for i, n, layout in zip(inputs, needed, layouts)
    )


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, ctx.eps, ctx.activation, channel_bias, scale, shift, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, channel_bias, scale, shift)


def _backward(ctx, grad, grad_mean, grad_rstd):
    x, mean, rstd, weight, bias, channel_bias, scale, shift = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in _TENSOR_INPUTS]
    grads = _group_norm_backward(
        grad,
        x,
        mean,
        rstd,
        ctx.num_groups,
        weight,
        bias,
        ctx.eps,
        ctx.activation,
        channel_bias,
        scale,
        shift,
        needed,
        ctx.backend,
    )
    x_grad, weight_grad, bias_grad, channel_bias_grad, scale_grad, shift_grad = (
        g if n else None for g, n in zip(grads, needed)
    )
    return (
        x_grad,
        None,
        weight_grad,
        bias_grad,
        None,
        None,
        channel_bias_grad,
        scale_grad,
        shift_grad,
        None,
    )


_group_norm_backward = define(
    "group_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, "
    "Tensor? bias, float eps, str? activation, Tensor? channel_bias, Tensor? scale, Tensor? shift, "
    "bool[] needed, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
_group_norm = define(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, str? activation, "
    "Tensor? channel_bias, Tensor? scale, Tensor? shift, str backend) -> (Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
    composite=lambda args: dispatch.run_composite("group_norm", args[-1], args[:-1]),
)
