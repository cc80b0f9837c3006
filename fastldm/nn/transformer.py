"""The transformer that latent diffusion puts on feature maps (Rombach et al. 2022, appendix E.2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastldm.nn import checkpointing
from fastldm.nn.attention import Attention, image_to_tokens, tokens_to_image
from fastldm.nn.normalization import GroupNorm


class GEGLU(nn.Module):
    """A linear layer to twice the width, one half gated by the exact GELU of the other (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to `mult * dim`, dropout, linear back to `dim`; any leading dimensions."""

    def __init__(self, dim: int, *, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, mult * dim), nn.Dropout(dropout), nn.Linear(mult * dim, dim)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to the context, feed-forward, each with a residual.

    With `only_cross_attention` the first attention looks at the context too.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        cross_attention_dim: int,
        only_cross_attention: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        heads = {"heads": num_attention_heads, "dim_head": attention_head_dim, "dropout": dropout}
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, cross_attention_dim if only_cross_attention else None, **heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim, **heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout=dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens (B, S, dim) and context (B, S_k, cross_attention_dim) to tokens; masks as `Attention`'s."""
        context = encoder_hidden_states if self.only_cross_attention else None
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), context, attention_mask)
        hidden_states = hidden_states + self.attn2(
            self.norm2(hidden_states), encoder_hidden_states, encoder_attention_mask
        )
        return hidden_states + self.ff(self.norm3(hidden_states))


class Transformer2DModel(nn.Module):
    """Transformer blocks on the positions of a feature map, between two projections, plus the input.

    `use_linear_projection` makes those projections linear layers on tokens (SD 2, SDXL) instead of 1x1
    convolutions; the result is the same, the weights' shape is not.
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        *,
        in_channels: int,
        cross_attention_dim: int,
        num_layers: int = 1,
        norm_num_groups: int = 32,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        inner_dim = num_attention_heads * attention_head_dim
        self.use_linear_projection = use_linear_projection
        self.gradient_checkpointing = False
        self.norm = GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        if use_linear_projection:
            self.proj_in: nn.Module = nn.Linear(in_channels, inner_dim)
            self.proj_out: nn.Module = nn.Linear(inner_dim, in_channels)
        else:
            self.proj_in = nn.Conv2d(in_channels, inner_dim, kernel_size=1)
            self.proj_out = nn.Conv2d(inner_dim, in_channels, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim=cross_attention_dim,
                only_cross_attention=only_cross_attention,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Feature map (B, C, H, W) and context (B, S_k, cross_attention_dim) to a feature map."""
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        if self.use_linear_projection:
            tokens = self.proj_in(image_to_tokens(hidden_states))
        else:
            tokens = image_to_tokens(self.proj_in(hidden_states))
        for block in self.transformer_blocks:
            tokens = checkpointing.run(
                block,
                tokens,
                encoder_hidden_states,
                attention_mask,
                encoder_attention_mask,
                enabled=self.gradient_checkpointing,
            )
        if self.use_linear_projection:
            hidden_states = tokens_to_image(self.proj_out(tokens), like=residual)
        else:
            hidden_states = self.proj_out(tokens_to_image(tokens, like=residual))
        return hidden_states + residual
