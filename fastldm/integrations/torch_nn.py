"""Rules for the modules of torch.nn."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from fastldm import dispatch, ops
from fastldm.integrations.rules import Match
from fastldm.integrations.sdpa import sdpa_on
from fastldm.integrations.swapping import original_class
from fastldm.nn.hooks import only_computes


def norm(layer: nn.GroupNorm, x: torch.Tensor, backend: str, **options) -> torch.Tensor:
    return ops.group_norm(
        x, layer.num_groups, layer.weight, layer.bias, layer.eps, backend=backend, **options
    )


def is_norm(module: nn.Module) -> bool:
    """Whether calling `module` does no more than PyTorch's group norm."""
    return original_class(module) is nn.GroupNorm and only_computes(module)


def is_silu(module: nn.Module) -> bool:
    return type(module) is nn.SiLU and only_computes(module)


def takes(x: torch.Tensor) -> bool:
    return 2 <= x.dim() <= 5 and x.is_floating_point()


def _group_norm(module: nn.Module) -> Match | None:
    if original_class(module) is nn.GroupNorm:
        return Match("group_norm", "group norm", _group_norm_members)
    return None


def _group_norm_members(base: type, backend: str) -> dict:
    def forward(self, input):
        if takes(input):
            return norm(self, input, backend)
        dispatch.leave_to_torch("group_norm", backend, f"an input of {input.dim()} dimensions", (input,))
        return base.forward(self, input)

    return {"forward": forward}


def _sequential(module: nn.Module) -> Match | None:
    if original_class(module) is not nn.Sequential:
        return None
    children = list(module.named_children())
    pairs = [
        (first, second)
        for (first, norm), (second, act) in pairwise(children)
        if original_class(norm) is nn.GroupNorm and type(act) is nn.SiLU
    ]
    if not pairs:
        return None
    names = ", ".join(f"{first}+{second}" for first, second in pairs)
    covers = tuple(first for first, _ in pairs)
    return Match("group_norm", f"group norm + SiLU ({names})", _sequential_members, covers=covers)


def _sequential_members(base: type, backend: str) -> dict:
    def forward(self, input):
        layers = list(self._modules.values())
        done = False
        for layer, following in zip(layers, [*layers[1:], None]):
            if done:
                done = False
            elif following is not None and is_norm(layer) and is_silu(following) and takes(input):
                input = norm(layer, input, backend, activation="silu")
                done = True
            else:
                input = layer(input)
        return input

    return {"forward": forward}


def _multihead_attention(module: nn.Module) -> Match | None:
    if original_class(module) is not nn.MultiheadAttention:
        return None
    if module.bias_k is not None or module.add_zero_attn:
        return Match("attention", skipped="it adds keys of its own (add_bias_kv, add_zero_attn)")
    return Match("attention", "fused attention where need_weights=False", _multihead_attention_members)


def _multihead_attention_members(base: type, backend: str) -> dict:
    attend = sdpa_on(backend)

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        reason = None
        if need_weights:
            reason = "the attention weights are asked for (need_weights=True)"
        elif self.training and self.dropout > 0.0:
            reason = "dropout on the attention weights"
        elif query.dim() != 3 or query.is_nested:
            reason = "an input without a batch"
        if reason is not None:
            dispatch.leave_to_torch("attention", backend, reason, (query, key, value))
            return base.forward(
                self,
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if not self.batch_first:
            kept = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = (kept[id(x)] for x in (query, key, value))
        projected = _project(self, query, key, value)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected]
        mask = _allowed(key_padding_mask, attn_mask, query.shape[0], self.num_heads)
        out = attend(*heads, attn_mask=mask)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None

    return {"forward": forward}


def _project(module: nn.MultiheadAttention, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """(B, S, embed_dim) of queries, keys and values."""
    bias = module.in_proj_bias
    if module._qkv_same_embed_dim:
        if inputs[0] is inputs[1] is inputs[2]:
            return list(F.linear(inputs[0], module.in_proj_weight, bias).chunk(3, -1))
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(*args) for args in zip(inputs, weights, biases)]


def _allowed(
    padding: torch.Tensor | None, mask: torch.Tensor | None, batch: int, heads: int
) -> torch.Tensor | None:
    """One mask for `ops.attention` of `padding` (B, Sk) and `mask` (Sq, Sk) or (B * heads, Sq, Sk).

    Bool masks of nn.MultiheadAttention are True where a key is hidden; others are added to the scores.
    """
    masks = []
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if mask is not None:
        masks.append(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    dtype = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    added = [torch.where(x, -torch.inf, 0.0).to(dtype) if x.dtype == torch.bool else x for x in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


RULES = (_sequential, _group_norm, _multihead_attention)
