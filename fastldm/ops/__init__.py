"""The public operations, each a `torch.library` custom op with autograd, autocast and fake (compile)
rules."""

from __future__ import annotations

from fastldm.ops.attention import attention
from fastldm.ops.explain import explain
from fastldm.ops.group_norm import group_norm
from fastldm.ops.vq import vq_ema_update, vq_nearest, vq_quantize

__all__ = ["attention", "explain", "group_norm", "vq_ema_update", "vq_nearest", "vq_quantize"]
