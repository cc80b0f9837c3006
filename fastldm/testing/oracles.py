"""The operations as a PyTorch user would write them, in the dtype of the inputs and differentiable.

On float64 inputs they are the truth that formulas and kernels are checked against; on the inputs of a test
they say what error plain PyTorch makes there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Matrix product, mask, softmax, matrix product; rows with every key masked are 0. The mask must be
    4-D."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)
    closed = torch.zeros_like(scores, dtype=torch.bool)
    if is_causal:
        closed |= torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        closed |= ~attn_mask
    elif attn_mask is not None:
        closed |= attn_mask == -math.inf
        scores = scores + attn_mask.to(q.dtype)
    dead = closed.all(dim=-1, keepdim=True)
    scores = scores.masked_fill(closed, -math.inf).masked_fill(dead, 0.0)
    return scores.softmax(dim=-1).masked_fill(dead, 0.0) @ v


def plain_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    channel_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """One PyTorch operation after the other."""
    ones = (1,) * (x.dim() - 2)

    def parameter(value: Tensor) -> Tensor:
        return value.to(x.dtype).reshape(*x.shape[:2], *ones)

    y = x if channel_bias is None else x + parameter(channel_bias)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch's backward fails with a bias alone
    affine = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    y = F.group_norm(y, num_groups, *affine, eps)
    if scale is not None:
        y = y * (1.0 + parameter(scale))
    if shift is not None:
        y = y + parameter(shift)
    return F.silu(y) if activation == "silu" else y
