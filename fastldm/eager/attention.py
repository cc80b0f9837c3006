"""Attention through PyTorch's own kernels.

On the CPU the flash kernel behind `scaled_dot_product_attention`, called directly because it also returns the
log-sum-exp, and its backward. Elsewhere `scaled_dot_product_attention` without gradient; with gradient matmul
and softmax over blocks of query rows, since the kernel that PyTorch picks there keeps private state for its
own backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm.implementation import Implementation, in_layout_of
from fastldm.processor import mkl_is_slow

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_BLOCK_ELEMENTS = 1 << 24  # scores held at once by the blockwise path
# Up to this Sq * Sk PyTorch's half-precision CPU backward takes longer than casting and its float32 one: on 2
# cores with AMX 20 against 4 ms at (64, 4, 64, 64, 32), 15 against 10 at (8, 8, 256, 256, 40), 36 against 53
# at (2, 8, 1024, 1024, 80).
_SMALL_SCORES = 256 * 256
# Up to this B * H * Sq * Sk in float32 PyTorch's own autograd is the fastest way to a gradient: on 2 cores of
# a Xeon 59 against 106 us at (2, 4, 16, 16, 32) and 760 against 1020 at (2, 8, 64, 64, 160), of an EPYC 43
# against 75 and 1270 against 580. Half precision is slow there.
_SMALL_TRAINING = 2 * 8 * 64 * 77
_SMALL_TRAINING_SLOW_MKL = 2 * 4 * 32 * 32
# exp(score - lse), as in PyTorch's CPU backward, is off by |lse| units roundoff: 6e-5 in float32 here.
_LARGE_LSE = 1024.0


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _additive(
    mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool, merge_causal: bool
) -> Tensor | None:
    """The mask as something to add to the scores, in the dtype of q or, for half precision, float32.

    The CPU kernel reads a mask of any other dtype wrongly, without an error.
    """
    accepted = (q.dtype, torch.promote_types(torch.float32, q.dtype))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    elif mask is not None and mask.dtype not in accepted:
        mask = mask.to(accepted[1])
    if is_causal and merge_causal:
        above = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        mask = (
            q.new_zeros(()).masked_fill(above, -math.inf)
            if mask is None
            else mask.masked_fill(above, -math.inf)
        )
    return mask


def _dead_rows(mask: Tensor, q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """(B or 1, H or 1, Sq or 1) bool: rows with every key masked, by an additive mask and the causal one."""
    closed = mask == -math.inf
    if is_causal:
        closed = closed | torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return closed.all(dim=-1)


def _forward(q, k, v, attn_mask, is_causal, scale, need_lse):
    if q.device.type == "cpu":
        return _forward_cpu(q, k, v, attn_mask, is_causal, scale, need_lse)
    if need_lse:
        return _forward_blocks(q, k, v, attn_mask, is_causal, scale)
    return in_layout_of(_forward_plain(q, k, v, attn_mask, is_causal, scale), q), _no_lse(q)


def _forward_plain(q, k, v, attn_mask, is_causal, scale):
    mask = _additive(attn_mask, q, k, is_causal, merge_causal=attn_mask is not None)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    dead = _dead_rows(mask, q, k, False).unsqueeze(-1)
    if mask.dtype != q.dtype:
        # float16 makes -1e9 an infinity, which in a whole row of them means another thing. What softmax does
        # not notice: the largest number of each row becomes 0, and then only weights of exp(-65504) are lost.
        mask = (mask - mask.amax(dim=-1, keepdim=True).masked_fill(dead, 0.0)).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).masked_fill(dead, 0.0)


def _no_lse(q: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.promote_types(torch.float32, q.dtype), device=q.device)


def _forward_cpu(q, k, v, attn_mask, is_causal, scale, need_lse):
    if attn_mask is None and not need_lse:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        return in_layout_of(out, q), _no_lse(q)
    q_, k_, v_ = _dense_last(q), _dense_last(k), _dense_last(v)
    mask = _additive(attn_mask, q, k, is_causal, merge_causal=False)
    out, lse = _flash(q_, k_, v_, 0.0, is_causal, attn_mask=mask, scale=scale)
    if mask is not None:
        # The kernel's own idea of a row without keys has changed between releases.
        dead = _dead_rows(mask, q, k, is_causal)
        if dead.any():
            out = out.masked_fill(dead.unsqueeze(-1), 0.0)
            lse = lse.masked_fill(dead, -math.inf)
    return in_layout_of(out, q), lse.contiguous() if need_lse else _no_lse(q)


def _backward(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
    if q.device.type != "cpu":
        grads = _backward_blocks(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale)
    else:
        tensors = (grad_out, q, k, v, out)
        if q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] * k.shape[2] <= _SMALL_SCORES:
            tensors = tuple(x.float() for x in tensors)
        grads = _backward_cpu(*tensors, lse, attn_mask, is_causal, scale)
    return tuple(in_layout_of(grad.to(x.dtype), x) for grad, x in zip(grads, (q, k, v)))


def _backward_cpu(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
    if (lse.masked_fill(lse == -math.inf, 0.0).abs() > _LARGE_LSE).any():
        grad_out, q, k, v = (x.to(lse.dtype) for x in (grad_out, q, k, v))
        out, lse = _forward_blocks(q, k, v, attn_mask, is_causal, scale)
        return _backward_blocks(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale)
    mask = _additive(attn_mask, q, k, is_causal, merge_causal=False)
    if mask is not None:
        # exp(-inf - lse) must be 0 in a row without keys, so its lse may be anything finite.
        lse = lse.masked_fill(lse == -math.inf, 0.0)
    dense = (_dense_last(x) for x in (grad_out, q, k, v, out))
    return _flash_backward(*dense, lse, 0.0, is_causal, attn_mask=mask, scale=scale)


def _blocks(q: Tensor, k: Tensor) -> range:
    rows = max(1, _BLOCK_ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return range(0, q.shape[2], rows)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in float32 (float64), by the matrix units of the dtype of a and b.

    float16 overflows past 65504, so there each row is first divided by the power of two above its largest
    number.
    """
    if a.dtype != torch.float16:
        return (a @ b.transpose(-2, -1)).to(torch.promote_types(torch.float32, a.dtype))
    (a, a_size), (b, b_size) = _unit_rows(a), _unit_rows(b)
    return (a @ b.transpose(-2, -1)).float().mul_(a_size).mul_(b_size.transpose(-2, -1))


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / size in [-1, 1], and size (..., 1) in float32, powers of two."""
    wide = x.float()
    size = torch.exp2(torch.frexp(wide.abs().amax(dim=-1, keepdim=True)).exponent.float())
    return (wide / size).to(x.dtype), size


def _block_scores(q, k, mask, start, stop, scale):
    """float32 (float64) scores of the query rows start .. stop - 1, masked."""
    scores = _products(q[:, :, start:stop], k) * scale
    if mask is None:
        return scores
    return scores + (mask if mask.shape[-2] == 1 else mask[..., start:stop, :])


def _forward_blocks(q, k, v, attn_mask, is_causal, scale):
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = _additive(attn_mask, q, k, is_causal, merge_causal=True)
    blocks = _blocks(q, k)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(torch.float32, q.dtype))
    for start in blocks:
        stop = min(start + blocks.step, q.shape[2])
        scores = _block_scores(q, k, mask, start, stop, scale)
        block_lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        p = torch.softmax(scores, dim=-1).masked_fill(block_lse == -math.inf, 0.0)
        lse[:, :, start:stop] = block_lse.squeeze(-1)
        out[:, :, start:stop] = p.to(v.dtype) @ v
    return out, lse


def _backward_blocks(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale):
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = _additive(attn_mask, q, k, is_causal, merge_causal=True)
    dead = (lse == -math.inf).unsqueeze(-1)
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1, keepdim=True)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    blocks = _blocks(q, k)
    for start in blocks:
        stop = min(start + blocks.step, q.shape[2])
        rows = slice(start, stop)
        scores = _block_scores(q, k, mask, start, stop, scale)
        p = torch.softmax(scores, dim=-1).masked_fill(dead[:, :, rows], 0.0)
        grad_v += p.to(q.dtype).transpose(-2, -1) @ grad_out[:, :, rows]
        grad_p = _products(grad_out[:, :, rows], v)
        grad_s = (p * (grad_p - delta[:, :, rows]) * scale).to(q.dtype)
        grad_q[:, :, rows] = grad_s @ k
        grad_k += grad_s.transpose(-2, -1) @ q[:, :, rows]
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _composite(q, k, v, attn_mask, is_causal, scale, need_lse) -> Tensor | None:
    if attn_mask is not None or q.dtype != torch.float32:
        return None
    most = _SMALL_TRAINING_SLOW_MKL if mkl_is_slow() else _SMALL_TRAINING
    if not 0 < q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= most:
        return None
    if not (contiguous := q.is_contiguous()) and not q.transpose(1, 2).is_contiguous():
        return None
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    return out.contiguous() if contiguous else out.transpose(1, 2).contiguous().transpose(1, 2)


IMPLEMENTATION = Implementation(forward=_forward, backward=_backward, composite=_composite)
