"""Launches to compile ahead of time, from tensors without memory: what heuristic and tables choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from ..common import tables
from ..common.launch import Launch
from ..common.target import Target
from .backward import plan_backward
from .configs import Config
from .forward import plan_forward

PARAMETERS = ("weight", "bias", "channel_bias", "scale", "shift")
# (shape, groups) where an argument is 1, which Triton makes a constant, or no multiple of anything.
ODD = [((1, 1, 1), 1), ((3, 6, 1, 5), 2), ((2, 30, 7, 9), 3), ((2, 40), 1)]
FORCED = [
    Config("sweep", 1, 4, 1, 4),
    Config("split", 1, 4, 2, 4),
    Config("split", 2, 1, 64, 1),
]


def _meta(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    if channels_last and len(shape) > 2:
        return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device="meta").movedim(-1, 1)
    return torch.empty(shape, dtype=dtype, device="meta")


def plan(
    shape: tuple[int, ...],
    num_groups: int,
    dtype: torch.dtype,
    target: Target,
    *,
    channels_last: bool = False,
    given: tuple[str, ...] = PARAMETERS,
    parameter_dtype: torch.dtype | None = None,
    activation: str | None = "silu",
    directions: tuple[str, ...] = ("forward", "backward"),
) -> list[Launch]:
    """The launches of one call; in the backward with the gradient of everything."""
    x = _meta(shape, dtype, channels_last)
    sizes = {name: shape[1:2] if name in ("weight", "bias") else shape[:2] for name in PARAMETERS}
    values = [
        _meta(sizes[name], parameter_dtype or dtype, False) if name in given else None for name in PARAMETERS
    ]
    weight, bias, *rest = values
    arguments = (num_groups, weight, bias, 1e-5, activation, *rest)
    launches = []
    if "forward" in directions:
        launches += plan_forward(x, *arguments, target).launches
    if "backward" in directions:
        mean = x.new_empty((shape[0], num_groups), dtype=torch.float32)
        needed = [True, *(value is not None for value in values)]
        launches += plan_backward(x, x, mean, mean, *arguments, needed, target).launches
    return launches


def aot_launches(
    target: Target, layers: Mapping[str, tuple[tuple[int, ...], int]], *, thorough: bool
) -> Iterator[tuple[str, Launch]]:
    """(name, launch), each once that is compiled to something of its own.

    `layers` are named (shape, groups): in bfloat16, and if thorough in float32 and beside odd shapes.
    """
    seen = set()
    for name, launch in _all(target, layers, thorough):
        signature = _signature(launch)
        if signature not in seen:
            seen.add(signature)
            yield f"{name}-{launch.kernel.__name__}", launch


def _signature(launch: Launch) -> tuple:
    """What Triton compiles anew for: dtypes, constants, and whether a number is 1 or a multiple of 16."""

    def kind(name: str, value):
        if isinstance(value, Tensor):
            return str(value.dtype)
        if name.isupper() or value is None or isinstance(value, float):
            return value
        return value == 1, value % 16 == 0

    facts = tuple((name, kind(name, value)) for name, value in sorted(launch.arguments.items()))
    return launch.kernel.__name__, launch.num_warps, launch.num_stages, facts


def _all(target: Target, layers, thorough: bool) -> Iterator[tuple[str, Launch]]:
    for name, (shape, num_groups) in layers.items():
        for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
            for channels_last in (False, True):
                # As a residual block has it: the time embedding before the norm or after it.
                given = PARAMETERS[:3] if dtype == torch.bfloat16 else PARAMETERS
                launches = plan(shape, num_groups, dtype, target, channels_last=channels_last, given=given)
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{'nhwc' if channels_last else 'nchw'}"
                yield from ((label, launch) for launch in launches)
    yield from _from_tables(target)
    if thorough:
        yield from _odd(target)


def _from_tables(target: Target) -> Iterator[tuple[str, Launch]]:
    """Every configuration of the table in force, with the problem of its key."""
    for number, ((kernel, frozen), _) in enumerate(tables.entries("group_norm", target.capability).items()):
        key = dict(frozen)
        shape = (key["batch"], key["num_groups"] * key["channels_per_group"], key["pixels"])
        launches = plan(
            shape,
            key["num_groups"],
            torch.float32 if key["itemsize"] == 4 else torch.bfloat16,
            target,
            channels_last=key["channels_last"],
            directions=(kernel,),
        )
        yield from ((f"table-{number}-{kernel}", launch) for launch in launches)


def _odd(target: Target) -> Iterator[tuple[str, Launch]]:
    for shape, num_groups in ODD:
        for channels_last in (False, True):
            for config in (None, *FORCED):
                groups = min(num_groups, config.groups) if config else 1
                launches = []
                for direction in ("forward", "backward"):
                    forced = config and config._replace(groups=groups)
                    with tables.forcing("group_norm", direction, forced) if forced else nullcontext():
                        launches += plan(
                            shape,
                            num_groups,
                            torch.float16,
                            target,
                            channels_last=channels_last,
                            given=PARAMETERS if config is None else (),
                            parameter_dtype=torch.float32,
                            activation=None,
                            directions=(direction,),
                        )
                label = f"{'x'.join(map(str, shape))}-{config.way if config else 'auto'}"
                yield from ((label, launch) for launch in launches)
