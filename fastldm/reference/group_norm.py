"""Group norm with what diffusion models put around it, written out in float64.

With x' = x + channel_bias[n, c], the mean m and the variance s^2 (over the group's channels and positions),
    xhat = (x' - m) * r,   r = 1 / sqrt(s^2 + eps)
    u = (xhat * weight[c] + bias[c]) * (1 + scale[n, c]) + shift[n, c],   y = act(u)
Backward, for the gradient g of y (arXiv 1803.08494, differentiated by the chain rule; sums over positions):
    du = g * act'(u),   A = weight * (1 + scale)
    dshift = sum du,   dscale = sum du * (xhat * weight + bias)
    dweight = sum_n (1 + scale) * sum du * xhat,   dbias = sum_n (1 + scale) * sum du
    dx = r * (du * A - mean(du * A) - xhat * mean(du * A * xhat)), means over the group;   dchannel_bias = sum
    dx silu'(u) = sigmoid(u) * (1 + u * (1 - sigmoid(u)))
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of


def _rows(parameter: Tensor | None, x: Tensor, default: float) -> Tensor:
    """A parameter, (C,) or (N, C), as float64 (N or 1, C, 1)."""
    if parameter is None:
        return torch.full((1, x.shape[1], 1), default, dtype=torch.float64, device=x.device)
    return parameter.double().reshape(-1, x.shape[1], 1)


def _normalized(
    x: Tensor, num_groups: int, eps: float, channel_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """xhat (N, C, L), mean (N, G) and rstd (N, G), float64."""
    batch, channels = x.shape[:2]
    shifted = x.double().reshape(batch, channels, -1) + _rows(channel_bias, x, 0.0)
    grouped = shifted.reshape(batch, num_groups, -1)
    mean = grouped.mean(dim=-1, keepdim=True)
    centred = grouped - mean
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd).reshape(shifted.shape), mean.squeeze(-1), rstd.squeeze(-1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y as x, mean (N, G), rstd (N, G)), all float64. Arguments as `fastldm.ops.group_norm`."""
    xhat, mean, rstd = _normalized(x, num_groups, eps, channel_bias)
    u = (xhat * _rows(weight, x, 1.0) + _rows(bias, x, 0.0)) * (1.0 + _rows(scale, x, 0.0)) + _rows(
        shift, x, 0.0
    )
    y = u * torch.sigmoid(u) if activation == "silu" else u
    return y.reshape(x.shape), mean, rstd


def group_norm_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """float64 (dx as x, dweight (C,), dbias (C,), dchannel_bias (N, C), dscale (N, C), dshift (N, C))."""
    batch, channels = x.shape[:2]
    xhat, _, rstd = _normalized(x, num_groups, eps, channel_bias)
    w, b = _rows(weight, x, 1.0), _rows(bias, x, 0.0)
    gain = 1.0 + _rows(scale, x, 0.0)
    du = grad.double().reshape(xhat.shape)
    if activation == "silu":
        u = (xhat * w + b) * gain + _rows(shift, x, 0.0)
        sigmoid = torch.sigmoid(u)
        du = du * sigmoid * (1.0 + u * (1.0 - sigmoid))
    dshift = du.sum(dim=-1)
    dscale = (du * (xhat * w + b)).sum(dim=-1)
    dweight = (gain * du * xhat).sum(dim=(0, 2))
    dbias = (gain * du).sum(dim=(0, 2))
    dxhat = (du * w * gain).reshape(batch, num_groups, -1)
    grouped = xhat.reshape(batch, num_groups, -1)
    projection = (dxhat * grouped).mean(dim=-1, keepdim=True)
    dx = rstd.unsqueeze(-1) * (dxhat - dxhat.mean(dim=-1, keepdim=True) - grouped * projection)
    dx = dx.reshape(batch, channels, -1)
    return dx.reshape(x.shape), dweight, dbias, dx.sum(dim=-1), dscale, dshift


def _forward(x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift):
    y, mean, rstd = group_norm(
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
    stats = torch.float64 if x.dtype == torch.float64 else torch.float32
    return in_layout_of(y.to(x.dtype), x), mean.to(stats), rstd.to(stats)


def _backward(
    grad, x, mean, rstd, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, needed
):
    grads = group_norm_backward(
        grad,
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
    inputs = (x, weight, bias, channel_bias, scale, shift)
    results = [g.to(i.dtype) if n else x.new_empty(0) for g, i, n in zip(grads, inputs, needed)]
    if needed[0]:
        results[0] = in_layout_of(results[0], x)
    return tuple(results)


IMPLEMENTATION = Implementation(forward=_forward, backward=_backward)
