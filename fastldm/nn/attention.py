"""Multi-head attention over `fastldm.ops.attention`, for token sequences and for feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastldm import ops
from fastldm.errors import ConfigError
from fastldm.nn.normalization import GroupNorm
from fastldm.ops.attention import HEAD_DIMS


class Attention(nn.Module):
    """Self- or cross-attention with an output projection.

    Takes tokens (B, S, query_dim) or a feature map (B, query_dim, H, W), whose positions are then the tokens.

    Args:
        cross_attention_dim: width of the context; None means self-attention.
        bias: whether the query, key and value projections have one (the output projection always does).
        norm_num_groups: when given, a group norm with `eps` over the input first (autoencoders).
        residual_connection: add the input to the output.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        *,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        norm_num_groups: int | None = None,
        eps: float = 1e-5,
        residual_connection: bool = False,
    ):
        super().__init__()
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        inner_dim = heads * dim_head
        self.heads = heads
        self.head_padding = _padding(dim_head)
        self.scale = dim_head**-0.5
        self.residual_connection = residual_connection
        self.group_norm = None if norm_num_groups is None else GroupNorm(norm_num_groups, query_dim, eps=eps)
        self.to_q = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `hidden_states` to `encoder_hidden_states` (B, S_k, context_dim), or to itself.

        `attention_mask` is a bool (B, S_k), True for keys that may be attended to. Returns the shape of
        `hidden_states`.
        """
        residual = hidden_states
        spatial = hidden_states.ndim == 4
        if self.group_norm is not None:
            hidden_states = (
                self.group_norm(hidden_states)
                if spatial
                else self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
            )
        if spatial:
            hidden_states = image_to_tokens(hidden_states)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        query = self._split_heads(self.to_q(hidden_states))
        key = self._split_heads(self.to_k(context))
        value = self._split_heads(self.to_v(context))
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        hidden_states = ops.attention(query, key, value, mask, scale=self.scale)
        if self.head_padding:
            hidden_states = hidden_states[..., : -self.head_padding]
        hidden_states = hidden_states.transpose(1, 2).flatten(2)
        for layer in self.to_out:
            hidden_states = layer(hidden_states)

        if spatial:
            hidden_states = tokens_to_image(hidden_states, like=residual)
        return hidden_states + residual if self.residual_connection else hidden_states

    def _split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, S, heads * dim_head) to (B, heads, S, dim_head), a view; padded to a width the operation
        takes."""
        split = projected.unflatten(-1, (self.heads, -1))
        if self.head_padding:
            split = F.pad(split, (0, self.head_padding))
        return split.transpose(1, 2)


def _padding(dim_head: int) -> int:
    """Zeros to add to a head, which change neither its scores nor its result."""
    width = min((dim for dim in HEAD_DIMS if dim >= dim_head), default=None)
    if width is None:
        raise ConfigError(
            f"attention heads of width {dim_head} are too wide; accepted: up to {max(HEAD_DIMS)}"
        )
    return width - dim_head


def image_to_tokens(image: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to contiguous (B, H * W, C); no copy where the image is channels-last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def tokens_to_image(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B, H * W, C) to (B, C, H, W) with the height, width and memory format of `like` (B, *, H, W).

    Without the copy for an NCHW `like`, the channels-last strides of the view would spread to later layers.
    """
    image = tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
    return image.contiguous() if like.is_contiguous() else image
