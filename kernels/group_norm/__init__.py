"""Group norm with channel bias, scale, shift and SiLU in Triton, forward and backward.

Contract: `fastldm/ops/group_norm.py`; formulas: `fastldm/reference/group_norm.py`.
"""

from __future__ import annotations

from torch import Tensor

from ..common.support import refuse
from .backward import backward, plan_backward
from .forward import forward, plan_forward
from .problem import MAX_CHANNELS_PER_GROUP

__all__ = ["backward", "forward", "plan_backward", "plan_forward", "supports", "supports_backward"]


def supports(x: Tensor, num_groups: int, *args) -> str | None:
    """None, or in one line why the kernels do not take this call."""
    per_group = x.shape[1] // num_groups
    if per_group > MAX_CHANNELS_PER_GROUP:
        return f"takes up to {MAX_CHANNELS_PER_GROUP} channels per group, got {per_group}"
    return refuse(x)


def supports_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, *args
) -> str | None:
    return supports(x, num_groups)
