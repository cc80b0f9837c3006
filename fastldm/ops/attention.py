"""Attention: `softmax(scale * q k^T + mask) v`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm import dispatch
from fastldm.checks import shown
from fastldm.errors import InputError, InputTypeError
from fastldm.ops._library import check_number, check_tensor, define, refuse_transforms

HEAD_DIMS = (*range(8, 257, 8), 512)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention, with the layout and names of PyTorch's `scaled_dot_product_attention`.

    Args:
        q: (B, H, Sq, D), float32, bfloat16, float16 or float64, any strides; D in 8, 16, ..., 256 or 512.
        k, v: (B, H, Sk, D), dtype and device of `q`. Under autocast all three are cast to the autocast dtype,
            unless they are float64.
        attn_mask: bool (True = attend) or floating point (added to the scores), broadcastable to (B, H, Sq,
            Sk); or bool (B, Sk), a key-padding mask. No gradient reaches it. `k` and `v` must be finite where
            they are masked (fill padding with zeros): any finite number there changes nothing, but NaN or
            infinity may turn the rows of that batch and head into NaN, or may not, by backend.
        is_causal: query i sees keys 0..i (aligned at the top left, as in PyTorch); together with a mask both
            apply.
        scale: factor on the scores, 1 / sqrt(D) by default.
        backend: "auto" or the name of a backend, which is a requirement.

    Returns:
        (B, H, Sq, D) in the dtype of `q` and the strides of `torch.empty_like(q)`. A row with every key
        masked, and every row when Sk is 0, is 0 with gradient 0.

    Raises:
        InputTypeError: a dtype that is not floating point, a mask that is neither bool nor floating point; an
            argument of another wrong kind.
        InputError: shapes, dtypes or devices that do not fit together, a head dim out of range, a mask that
            requires grad.
        UnsupportedError: a backend asked for by name cannot do this call; differentiation by torch.func
            (grad, vjp, ...) or in forward mode.
    """
    refuse_transforms("attention", q, k, v, attn_mask)
    args = prepare(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    return _attention(*args, backend)[0]


def prepare(q, k, v, attn_mask=None, *, is_causal=False, scale=None) -> tuple:
    """The checked arguments of the operation, without the backend."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    if scale is not None:
        check_number("scale", scale)
    if not isinstance(is_causal, (bool, torch.SymBool)):
        raise InputTypeError(f"is_causal must be True or False, got {shown(is_causal)}")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise InputError(f"q, k, v must be (B, H, S, D), got {_shape(q)}, {_shape(k)}, {_shape(v)}")
    if not q.dtype == k.dtype == v.dtype:
        _check_mixed_dtypes(q, k, v)
    if not q.device == k.device == v.device:
        raise InputError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    batch, heads, _, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != (batch, heads) or k.shape[3] != head_dim:
        raise InputError(
            f"k and v must be (B, H, Sk, D) with B, H, D of q {_shape(q)}, got {_shape(k)}, {_shape(v)}; "
            "repeat the key heads for grouped-query attention"
        )
    if head_dim not in HEAD_DIMS:
        raise InputError(f"head dim must be 8, 16, ..., 256 or 512, got {head_dim}; pad q, k, v with zeros")
    if attn_mask is not None:
        attn_mask = _check_mask(attn_mask, q, k)
    # PyTorch without gradient has no use for the log-sum-exp, and its fastest kernels do not give it.
    need_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return q, k, v, attn_mask, is_causal, scale, need_lse


def _check_mixed_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Autocast makes one dtype of all floating-point dtypes but float64."""
    got = f"got {q.dtype}, {k.dtype}, {v.dtype}"
    if not torch.is_autocast_enabled(q.device.type):
        raise InputError(f"q, k, v must have one dtype, {got}")
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        raise InputError(f"q, k, v must have one dtype, as autocast leaves float64 alone, {got}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as 4-D, each dimension 1 or that of (B, H, Sq, Sk)."""
    wanted = (*q.shape[:3], k.shape[2])
    if not isinstance(mask, Tensor):
        raise InputTypeError(f"attn_mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputTypeError(
            f"attn_mask must be bool (True = attend) or floating point (added), got {mask.dtype}"
        )
    if mask.requires_grad and torch.is_grad_enabled():
        raise InputError("attn_mask requires grad, but no gradient reaches a mask; pass attn_mask.detach()")
    if mask.device != q.device:
        raise InputError(f"attn_mask must be on the device of q, {q.device}, got {mask.device}")
    if mask.dtype == torch.bool and mask.dim() == 2 and mask.shape == (wanted[0], wanted[3]):
        if wanted[0] == wanted[2] and wanted[0] > 1:
            raise InputError(
                f"a bool mask {_shape(mask)} could be (Sq, Sk) or (B, Sk) here; pass mask[None, None] or "
                "mask[:, None, None]"
            )
        return mask[:, None, None, :]
    fits = mask.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(wanted))
    )
    if not fits:
        raise InputError(f"attn_mask {_shape(mask)} does not broadcast to (B, H, Sq, Sk) = {wanted}")
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _lse_like(q: Tensor, need_lse: bool) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3] if need_lse else (0,), dtype=dtype)


def _kernel(q, k, v, attn_mask, is_causal, scale, need_lse, backend):
    if q.numel() == 0 or k.shape[2] == 0:
        out, lse = torch.zeros_like(q), _lse_like(q, need_lse).fill_(-torch.inf)
    else:
        args = (q, k, v, attn_mask, is_causal, scale, need_lse)
        out, lse = dispatch.run("attention", "forward", backend, args, dispatch.current_state())
    dispatch.remember(lse)
    return out, lse


def _fake(q, k, v, attn_mask, is_causal, scale, need_lse, backend):
    return torch.empty_like(q), _lse_like(q, need_lse)


def _backward_kernel(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale, backend):
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    args = (grad_out, q, k, v, out, lse, attn_mask, is_causal, scale)
    return dispatch.run("attention", "backward", backend, args, dispatch.remembered(lse))


def _backward_fake(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, attn_mask, ctx.is_causal, ctx.scale, need_lse, ctx.backend = inputs
    out, lse = output
    if not need_lse:
        raise RuntimeError("fastldm::attention needs need_lse=True where a gradient is wanted")
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, attn_mask)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, attn_mask = ctx.saved_tensors
    grads = _attention_backward(grad_out, q, k, v, out, lse, attn_mask, ctx.is_causal, ctx.scale, ctx.backend)
    return (*grads, None, None, None, None, None)


_attention_backward = define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? attn_mask, bool is_causal, float? scale, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float? scale, bool need_lse, "
    "str backend) -> (Tensor, Tensor)",
    _kernel,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
    autocast_tensors=3,
    composite=lambda args: dispatch.run_composite("attention", args[-1], args[:-1]),
)
