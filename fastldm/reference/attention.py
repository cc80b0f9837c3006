"""Attention, softmax(scale * q k^T + mask) v, written out.

Forward, per row i of the scores S = scale * q k^T + mask:
    m_i = max_j S_ij,   P_ij = exp(S_ij - m_i) / sum_l exp(S_il - m_i),   out = P v,
    lse_i = log sum_j exp(S_ij)
Backward, for the gradient g of out (FlashAttention, arXiv 2205.14135, appendix B.2):
    dv = P^T g,   dP = g v^T,   dS = P * (dP - rowsum(P * dP)),   dq = scale * dS k,   dk = scale * dS^T q
P is not taken as exp(S_ij - lse_i): where |lse| is huge, as in a row that a finite mask of -1e9 covers, the
logarithm of the sum is lost in rounding. A row with every key masked has lse = -inf, P = 0, so output and
gradients are 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of


def _compute_dtype(q: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)


def _probabilities(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """P (B, H, Sq, Sk) and lse (B, H, Sq)."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q.to(dtype) @ k.to(dtype).transpose(-2, -1)) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask.to(dtype)
    lse = torch.logsumexp(scores, dim=-1)
    dead = (lse == -math.inf).unsqueeze(-1)
    return torch.softmax(scores, dim=-1).masked_fill(dead, 0.0), lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), lse (B, H, Sq)), computed and returned in `dtype`.

    `dtype` defaults to float32 (float64 for float64 inputs). Masks as in
    `fastldm.ops.attention`, 4-D.
    """
    dtype = _compute_dtype(q, dtype)
    probabilities, lse = _probabilities(q, k, attn_mask, is_causal, scale, dtype)
    return probabilities @ v.to(dtype), lse


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), computed and returned in `dtype` (default as in `attention`)."""
    dtype = _compute_dtype(q, dtype)
    probabilities, _ = _probabilities(q, k, attn_mask, is_causal, scale, dtype)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    grad_out = grad_out.to(dtype)
    grad_v = probabilities.transpose(-2, -1) @ grad_out
    grad_p = grad_out @ v.to(dtype).transpose(-2, -1)
    grad_s = probabilities * (grad_p - (probabilities * grad_p).sum(dim=-1, keepdim=True))
    return scale * (grad_s @ k.to(dtype)), scale * (grad_s.transpose(-2, -1) @ q.to(dtype)), grad_v


def _forward(q, k, v, attn_mask, is_causal, scale, need_lse):
    out, lse = attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    return in_layout_of(out.to(q.dtype), q), lse.contiguous() if need_lse else lse.new_empty(0)


def _backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
    grads = attention_backward(grad_out, q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    return tuple(in_layout_of(grad.to(x.dtype), x) for grad, x in zip(grads, (q, k, v)))


IMPLEMENTATION = Implementation(forward=_forward, backward=_backward)
