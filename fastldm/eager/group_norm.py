"""Group norm through PyTorch's own kernel, `native_group_norm`.

Scale and shift differ from sample to sample, so with A = weight * (1 + scale), B = bias * (1 + scale) +
shift, (N, C), the kernel runs with A and B as the affine part: at once over a contiguous tensor read as one
sample of N * C channels in N * num_groups groups, else sample by sample.

In float32 the kernel loses log2(|mean| * rstd) of its 24 bits, and its sums overflow past |x| ~ 1e19 /
sqrt(elements of the group). On the CPU, where a look at the statistics takes 5 microseconds, such inputs are
computed in float64 instead; elsewhere a look would wait for the device, and the result stays PyTorch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of

_norm_backward = torch.ops.aten.native_group_norm_backward.default
_silu_backward = torch.ops.aten.silu_backward.grad_input

# The largest |mean| * rstd left to float32: 8 of 24 bits lost.
_MAX_CANCELLATION = 256.0
# PyTorch's CPU kernel takes the variance of channels-last tensors as E[x^2] - E[x]^2, which loses twice as
# many bits. Past 4 of them the contiguous kernel (Welford's method) takes over.
_MAX_CANCELLATION_CHANNELS_LAST = 4.0
# The backward takes rstd^2 / sqrt(elements of a group), which nears the underflow below this.
_SMALLEST_RSTD = 2.0**-56


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(x, weight, bias, scale, shift) -> tuple[Tensor | None, Tensor | None]:
    """A and B: (C,) without scale and shift, else (N, C).

    They are float32 beside a smaller x too: that is what makes the CPU kernel keep float32 statistics.
    """
    dtype = _stats_dtype(x)
    if scale is None and shift is None:
        # The kernel takes its statistics' dtype from the weight, and its backward fails with a bias alone.
        if weight is None and (x.dtype != dtype or bias is not None):
            weight = x.new_ones(x.shape[1], dtype=dtype)
        return tuple(p if p is None or p.dtype == dtype else p.to(dtype) for p in (weight, bias))
    gain = x.new_ones(x.shape[:2], dtype=dtype) if scale is None else 1.0 + scale.to(dtype)
    a = gain if weight is None else gain * weight
    b = torch.zeros_like(gain) if bias is None else gain * bias
    return a.to(dtype), (b if shift is None else b + shift).to(dtype)


def _input(x: Tensor, channel_bias: Tensor | None) -> Tensor:
    """x + channel_bias in a dtype and a layout that the kernel knows."""
    if channel_bias is not None:
        # The sum of two float16 numbers in range may be out of range.
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        bias = channel_bias.to(dtype).reshape(*x.shape[:2], *(1,) * (x.dim() - 2))
        x = in_layout_of(x.to(dtype) + bias, x)
    if x.device.type != "cpu":
        # Outside the CPU the kernel keeps its statistics in the dtype of x and knows one layout.
        return x.to(_stats_dtype(x)).contiguous()
    return x.contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x that the CPU kernel keeps, else contiguous."""
    if not x.is_contiguous():
        for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.dim() == dims and x.is_contiguous(memory_format=memory_format):
                return memory_format
    return torch.contiguous_format


def _call(
    x: Tensor, a: Tensor | None, b: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    return torch.native_group_norm(x, a, b, batch, channels, x.numel() // (batch * channels), groups, eps)


def _normalize(x: Tensor, a: Tensor | None, b: Tensor | None, groups: int, eps: float):
    """GN with affine part a, b ((C,) or (N, C)) over a dense x: y, mean (N, G), rstd (N, G)."""
    batch = x.shape[0]
    if a is None or a.dim() == 1:
        y, mean, rstd = _call(x, a, b, groups, eps)
    elif x.is_contiguous():
        y, mean, rstd = _call(_one_sample(x), a.flatten(), b.flatten(), batch * groups, eps)
        y = y.view(x.shape)
    else:
        y = torch.empty_like(x)
        stats = []
        for n in range(batch):
            part, *stat = _call(x[n : n + 1], a[n], b[n], groups, eps)
            y[n : n + 1] = part
            stats.append(stat)
        mean, rstd = (torch.cat(s) for s in zip(*stats))
    if mean.shape[0] != batch:
        mean, rstd = mean.view(batch, groups), rstd.view(batch, groups)
    return y, mean, rstd


def _conditioned(x: Tensor, work: Tensor, channel_bias: Tensor | None, mean: Tensor, rstd: Tensor) -> Tensor:
    """`work`, the `_input` of x, as the kernel does well on it, given what statistics it has."""
    if work.device.type != "cpu":
        return work
    cancellation = _cancellation(mean, rstd)
    if cancellation > _MAX_CANCELLATION and x.dtype != torch.float64:
        return _input(x.double(), channel_bias).contiguous()
    return work.contiguous() if cancellation > _MAX_CANCELLATION_CHANNELS_LAST else work


def _cancellation(mean: Tensor, rstd: Tensor) -> float:
    """|mean| * rstd of the worst group; infinity where x, or a step of the kernel, leaves float32."""
    worst = (mean * rstd).abs_().max().item()
    return worst if math.isfinite(worst) and rstd.min().item() >= _SMALLEST_RSTD else math.inf


def _one_sample(x: Tensor) -> Tensor:
    return x.view(1, x.shape[0] * x.shape[1], *x.shape[2:])


def _forward(x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift):
    work = _input(x, channel_bias)
    y, mean, rstd = _normalize(work, *_affine(work, weight, bias, scale, shift), num_groups, eps)
    better = _conditioned(x, work, channel_bias, mean, rstd)
    if better is not work:
        y, mean, rstd = _normalize(better, *_affine(better, weight, bias, scale, shift), num_groups, eps)
    if activation == "silu":
        F.silu(y, inplace=True)
    if y.dtype != x.dtype:
        stats = _stats_dtype(x)
        y, mean, rstd = y.to(x.dtype), mean.to(stats), rstd.to(stats)
    return in_layout_of(y, x), mean, rstd


def _normalize_backward(grad, x, mean, rstd, a, groups, mask):
    """dx, dA, dB of `_normalize`; dA and dB have the shape of a (None: (C,))."""
    batch, channels = x.shape[:2]
    length = x.numel() // (batch * channels)
    if a is None or a.dim() == 1:
        return _norm_backward(grad, x, mean, rstd, a, batch, channels, length, groups, mask)
    if x.is_contiguous():
        dx, da, db = _norm_backward(
            _one_sample(grad),
            _one_sample(x),
            mean.view(1, -1),
            rstd.view(1, -1),
            a.flatten(),
            1,
            batch * channels,
            length,
            batch * groups,
            mask,
        )
        return dx.view(x.shape), da.view(a.shape), db.view(a.shape)
    dx, das, dbs = torch.empty_like(x), [], []
    for n in range(batch):
        one = slice(n, n + 1)
        dx[one], da, db = _norm_backward(
            grad[one], x[one], mean[one], rstd[one], a[n], 1, channels, length, groups, mask
        )
        das.append(da)
        dbs.append(db)
    return dx, torch.stack(das), torch.stack(dbs)


def _backward(
    grad, x, mean, rstd, num_groups, weight, bias, eps, activation, channel_bias, scale, shift, needed
):
    work = _conditioned(x, _input(x, channel_bias), channel_bias, mean, rstd)
    a, b = _affine(work, weight, bias, scale, shift)
    grad = grad.to(work.dtype).contiguous(memory_format=_memory_format(work))
    wider = work.dtype == torch.float64 != x.dtype
    if wider or activation == "silu":
        before, *stats = _normalize(work, a, b, num_groups, eps)
        mean, rstd = stats if wider else (mean, rstd)
    if activation == "silu":
        grad = _silu_backward(grad, before, grad_input=before)
    need_x, need_weight, need_bias, need_channel_bias, need_scale, need_shift = needed
    mask = [need_x or need_channel_bias, need_weight or need_scale, need_bias or need_scale or need_shift]
    if a is not None and a.dim() == 2:
        mask = [True, True, True]
    dx, da, db = _normalize_backward(grad, work, mean, rstd, a, num_groups, mask)
    results = [x.new_empty(0) for _ in needed]
    if need_x:
        results[0] = in_layout_of(dx.to(x.dtype), x)
    if need_channel_bias:
        total = dx.flatten(2).sum(dim=2, dtype=mean.dtype) if x.dim() > 2 else dx
        results[3] = total.to(channel_bias.dtype)
    if scale is None and shift is None:
        da_weight, db_bias = da, db
    else:
        gain = 1.0 if scale is None else 1.0 + scale.to(mean.dtype)
        da_weight, db_bias = (gain * da).sum(dim=0), (gain * db).sum(dim=0)
    if need_weight:
        results[1] = da_weight.to(weight.dtype)
    if need_bias:
        results[2] = db_bias.to(bias.dtype)
    if need_scale:
        dscale = da if weight is None else da * weight
        results[4] = (dscale if bias is None else dscale + db * bias).to(scale.dtype)
    if need_shift:
        results[5] = db.to(shift.dtype)
    return tuple(results)


# Up to so many elements PyTorch's own autograd is the fastest way to a gradient on 2 cores: 54 against 110 us
# at (2, 128, 4, 4), 220 against 250 at (2, 1280, 8, 8) in float32, 237 against 242 in bfloat16.
_SMALL_TRAINING = {torch.float32: 1 << 18, torch.bfloat16: 1 << 16, torch.float16: 1 << 16}


def _composite(x, num_groups, weight, bias, eps, activation, channel_bias, scale, shift) -> Tensor | None:
    if not (channel_bias is scale is shift is None) or not 0 < x.numel() <= _SMALL_TRAINING.get(x.dtype, 0):
        return None
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)) or not (
        x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    ):
        return None
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


IMPLEMENTATION = Implementation(forward=_forward, backward=_backward, composite=_composite)
