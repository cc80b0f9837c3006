"""Which kernels a call takes."""

from __future__ import annotations

from . import configs
from .backward import plan_long_backward
from .forward import plan_long_forward
from .problem import Problem
from .short import plan_short_backward, plan_short_forward
from .wide_backward import plan_wide_backward
from .wide_forward import plan_wide_forward


def plan_forward(q, k, v, problem: Problem, need_lse: bool, target):
    """The launches in order, and out and lse (empty unless needed) that they write."""
    if configs.is_wide(problem):
        plan = plan_wide_forward
    else:
        plan = plan_short_forward if configs.is_short(problem, "forward", target) else plan_long_forward
    return plan(q, k, v, problem, need_lse, target)


def plan_backward(grad_out, q, k, v, out, lse, problem: Problem, target):
    """The launches in order, and (dq, dk, dv) that they write."""
    if configs.is_wide(problem):
        return plan_wide_backward(grad_out, q, k, v, out, lse, problem, target)
    if configs.is_short(problem, "backward", target):
        return plan_short_backward(grad_out, q, k, v, problem, target)
    return plan_long_backward(grad_out, q, k, v, out, lse, problem, target)
