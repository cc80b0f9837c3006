"""Attention on the compiled CPU kernels (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of, readable_mask
from fastldm.processor import mkl_is_slow

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reason_against(q: Tensor) -> str | None:
    if q.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {q.dtype}"
    return None if q.device.type == "cpu" else f"runs on the CPU, not on {q.device.type}"


def _supports(q, k, v, attn_mask, is_causal, scale, need_lse) -> str | None:
    return _reason_against(q)


def _supports_backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale) -> str | None:
    return _reason_against(q)


def _slower_backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale) -> str | None:
    one_wide_head = q.dtype is torch.float32 and q.shape[0] * q.shape[1] == 1 and q.shape[3] > 256
    if one_wide_head and not mkl_is_slow():
        return "one wide head is shared among the threads at the price of two more products"
    return None


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _result_like(x: Tensor) -> Tensor:
    """An empty tensor of the layout of `x`, or where the last dimension would not be dense, contiguous."""
    result = torch.empty_like(x)
    return result if result.stride(3) == 1 else x.new_empty(x.shape)


def implementation() -> Implementation:
    forward_kernel = torch.ops.fastldm_cpu.attention_forward.default
    backward_kernel = torch.ops.fastldm_cpu.attention_backward.default

    def forward(q, k, v, attn_mask, is_causal, scale, need_lse):
        out = _result_like(q)
        lse = torch.empty(q.shape[:3] if need_lse else 0, dtype=torch.float32)
        forward_kernel(
            _dense_last(q),
            _dense_last(k),
            _dense_last(v),
            readable_mask(attn_mask, q.dtype),
            is_causal,
            1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
            out,
            lse if need_lse else None,
        )
        return in_layout_of(out, q), lse

    def backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
        grads = _result_like(q), _result_like(k), _result_like(v)
        backward_kernel(
            _dense_last(grad_out),
            _dense_last(q),
            _dense_last(k),
            _dense_last(v),
            _dense_last(out),
            lse,
            readable_mask(attn_mask, q.dtype),
            is_causal,
            1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
            *grads,
        )
        return tuple(in_layout_of(grad, x) for grad, x in zip(grads, (q, k, v)))

    return Implementation(
        forward=forward,
        backward=backward,
        supports=_supports,
        supports_backward=_supports_backward,
        slower_backward=_slower_backward,
    )
