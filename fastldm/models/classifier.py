"""The classifier of classifier guidance (Dhariwal & Nichol 2021, section 4): the way down of a UNet, then
attention pooling. It is trained on x_t ~ q(x_t | x_0) and is told t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError, InputError
from fastldm.models.base import Model, configurable
from fastldm.models.outputs import Output
from fastldm.models.unet_blocks import (
    AttentionSettings,
    Condition,
    DownBlock2D,
    MidBlock2D,
    ResnetSettings,
)
from fastldm.nn import Downsample2D, GroupNorm, TimestepEmbedding, Timesteps

_DOWN_BLOCKS = {"DownBlock2D": None, "AttnDownBlock2D": "self"}


@dataclass
class ClassifierOutput(Output):
    """logits: (B, num_classes)."""

    logits: Tensor


class NoisyClassifier(Model):
    """Classes of noisy pictures or latents.

    Fields and keys of the way down are those of diffusers' UNet2DModel (with `attn_norm_num_groups` given
    where the time embedding scales and shifts). Between resolutions there are convolutions of stride 2, not
    ADM's residual blocks, so OpenAI's classifiers do not load.

    Args:
        sample_size: side of the square input; the pooling has a position for each place of its last stage.
        num_classes: how many logits there are.
        down_block_types: "DownBlock2D" or, with self-attention, "AttnDownBlock2D", per stage.
        attention_head_dim: channels per head, also of the pooling; a divisor of the widths with attention.
        resnet_time_scale_shift: "scale_shift" (adaptive group norm, the paper's) or "default".

    Raises:
        ConfigError: for fields that do not fit together.
    """

    @configurable
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        down_block_types: Sequence[str] = (
            "DownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
            "AttnDownBlock2D",
        ),
        block_out_channels: Sequence[int] = (128, 256, 384, 512),
        layers_per_block: int = 2,
        dropout: float = 0.0,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        self._check(widths)
        first, last = widths[0], widths[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        resnet = ResnetSettings(4 * first, norm_num_groups, norm_eps, dropout, resnet_time_scale_shift)
        attention = AttentionSettings(
            head_dim=attention_head_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            cross_attention_dim=0,
            use_linear_projection=False,
            only_cross_attention=False,
        )
        self.down_blocks = nn.ModuleList()
        for i, (kind, width) in enumerate(zip(down_block_types, widths)):
            resnets = [
                resnet.build(width if j else widths[max(i - 1, 0)], width) for j in range(layers_per_block)
            ]
            attentions = attention.build(_DOWN_BLOCKS[kind], width, [1] * layers_per_block)
            downsampler = Downsample2D(width, padding=1) if i < len(widths) - 1 else None
            self.down_blocks.append(DownBlock2D(resnets, attentions, downsampler))
        middle = [resnet.build(last, last) for _ in range(2)]
        self.mid_block = MidBlock2D(middle, attention.build("self", last, [1]))
        self.conv_norm_out = GroupNorm(norm_num_groups, last, eps=norm_eps, activation="silu")
        places = (sample_size // 2 ** (len(widths) - 1)) ** 2
        self.pool = AttentionPool2d(places, last, attention_head_dim, num_classes)

    def _check(self, widths: list[int]) -> None:
        config = self.config
        kinds = list(config.down_block_types)
        if len(kinds) != len(widths) or not set(kinds) <= set(_DOWN_BLOCKS):
            known = " or ".join(_DOWN_BLOCKS)
            raise ConfigError(f"down_block_types {kinds}: give {len(widths)}, one per width, of {known}")
        if any(width % config.norm_num_groups for width in widths):
            raise ConfigError(f"norm_num_groups {config.norm_num_groups} does not divide the widths {widths}")
        smallest = 2 ** (len(widths) - 1)
        if not isinstance(config.sample_size, int) or config.sample_size % smallest:
            raise ConfigError(f"sample_size={config.sample_size!r}: use a multiple of {smallest}")
        if config.attention_head_dim % 8 or widths[-1] % config.attention_head_dim:
            raise ConfigError(
                f"attention_head_dim={config.attention_head_dim}: use a multiple of 8 that divides "
                f"{widths[-1]}, the last width"
            )

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> ClassifierOutput | tuple[Tensor]:
        """Logits of x_t.

        Args:
            sample: (B, in_channels, sample_size, sample_size).
            timestep: a number, or a tensor of one or B of them.

        Raises:
            InputError: for another size.
        """
        channels, side = self.config.in_channels, self.config.sample_size
        if sample.ndim != 4 or tuple(sample.shape[1:]) != (channels, side, side):
            raise InputError(
                f"input {tuple(sample.shape)}, but this classifier takes (B, {channels}, {side}, {side})"
            )
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        condition = Condition(
            self.time_embedding(self.time_proj(timesteps).to(sample.dtype)), None, None, None
        )
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden = block(hidden, condition)[-1]
        logits = self.pool(self.conv_norm_out(self.mid_block(hidden, condition)))
        return ClassifierOutput(logits) if return_dict else (logits,)


class AttentionPool2d(nn.Module):
    """A feature map to one vector: its mean attends to itself and to every place (Radford et al. 2021, 2.4).

    Args:
        places: height times width of the feature map.
        channels, head_dim: of the feature map and of each attention head.
        out_features: width of the result.
    """

    def __init__(self, places: int, channels: int, head_dim: int, out_features: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.positional_embedding = nn.Parameter(torch.empty(channels, places + 1))
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)
        self.qkv_proj = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_features)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv_proj(x.transpose(1, 2)).chunk(3, dim=-1)
        )
        pooled = ops.attention(q[:, :, :1], k, v)
        return self.c_proj(pooled.flatten(1))
