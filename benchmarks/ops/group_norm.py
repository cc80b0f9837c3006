"""Group norm with weight, bias and SiLU, in both memory layouts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.checks import judge_by_rule, spread
from benchmarks.providers import compiled, no_lone_backward, ours
from benchmarks.registry import DIRECTIONS, Case, Function, Judge, Op, Problem, Provider, Work
from fastldm import reference
from fastldm.testing import plain_group_norm
from fastldm.testing.inputs import group_norm_inputs
from fastldm.testing.shapes import GROUP_NORM, GROUP_NORM_LAYERS

SHAPES = {**GROUP_NORM_LAYERS, **GROUP_NORM}
_CHECKED_ELEMENTS = 1 << 26
# Tensors the size of x that must be read or written: x, y; x, dy, dx.
_PASSES = {"forward": 2, "backward": 3, "forward+backward": 5}


def _problem(case: Case) -> Problem:
    made = group_norm_inputs(SHAPES[case.shape], case.torch_dtype, layout=case.layout)
    inputs = tuple(made[name].to(case.device) for name in ("x", "weight", "bias"))
    return Problem(case, ("x", "weight", "bias"), inputs, wanted=3, grad=made["grad"].to(case.device))


def _judge(problem: Problem) -> Judge:
    """On some groups, over the whole batch."""
    size, num_groups = SHAPES[problem.case.shape]
    x = problem.inputs[0]
    groups = spread(num_groups, _CHECKED_ELEMENTS * num_groups // x.numel())
    width = size[1] // num_groups
    channels = [g * width + c for g in groups for c in range(width)]

    def cut(name: str, tensor: Tensor) -> Tensor:
        # PyTorch's channels-last kernel is less exact than its contiguous one, so plain means contiguous.
        return (tensor[:, channels] if name in ("x", "out") else tensor[channels]).contiguous()

    def truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.group_norm(x, len(groups), weight, bias, activation="silu")[0]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain_group_norm(x, len(groups), weight, bias, activation="silu")

    terms = max(x[0].numel() // num_groups, x.numel() // size[1])
    return judge_by_rule(problem, cut, truth, plain, terms=terms)


def _work(problem: Problem) -> Work:
    x = problem.inputs[0]
    copied = x.numel() * x.element_size()
    return Work("copy", _PASSES[problem.case.direction] * copied, copied)


def _ours(problem: Problem, group_norm: Function) -> Function:
    num_groups = SHAPES[problem.case.shape].num_groups

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, num_groups, weight, bias, activation="silu")

    return function


def _eager(problem: Problem) -> Function:
    num_groups = SHAPES[problem.case.shape].num_groups

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, num_groups, weight, bias))

    return function


def _compiled(problem: Problem) -> Function:
    return compiled(_eager(problem))


def _providers() -> list[Provider]:
    return [
        *ours("group_norm", _ours),
        Provider("eager", _eager),
        Provider("compile", _compiled, refuse=no_lone_backward),
    ]


OPS = (
    Op(
        "group_norm",
        shapes=SHAPES,
        full=tuple(GROUP_NORM_LAYERS),
        dtypes=("float32", "bfloat16"),
        problem=_problem,
        judge=_judge,
        work=_work,
        providers=_providers,
        torch="eager",
        layouts=("contiguous", "channels-last"),
        default_layouts=("contiguous", "channels-last"),
        directions=DIRECTIONS,
        default_directions=("forward", "forward+backward"),
    ),
)
