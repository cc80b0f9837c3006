"""The layers of ADM's networks (Dhariwal & Nichol 2021), with the parameters of OpenAI's guided-diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError
from fastldm.nn import GroupNorm, checkpointing
from fastldm.nn.attention import image_to_tokens, tokens_to_image
from fastldm.ops.attention import HEAD_DIMS

GROUPS = 32
"""Of every norm: each width is a multiple of it."""


class PointwiseLinear(nn.Conv1d):
    """A linear layer over tokens (B, S, in_channels), whose weight is kept as a convolution of width 1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.squeeze(-1), self.bias)


class Downsample(nn.Module):
    """Halve height and width: by a 3x3 convolution of stride 2, or by averaging 2x2 pixels."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """(Norm, SiLU, convolution) twice around the time embedding, plus the input.

    Args:
        emb_channels: width of the time embedding.
        scale_shift: the embedding scales and shifts the second norm's output (adaptive group norm) instead of
            being added before that norm.
        resample: a layer without parameters between the first norm and its convolution, on the input as well.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        # The norms do SiLU too; a placeholder keeps the numbers of the layers behind it.
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, in_channels, activation="silu"),
            nn.Identity(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.resample = nn.Identity() if resample is None else resample
        width = 2 * out_channels if scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            GroupNorm(GROUPS, out_channels, activation="silu"),
            nn.Identity(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(N, in_channels, H, W) and (N, emb_channels), before its activation, to (N, out_channels, ...)."""
        norm, _, conv = self.in_layers
        hidden = conv(self.resample(norm(x)))
        x = self.resample(x)
        embedded = self.emb_layers(emb)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            hidden = norm(hidden, scale=scale, shift=shift)
        else:
            hidden = norm(hidden, channel_bias=embedded)
        return self.skip_connection(x) + conv(dropout(hidden))


class AttentionBlock(nn.Module):
    """Every place of a feature map attends to every place and, in GLIDE, to the tokens of a text before them.

    Args:
        new_order: the rows of `qkv` are all queries, all keys, all values, instead of those of one head after
            the other.
        encoder_channels: width of the text tokens; None = no text. Their keys and values, again head by head,
            come from `encoder_kv`.
    """

    def __init__(
        self, channels: int, heads: int, *, new_order: bool = False, encoder_channels: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.new_order = new_order
        self.norm = GroupNorm(GROUPS, channels)
        self.qkv = PointwiseLinear(channels, 3 * channels)
        if encoder_channels is not None:
            self.encoder_kv = PointwiseLinear(encoder_channels, 2 * channels)
        self.proj_out = zeroed(PointwiseLinear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, channels, H, W) and the text tokens (N, S, encoder_channels) to the shape of `x`."""
        qkv = self.qkv(image_to_tokens(self.norm(x)))
        q, k, v = split_together(qkv, 3, self.heads) if self.new_order else split_heads(qkv, 3, self.heads)
        if context is not None:
            text_k, text_v = split_heads(self.encoder_kv(context), 2, self.heads)
            k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        attended = ops.attention(q, k, v).transpose(1, 2).flatten(2)
        return x + tokens_to_image(self.proj_out(attended), like=x)


def split_heads(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, S, heads * parts * D), the parts of one head beside each other, to `parts` of (B, heads, S, D)."""
    return projected.unflatten(-1, (heads, parts, -1)).permute(3, 0, 2, 1, 4).unbind()


def split_together(projected: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, S, parts * heads * D), the heads of one part beside each other, to `parts` of (B, heads, S, D)."""
    return projected.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class Stage(nn.Sequential):
    """Layers one after the other, each given of the time embedding and the text what it takes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = checkpointing.run(layer, x, emb, enabled=self.gradient_checkpointing)
            elif isinstance(layer, AttentionBlock):
                x = checkpointing.run(layer, x, context, enabled=self.gradient_checkpointing)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class Blocks:
    """What all the blocks of a network share; fields are those of its configuration."""

    emb_channels: int
    dropout: float
    use_scale_shift_norm: bool
    resblock_updown: bool
    conv_resample: bool
    num_head_channels: int
    use_new_attention_order: bool
    encoder_channels: int | None

    def res(self, in_channels: int, out_channels: int, resample: nn.Module | None = None) -> ResBlock:
        return ResBlock(
            in_channels,
            out_channels,
            self.emb_channels,
            dropout=self.dropout,
            scale_shift=self.use_scale_shift_norm,
            resample=resample,
        )

    def attention(self, channels: int, num_heads: int) -> AttentionBlock:
        """With `num_heads` heads where the configuration states no channels per head."""
        per_head = self.num_head_channels
        heads = num_heads if per_head == -1 else channels // max(per_head, 1)
        fits = heads >= 1 and channels % heads == 0 and channels // heads in HEAD_DIMS
        if not fits or per_head not in (-1, channels // heads):
            raise ConfigError(
                f"num_heads={num_heads} and num_head_channels={per_head} do not fit attention over "
                f"{channels} channels; divide these into heads of a multiple of 8 up to 256, or of 512"
            )
        return AttentionBlock(
            channels,
            heads,
            new_order=self.use_new_attention_order,
            encoder_channels=self.encoder_channels,
        )

    def down(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, Downsample(channels, use_conv=False))
        return Downsample(channels, self.conv_resample)

    def up(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self.res(channels, channels, Upsample(channels, use_conv=False))
        return Upsample(channels, self.conv_resample)


def zeroed(layer: nn.Module) -> nn.Module:
    """`layer` with every parameter 0: what ends a residual branch starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
