"""Attention on the CUDA C++ kernels (csrc/cuda/attention_*.cu): float16 and bfloat16 on tensor cores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of, readable_mask
from fastldm.kernels.common.target import target_of
from fastldm.native.cuda.support import refuse

# Bytes of shared memory that a block takes for the widest heads, by csrc/cuda/attention_*.cuh.
_FORWARD_512, _BACKWARD_256, _BACKWARD_512 = 139264, 101760, 142720
# csrc/cuda/attention_problem.h has the same; tiles are of 64 queries or keys at least.
_MAX_LENGTH, _MAX_TILES = 1 << 30, 1 << 31


def _reason_against(q: Tensor, k: Tensor) -> str | None:
    reason = refuse(q)
    if reason is not None:
        return reason
    if q.dtype is torch.float32:
        return "takes float16 and bfloat16; float32 would lose bits on tensor cores, use the triton backend"
    longest = max(q.shape[2], k.shape[2])
    if longest > _MAX_LENGTH:
        return f"takes up to 2^30 queries and keys, not {longest}"
    tiles = q.shape[0] * q.shape[1] * -(-longest // 64)
    if tiles >= _MAX_TILES:
        return f"takes less than 2^31 tiles of 64 queries or keys of all heads, not {tiles}"
    return None


def _no_room(q: Tensor, widest: int, needed: int) -> str | None:
    room = target_of(q.device).shared_memory
    if q.shape[3] > widest and room < needed:
        return (
            f"takes head dims up to {widest} on a GPU whose blocks have {room >> 10} KiB of shared memory, "
            f"not {q.shape[3]}"
        )
    return None


def _supports(q, k, v, attn_mask, is_causal, scale, need_lse) -> str | None:
    return _reason_against(q, k) or _no_room(q, 256, _FORWARD_512)


def _supports_backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale) -> str | None:
    reason = _reason_against(q, k) or _no_room(q, 160, _BACKWARD_256)
    return reason or _no_room(q, 256, _BACKWARD_512)


def _readable(x: Tensor) -> Tensor:
    """`x` if its rows are dense and begin at multiples of 16 bytes, else a contiguous copy."""
    aligned = x.data_ptr() % 16 == 0 and all(
        n == 1 or stride % 8 == 0 for n, stride in zip(x.shape[:3], x.stride())
    )
    return x if x.stride(3) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def _result_like(x: Tensor) -> Tensor:
    """An empty tensor of the layout of `x`, or where the kernels cannot write that, contiguous."""
    result = torch.empty_like(x)
    return result if _readable(result) is result else x.new_empty(x.shape)


def _mask_kind(mask: Tensor | None) -> str:
    """ "none", "keys" (open or closed to all queries alike) or "scores"."""
    if mask is None:
        return "none"
    same = mask.shape[2] == 1 or mask.stride(2) == 0
    return "keys" if mask.dtype is torch.bool and same else "scores"


def key(direction: str, args: tuple) -> dict[str, str | int | bool]:
    """What measurements are kept under. `few_keys`: of the kernel that holds them all."""
    if direction == "forward":
        q, k, _, attn_mask, is_causal = args[:5]
    else:
        q, k, attn_mask, is_causal = args[1], args[2], args[6], args[7]
    return {
        "head_dim": q.shape[3],
        "dtype": str(q.dtype).removeprefix("torch."),
        "few_keys": k.shape[2] <= 128,
        "mask": _mask_kind(attn_mask),
        "causal": is_causal,
    }


def implementation() -> Implementation:
    kernels = torch.ops.fastldm_cuda

    def forward(q, k, v, attn_mask, is_causal, scale, need_lse):
        out = _result_like(q)
        lse = torch.empty(q.shape[:3] if need_lse else 0, dtype=torch.float32, device=q.device)
        floats = kernels.attention_forward_workspace(q, k)
        kernels.attention_forward(
            _readable(q),
            _readable(k),
            _readable(v),
            readable_mask(attn_mask, q.dtype),
            is_causal,
            1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
            out,
            lse if need_lse else None,
            torch.empty(floats, dtype=torch.float32, device=q.device) if floats else None,
        )
        return in_layout_of(out, q), lse

    def backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
        grads = _result_like(q), _result_like(k), _result_like(v)
        floats = kernels.attention_backward_workspace(q, k)
        kernels.attention_backward(
            _readable(grad_out),
            _readable(q),
            _readable(k),
            _readable(v),
            _readable(out),
            lse.contiguous(),
            readable_mask(attn_mask, q.dtype),
            is_causal,
            1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
            *grads,
            torch.empty(floats, dtype=torch.float32, device=q.device),
        )
        return tuple(in_layout_of(grad, x) for grad, x in zip(grads, (q, k, v)))

    return Implementation(
        forward=forward, backward=backward, supports=_supports, supports_backward=_supports_backward
    )
