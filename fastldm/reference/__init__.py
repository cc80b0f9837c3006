"""The truth: every operation in plain PyTorch, upcast, without shortcuts. Slow on purpose."""

from __future__ import annotations

from fastldm.implementation import Implementation
from fastldm.reference.attention import IMPLEMENTATION as _ATTENTION
from fastldm.reference.attention import attention, attention_backward
from fastldm.reference.group_norm import IMPLEMENTATION as _GROUP_NORM
from fastldm.reference.group_norm import group_norm, group_norm_backward
from fastldm.reference.vq import EMA_UPDATE as _EMA_UPDATE
from fastldm.reference.vq import NEAREST as _NEAREST
from fastldm.reference.vq import vq_ema_update, vq_nearest

__all__ = [
    "attention",
    "attention_backward",
    "group_norm",
    "group_norm_backward",
    "vq_ema_update",
    "vq_nearest",
]

_IMPLEMENTATIONS = {
    "attention": _ATTENTION,
    "group_norm": _GROUP_NORM,
    "vq_nearest": _NEAREST,
    "vq_ema_update": _EMA_UPDATE,
}


def implementation(op: str) -> Implementation:
    """The reference implementation of `op`."""
    return _IMPLEMENTATIONS[op]
