"""The backend named "torch": PyTorch's own best path for every operation, with our contract around it."""

from __future__ import annotations

from fastldm.eager.attention import IMPLEMENTATION as _ATTENTION
from fastldm.eager.group_norm import IMPLEMENTATION as _GROUP_NORM
from fastldm.eager.vq import EMA_UPDATE as _EMA_UPDATE
from fastldm.eager.vq import NEAREST as _NEAREST
from fastldm.implementation import Implementation

_IMPLEMENTATIONS = {
    "attention": _ATTENTION,
    "group_norm": _GROUP_NORM,
    "vq_nearest": _NEAREST,
    "vq_ema_update": _EMA_UPDATE,
}


def implementation(op: str) -> Implementation:
    """The PyTorch implementation of `op`."""
    return _IMPLEMENTATIONS[op]
