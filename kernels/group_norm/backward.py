"""Backward of group norm, without atomics.

Formulas: `fastldm/reference/group_norm.py`. xhat and the slope of the activation are found anew from x with
the whole affine part. Of each channel of a sample, over its pixels,

    S1 = sum du,   S2 = sum du * xhat,   S3 = sum xhat,   with du = grad * act'(u),

and everything else is arithmetic on these. With A = weight * (1 + scale) and m elements in a group:

    c1 = sum_c A S1 / m,   c2 = sum_c A S2 / m,   dx = rstd (A du - c1 - xhat c2)
    dchannel_bias = sum dx = rstd (A S1 - pixels c1 - c2 S3)
    dshift = S1,   dscale = weight S2 + bias S1
    dweight = sum_n (1 + scale) S2,   dbias = sum_n (1 + scale) S1

The sum of xhat over a group is 0; what `off = sum_c S3 / m` it is instead comes from a saved mean that
float32 rounded, and is subtracted from every xhat (from the sums, after the fact).

As the forward: "resident", x and grad stay in registers (2 reads, 1 write); "sweep", the slab is read a
second time out of the caches; "split", `sums` per chunk of pixels, `coefficients` merges them in fixed order,
`input_gradient` (4 reads, 1 write). dweight and dbias need all samples: `parameter_gradients`, a small kernel
at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, ceil_div, next_power_of_two
from ..common.layout import laid_out_as
from ..common.target import Target, target_of
from . import backward_kernels as kernels
from .configs import Config, choose_backward
from .problem import Problem, describe, float32_like, parameters, sizes


class BackwardPlan(NamedTuple):
    """Run in order, the launches fill the gradients, None where not needed: dx in the layout that the kernels
    read, those of the parameters contiguous."""

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
        launches = [Launch(kernels.one_program, grid, arguments, config.num_warps)]
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
        launches.append(
            Launch(kernels.parameter_gradients, (ceil_div(problem.channels, block),), arguments, 4)
        )
    return BackwardPlan(launches, dx, dweight, dbias, dchannel_bias, dscale, dshift)


def _split(
    problem: Problem,
    config: Config,
    inputs: dict[str, Any],
    given: dict[str, Any],
    per_channel: dict[str, Any],
    dx: Tensor | None,
    silu: bool,
) -> list[Launch]:
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
        Launch(kernels.sums, grid, {**shared, "partial_ptr": partial}, config.num_warps),
        Launch(kernels.coefficients, (problem.batch * problem.num_groups,), merge, 4),
    ]
    if dx is not None:
        arguments = {**shared, "coefficients_ptr": coefficients, "dx_ptr": dx}
        launches.append(Launch(kernels.input_gradient, grid, arguments, config.num_warps))
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
    _, dx, *found = plan
    grads = (None if dx is None else laid_out_as(dx, x), *found)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
