"""The stages of the UNet: down to the next resolution, the middle, up again.

diffusers has a class for each kind of attention a stage can hold. Here the kind is an argument, and the
tables below map the names of its classes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastldm.errors import ConfigError
from fastldm.nn import Attention, Downsample2D, ResnetBlock2D, Transformer2DModel, Upsample2D, checkpointing

DOWN_BLOCKS = {"DownBlock2D": None, "AttnDownBlock2D": "self", "CrossAttnDownBlock2D": "cross"}
UP_BLOCKS = {"UpBlock2D": None, "AttnUpBlock2D": "self", "CrossAttnUpBlock2D": "cross"}
MID_BLOCKS = {"UNetMidBlock2D": None, "UNetMidBlock2DCrossAttn": "cross", None: None}


@dataclass(frozen=True)
class ResnetSettings:
    """What all residual blocks of a UNet share."""

    temb_channels: int
    groups: int
    eps: float
    dropout: float
    time_embedding_norm: str

    def build(self, in_channels: int, out_channels: int, output_scale_factor: float = 1.0) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            groups=self.groups,
            eps=self.eps,
            dropout=self.dropout,
            time_embedding_norm=self.time_embedding_norm,
            output_scale_factor=output_scale_factor,
        )


@dataclass(frozen=True)
class AttentionSettings:
    """The attention of one stage, of whichever kind.

    Args:
        head_dim: channels per head for "self"; but the number of heads for "cross", where the peer's field
            `attention_head_dim` got that meaning by mistake and kept it.
    """

    head_dim: int
    groups: int
    eps: float
    cross_attention_dim: int
    use_linear_projection: bool
    only_cross_attention: bool

    def build(self, kind: str | None, channels: int, layers: Sequence[int]) -> nn.ModuleList | None:
        """One attention module per entry of `layers`, which has the number of transformer blocks in each.

        `kind` is None (returns None), "self" (an attention layer) or "cross" (a transformer).
        """
        if kind is None:
            return None
        if channels % self.head_dim:
            what = "channels per head" if kind == "self" else "heads"
            raise ConfigError(
                f"attention_head_dim {self.head_dim} ({what}) does not divide {channels} channels"
            )
        return nn.ModuleList(
            self._self_attention(channels) if kind == "self" else self._transformer(channels, n)
            for n in layers
        )

    def _self_attention(self, channels: int) -> Attention:
        return Attention(
            channels,
            heads=channels // self.head_dim,
            dim_head=self.head_dim,
            bias=True,
            norm_num_groups=self.groups,
            eps=self.eps,
            residual_connection=True,
        )

    def _transformer(self, channels: int, num_layers: int) -> Transformer2DModel:
        return Transformer2DModel(
            self.head_dim,
            channels // self.head_dim,
            in_channels=channels,
            cross_attention_dim=self.cross_attention_dim,
            num_layers=num_layers,
            norm_num_groups=self.groups,
            use_linear_projection=self.use_linear_projection,
            only_cross_attention=self.only_cross_attention,
        )


@dataclass(frozen=True)
class Condition:
    """What every stage sees beside the feature map: (B, temb_channels), (B, S_k, D) and two (B, S) masks."""

    temb: torch.Tensor
    context: torch.Tensor | None
    attention_mask: torch.Tensor | None
    context_mask: torch.Tensor | None


class _Stage(nn.Module):
    """Residual blocks, each followed by its attention where the stage has any."""

    def __init__(self, resnets: list[ResnetBlock2D], attentions: nn.ModuleList | None):
        super().__init__()
        self.gradient_checkpointing = False
        self.attentions = attentions
        self.resnets = nn.ModuleList(resnets)

    def _resnet(self, index: int, hidden: torch.Tensor, condition: Condition) -> torch.Tensor:
        return checkpointing.run(
            self.resnets[index], hidden, condition.temb, enabled=self.gradient_checkpointing
        )

    def _attend(self, index: int, hidden: torch.Tensor, condition: Condition) -> torch.Tensor:
        if self.attentions is None:
            return hidden
        attention = self.attentions[index]
        if isinstance(attention, Transformer2DModel):  # checkpoints its own blocks
            return attention(hidden, condition.context, condition.attention_mask, condition.context_mask)
        return checkpointing.run(attention, hidden, enabled=self.gradient_checkpointing)


class DownBlock2D(_Stage):
    """Returns every intermediate feature map, for the skip connections, the last being the output."""

    def __init__(
        self,
        resnets: list[ResnetBlock2D],
        attentions: nn.ModuleList | None,
        downsampler: Downsample2D | None,
    ):
        super().__init__(resnets, attentions)
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])

    def forward(self, hidden: torch.Tensor, condition: Condition) -> list[torch.Tensor]:
        outputs = []
        for i in range(len(self.resnets)):
            hidden = self._attend(i, self._resnet(i, hidden, condition), condition)
            outputs.append(hidden)
        if self.downsamplers is not None:
            outputs.append(self.downsamplers[0](hidden))
        return outputs


class MidBlock2D(_Stage):
    """A residual block and, with attention, that and a second residual block."""

    def forward(self, hidden: torch.Tensor, condition: Condition) -> torch.Tensor:
        hidden = self._resnet(0, hidden, condition)
        for i in range(1, len(self.resnets)):
            hidden = self._resnet(i, self._attend(i - 1, hidden, condition), condition)
        return hidden


class UpBlock2D(_Stage):
    """Takes one skip connection per residual block, its channels after those that come from below."""

    def __init__(
        self, resnets: list[ResnetBlock2D], attentions: nn.ModuleList | None, upsampler: Upsample2D | None
    ):
        super().__init__(resnets, attentions)
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, hidden: torch.Tensor, skips: list[torch.Tensor], condition: Condition) -> torch.Tensor:
        """`skips` is a stack, used up from its end; its next entry then has the height and width to reach."""
        for i in range(len(self.resnets)):
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = self._attend(i, self._resnet(i, hidden, condition), condition)
        if self.upsamplers is not None:
            # an odd size was rounded up on the way down, so doubling would overshoot it
            hidden = self.upsamplers[0](hidden, skips[-1].shape[-2:])
        return hidden
