"""`fastldm.ops.attention` in code that calls `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from functools import cache
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from fastldm import dispatch, ops
from fastldm.integrations.swapping import like_module, rebound
from fastldm.ops._library import differentiating
from fastldm.ops.attention import HEAD_DIMS

NAME = "scaled_dot_product_attention"


@cache
def sdpa_on(backend: str) -> Callable:
    """A function with the signature and meaning of PyTorch's, on `backend`.

    What `ops.attention` does not do goes to PyTorch: recorded, or where the backend is named an
    UnsupportedError.
    """

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if reason is not None:
            dispatch.leave_to_torch("attention", backend, reason, (query, key, value))
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return _attention(query, key, value, attn_mask, is_causal, scale, backend)

    return scaled_dot_product_attention


def _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa) -> str | None:
    if not isinstance(query, Tensor):
        return "an input that is no tensor"  # as torch.fx traces it
    if not query.is_floating_point() or query.is_nested:
        return "tensors that are not dense and floating point"
    if dropout_p > 0.0:
        return "dropout on the attention weights"
    if query.dim() not in (3, 4) or key.dim() != query.dim():
        return f"queries of {query.dim()} and keys of {key.dim()} dimensions"
    if key.shape != value.shape:
        return "keys and values of different shapes"
    if key.shape[0] != query.shape[0] or (
        key.shape[1] != query.shape[1] and query.dim() == 4 and not enable_gqa
    ):
        return "keys that broadcast to the queries"
    if query.shape[-1] > HEAD_DIMS[-1] or query.shape[-1] == 0:
        return f"a head dim of {query.shape[-1]}"
    if attn_mask is not None and (is_causal or attn_mask.requires_grad):
        return "a mask that is causal too" if is_causal else "a mask that requires grad"
    if differentiating():
        return "a derivative by torch.func or in forward mode"
    return None


def _attention(query, key, value, attn_mask, is_causal, scale, backend) -> Tensor:
    if query.dim() == 3:
        mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        args = (x.unsqueeze(1) for x in (query, key, value))
        return _attention(*args, mask, is_causal, scale, backend).squeeze(1)
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None:
        # In four dimensions, so that a bool mask of two is not taken for one of keys.
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    head_dim = query.shape[-1]
    padding = min(dim for dim in HEAD_DIMS if dim >= head_dim) - head_dim
    if padding:
        scale = head_dim**-0.5 if scale is None else scale
        padded = (F.pad(x, (0, padding)) for x in (query, key, value))
    else:
        padded = query, key, value
    out = ops.attention(*padded, attn_mask, is_causal=is_causal, scale=scale, backend=backend)
    if padding:  # without gaps, so that it can be viewed as PyTorch's result can
        out = torch.empty_like(query, dtype=out.dtype).copy_(out[..., :head_dim])
    return out


def calls_sdpa(function: object) -> bool:
    return isinstance(function, types.FunctionType) and bool(_redirections(function, "auto"))


def redirected(function: types.FunctionType, backend: str) -> types.FunctionType:
    """`function` with our attention wherever it calls PyTorch's or diffusers' dispatcher by a global name."""
    return rebound(function, _redirections(function, backend))


def redirected_forward(base: type, backend: str) -> dict:
    """The members of a subclass whose forward is that of `base`, redirected."""
    return {"forward": redirected(base.forward, backend)}


def _redirections(function: types.FunctionType, backend: str) -> dict[str, object]:
    """The global names of `function` to bind anew."""
    found = {}
    for path in _global_paths(function.__code__):
        name, *rest = path
        value = function.__globals__.get(name)
        if value is F and rest[:1] == [NAME]:
            found[name] = functional_on(backend)
        elif value is torch and rest[:3] == ["nn", "functional", NAME]:
            found[name] = like_module(torch, nn=_nn_on(backend))
        elif value is torch.nn and rest[:2] == ["functional", NAME]:
            found[name] = _nn_on(backend)
        elif value is F.scaled_dot_product_attention:
            found[name] = sdpa_on(backend)
        elif (
            getattr(value, "__name__", None) == "dispatch_attention_fn"
            and value.__module__ == "diffusers.models.attention_dispatch"
        ):
            found[name] = _dispatcher_on(value, backend)
    return found


@cache
def _global_paths(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """("torch", "nn", "functional", ...) for every global name that `code` reads, with the attributes read of
    it there. Names that it imports or binds itself are none."""
    found, path = [], ()
    for step in dis.get_instructions(code):
        if path and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, step.argval)
        elif step.opname != "EXTENDED_ARG":
            found.append(path)
            path = (step.argval,) if step.opname == "LOAD_GLOBAL" else ()
    inner = (_global_paths(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return tuple(path for path in (*found, *chain(*inner)) if path)


@cache
def _nn_on(backend: str) -> types.ModuleType:
    """`torch.nn` with our attention."""
    return like_module(torch.nn, functional=functional_on(backend))


@cache
def functional_on(backend: str) -> types.ModuleType:
    """`torch.nn.functional` with our attention."""
    return like_module(F, **{NAME: sdpa_on(backend)})


def _dispatcher_on(original: Callable, backend: str) -> Callable:
    """diffusers' dispatcher, whose tensors are (B, S, H, D): another backend chosen there stays chosen."""
    ours, wanted = sdpa_on(backend), backend
    registry = original.__globals__["_AttentionBackendRegistry"]
    native = original.__globals__["AttentionBackendName"].NATIVE

    def dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
        attention_kwargs=None,
        *,
        backend=None,
        **kwargs,
    ):
        others = [name for name, value in kwargs.items() if value is not None]
        reason = None
        if backend is not None:
            reason = f"the attention backend of diffusers was set to {backend}"
        elif registry.get_active_backend()[0] is not native:
            reason = f"the active attention backend of diffusers is {registry.get_active_backend()[0]}"
        elif attention_kwargs or others:
            reason = f"arguments of diffusers' dispatcher ({', '.join(others) or 'attention_kwargs'})"
        if reason is not None:
            dispatch.leave_to_torch("attention", wanted, reason, (query, key, value))
            kwargs.update(attention_kwargs=attention_kwargs, backend=backend)
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, **kwargs)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = ours(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return out.transpose(1, 2)

    return dispatch_attention_fn
