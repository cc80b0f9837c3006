"""Encoder and decoder of the first stages, shared by AutoencoderKL and VQModel; parameter names of
diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.models.outputs import Output
from fastldm.nn import Attention, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, checkpointing

if TYPE_CHECKING:
    from fastldm.models.autoencoder_kl import DiagonalGaussianDistribution

_EPS = 1e-6  # of every group norm in a first stage

_DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass
class DecoderOutput(Output):
    """`sample`: pictures (B, out_channels, H, W). The rest is what a loss needs, filled where it exists.

    `commit_loss`: float32 scalar of the quantizer; `indices`: int64 codes; `latent_dist`: the posterior.
    """

    sample: Tensor
    commit_loss: Tensor | None = None
    indices: Tensor | None = None
    latent_dist: DiagonalGaussianDistribution | None = None


def _resnet(in_channels: int, out_channels: int, groups: int) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=in_channels, out_channels=out_channels, temb_channels=None, groups=groups, eps=_EPS
    )


def _attention(channels: int, groups: int) -> Attention:
    """Self-attention over all positions with a single head, as everywhere in a first stage."""
    return Attention(
        channels,
        heads=1,
        dim_head=channels,
        bias=True,
        norm_num_groups=groups,
        eps=_EPS,
        residual_connection=True,
    )


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention if asked for, then an optional resampling
    layer.

    The four block types of diffusers' autoencoders are this with and without attention and with `resample`
    "down", "up" or None: (B, in, H, W) to (B, out, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        groups: int,
        attention: bool,
        resample: str | None,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(_resnet(a, b, groups) for a, b in pairwise(widths))
        self.attentions = None
        if attention:
            self.attentions = nn.ModuleList(_attention(out_channels, groups) for _ in range(num_layers))
        self.downsamplers = self.upsamplers = None
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels)])

    def forward(self, hidden: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            hidden = resnet(hidden)
            if self.attentions is not None:
                hidden = self.attentions[i](hidden)
        for layer in self.downsamplers or self.upsamplers or ():
            hidden = layer(hidden)
        return hidden


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(self, channels: int, *, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(channels, groups)] if attention else [])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.resnets[0](hidden)
        for attention in self.attentions:
            hidden = attention(hidden)
        return self.resnets[1](hidden)


class Encoder(nn.Module):
    """Picture (B, in_channels, H, W) to features (B, out_channels, H / f, W / f), f = 2^(len(widths) - 1).

    Args:
        block_types: one of DownEncoderBlock2D, AttnDownEncoderBlock2D per resolution, finest first.
        widths: channels per resolution, finest first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block_types: Sequence[str],
        widths: Sequence[int],
        layers_per_block: int,
        groups: int,
        mid_attention: bool,
    ):
        super().__init__()
        with_attention = _check_blocks("down_block_types", block_types, _DOWN_BLOCKS, widths, groups)
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            Stage(
                inputs[i],
                widths[i],
                num_layers=layers_per_block,
                groups=groups,
                attention=with_attention[i],
                resample="down" if i < len(widths) - 1 else None,
            )
            for i in range(len(widths))
        )
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=mid_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=_EPS, activation="silu")
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.conv_in(sample)
        for block in (*self.down_blocks, self.mid_block):
            hidden = checkpointing.run(block, hidden, enabled=self.gradient_checkpointing)
        return self.conv_out(self.conv_norm_out(hidden))


class Decoder(nn.Module):
    """Latent (B, in_channels, h, w) to picture (B, out_channels, h * f, w * f), f = 2^(len(widths) - 1).

    Args:
        block_types: one of UpDecoderBlock2D, AttnUpDecoderBlock2D per resolution, coarsest first.
        widths: channels per resolution, finest first, as for `Encoder`.
        layers_per_block: that of the encoder; the decoder has one residual block more per resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block_types: Sequence[str],
        widths: Sequence[int],
        layers_per_block: int,
        groups: int,
        mid_attention: bool,
    ):
        super().__init__()
        with_attention = _check_blocks("up_block_types", block_types, _UP_BLOCKS, widths, groups)
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=mid_attention)
        outputs = list(reversed(widths))
        inputs = [outputs[0], *outputs[:-1]]
        self.up_blocks = nn.ModuleList(
            Stage(
                inputs[i],
                outputs[i],
                num_layers=layers_per_block + 1,
                groups=groups,
                attention=with_attention[i],
                resample="up" if i < len(widths) - 1 else None,
            )
            for i in range(len(widths))
        )
        self.conv_norm_out = GroupNorm(groups, widths[0], eps=_EPS, activation="silu")
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        hidden = self.conv_in(sample)
        for block in (self.mid_block, *self.up_blocks):
            hidden = checkpointing.run(block, hidden, enabled=self.gradient_checkpointing)
        return self.conv_out(self.conv_norm_out(hidden))


def check_activation(act_fn: str) -> None:
    """Raise ConfigError unless `act_fn` names SiLU, which every published first stage uses."""
    if act_fn not in ("silu", "swish"):
        raise ConfigError(f"act_fn {act_fn!r} is not supported in a first stage; accepted: 'silu', 'swish'")


def _check_blocks(
    field: str, types: Sequence[str], known: dict[str, bool], widths: Sequence[int], groups: int
) -> list[bool]:
    """Whether each block has attention; ConfigError where the fields do not fit together."""
    for block_type in types:
        if block_type not in known:
            raise ConfigError(f"{field} holds {block_type!r}; accepted: {', '.join(known)}")
    if len(types) != len(widths):
        raise ConfigError(
            f"{field} has {len(types)} entries and block_out_channels {len(widths)}; "
            "give one of each per resolution"
        )
    for width in widths:
        if width % groups:
            raise ConfigError(
                f"block_out_channels {width} cannot be split into norm_num_groups={groups} groups"
            )
    return [known[block_type] for block_type in types]
