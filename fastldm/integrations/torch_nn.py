"""Rules for the modules of torch.nn."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from fastldm import dispatch, ops
from fastldm.integrations.rules import Match, is_own
from fastldm.integrations.sdpa import sdpa_on
from fastldm.integrations.swapping import original_class
from fastldm.nn.hooks import only_computes
from fastldm.ops._library import differentiating


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
    return why_not(x) is None


def why_not(x: torch.Tensor) -> str | None:
    """Why `ops.group_norm` does not take `x`."""
    if not isinstance(x, torch.Tensor):
        return "an input that is no tensor"  # as torch.fx traces it
    if not 2 <= x.dim() <= 5:
        return f"an input of {x.dim()} dimensions"
    if not x.is_floating_point():
        return f"an input of {x.dtype}"
    return "a derivative by torch.func or in forward mode" if differentiating() else None


def _group_norm(module: nn.Module) -> Match | None:
    kind = original_class(module)
    if kind is nn.GroupNorm:
        return Match("group_norm", "group norm", _group_norm_members)
    if isinstance(module, nn.GroupNorm) and not is_own(kind):
        return Match("group_norm", skipped="it is of a class derived from nn.GroupNorm")
    return None


def _group_norm_members(base: type, backend: str) -> dict:
    def forward(self, input):
        reason = why_not(input)
        if reason is None:
            return norm(self, input, backend)
        dispatch.leave_to_torch("group_norm", backend, reason, (input,))
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


def _encoder_layer(module: nn.Module) -> Match | None:
    if original_class(module) is not nn.TransformerEncoderLayer:
        return None
    now = "its attention fused, in inference too"
    return Match("attention", now, _encoder_layer_members, covers=("self_attn",))


def _encoder_layer_members(base: type, backend: str) -> dict:
    """Past PyTorch's fast path for inference, one operation for the whole layer, which calls no attention."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        if not isinstance(src, torch.Tensor) or src.is_nested or differentiating():
            reason = "a nested tensor, a tracer or a derivative by torch.func or in forward mode"
            dispatch.leave_to_torch("attention", backend, reason, (src,))
            return base.forward(self, src, src_mask, src_key_padding_mask, is_causal)
        attended = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *attended)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *attended))
        return self.norm2(src + self._ff_block(src))

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
        if need_weights:
            reason = "the attention weights are asked for (need_weights=True)"
        elif self.training and self.dropout > 0.0:
            reason = "dropout on the attention weights"
        else:
            reason = _unfit(self, query, key, value, key_padding_mask, attn_mask, is_causal)
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
        to_heads, back = ((0, 2, 1, 3), (0, 2, 1, 3)) if self.batch_first else ((1, 2, 0, 3), (2, 0, 1, 3))
        projected = _project(self, query, key, value)
        heads = [x.unflatten(-1, (self.num_heads, -1)).permute(to_heads) for x in projected]
        # As in PyTorch, `is_causal` stands for `attn_mask` where that is the only mask.
        is_causal = is_causal and key_padding_mask is None
        mask = None
        if not is_causal:
            mask = _allowed(key_padding_mask, attn_mask, heads[0].shape[0], self.num_heads)
        out = attend(*heads, attn_mask=mask, is_causal=is_causal)
        return self.out_proj(out.permute(back).flatten(2)), None

    return {"forward": forward}


def _unfit(module, query, key, value, padding, mask, is_causal) -> str | None:
    """Why PyTorch has to see these arguments: it does something else with them, or refuses them."""
    if not all(isinstance(x, torch.Tensor) for x in (query, key, value)):
        return "an input that is no tensor"
    if query.dim() != 3 or query.is_nested:
        return "an input without a batch"
    if differentiating():
        return "a derivative by torch.func or in forward mode"
    batch, length = (0, 1) if module.batch_first else (1, 0)
    size, queries, keys = query.shape[batch], query.shape[length], key.shape[length]
    fits = key.dim() == value.dim() == 3 and key.shape[batch] == size and key.shape[:2] == value.shape[:2]
    if padding is not None:
        fits = fits and padding.shape == (size, keys)
    if mask is not None:
        fits = fits and mask.shape in ((queries, keys), (size * module.num_heads, queries, keys))
        fits = fits and (mask.dtype == torch.bool or mask.is_floating_point())
    if not fits or (is_causal and mask is None):
        return "inputs and masks that do not fit together"
    return None


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


RULES = (_sequential, _group_norm, _encoder_layer, _multihead_attention)
