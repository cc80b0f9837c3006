"""Forward of group norm: y = act(GN(x + channel_bias) * (1 + scale) + shift), mean and rstd.

Three ways, chosen in configs.py:

- "resident": one program keeps its slab (one group, or neighbours) in registers. 1 read, 1 write.
- "sweep": one program goes over its slab twice, the second time out of the L1 or L2 cache.
- "split": the pixels of a group are shared out to several programs; `statistics` writes their partial sums,
  `normalize` merges them in fixed order. 2 reads, 1 write, the second read in the reverse order, so that
  what is still in the L2 cache is read first.

The variance is never E[x^2] - E[x]^2: sums run around a pivot close to the mean, a program's first guess of
it, and a mean stays a pair (pivot, small rest) until it is subtracted, so that x - mean is exact where |mean|
is much larger than the deviation ("corrected two-pass", and the merge of partial sums: Chan, Golub, LeVeque,
The American Statistician 37, 1983). What is added to x, channel_bias - pivot, is a pair as well, so
that digits of x are not lost where a channel and its bias are large and cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, ceil_div, next_power_of_two
from ..common.layout import laid_out_as
from ..common.target import Target, target_of
from .configs import choose_forward
from .forward_kernels import normalize, one_program, statistics
from .problem import describe, float32_like, parameters, sizes


class ForwardPlan(NamedTuple):
    """Run in order, the launches fill `y` (in the layout that the kernels read), `mean` and `rstd`."""

    launches: list[Launch]
    y: Tensor
    mean: Tensor
    rstd: Tensor


def plan_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    target: Target,
) -> ForwardPlan:
    """Arguments as `fastldm.ops.group_norm`; x not empty."""
    x, problem = describe(x, num_groups)
    config = choose_forward(problem, target)
    y = torch.empty_like(x)
    mean = float32_like(x, problem.batch, num_groups)
    rstd = float32_like(x, problem.batch, num_groups)
    given = parameters(weight, bias, channel_bias, scale, shift)
    outputs = {"y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd}
    programs = problem.batch * problem.blocks(config.groups)
    silu = activation is not None
    if config.way != "split":
        resident = config.way == "resident"
        block_pixels = next_power_of_two(problem.pixels) if resident else config.block_pixels
        arguments = {
            "x_ptr": x,
            **outputs,
            **given,
            **sizes(problem, config.groups, block_pixels),
            "eps": eps,
            "SILU": silu,
            "RESIDENT": resident,
        }
        launches = [Launch(one_program, (programs,), arguments, config.num_warps)]
        return ForwardPlan(launches, y, mean, rstd)

    chunk_tiles = ceil_div(ceil_div(problem.pixels, config.block_pixels), config.chunks)
    chunks = ceil_div(problem.pixels, chunk_tiles * config.block_pixels)
    shared = {
        "x_ptr": x,
        "partial_ptr": float32_like(x, problem.batch, num_groups, 3, chunks),
        "chunks": chunks,
        "chunk_tiles": chunk_tiles,
        **sizes(problem, config.groups, config.block_pixels),
    }
    bias_only = {name: given[name] for name in ("channel_bias_ptr", "channel_bias_stride")}
    rest = {"eps": eps, "SILU": silu, "BLOCK_CHUNKS": next_power_of_two(chunks)}
    grid = (programs * chunks,)
    launches = [
        Launch(statistics, grid, {**shared, **bias_only}, config.num_warps),
        Launch(normalize, grid, {**shared, **outputs, **given, **rest}, config.num_warps),
    ]
    return ForwardPlan(launches, y, mean, rstd)


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    channel_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (N, G) and rstd (N, G) of x + channel_bias, float32."""
    plan = plan_forward(
        x,
        num_groups,
        weight,
        bias,
        eps,
        activation,
        channel_bias,
        scale,
        shift,
        target_of(x.device),
    )
    for launch in plan.launches:
        launch.run()
    return laid_out_as(plan.y, x), plan.mean, plan.rstd
