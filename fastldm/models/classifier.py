"""The classifier of classifier guidance (Dhariwal & Nichol 2021, section 4): ADM's way down, then a pooling.
It is trained on x_t ~ q(x_t | x_0) and is told t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm import ops
from fastldm.errors import ConfigError, InputError
from fastldm.models.adm import ADMNetwork
from fastldm.models.adm_blocks import GROUPS, PointwiseLinear, split_together, zeroed
from fastldm.models.base import configurable
from fastldm.models.outputs import Output
from fastldm.nn import GroupNorm

_POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
_SPATIAL_WIDTH = 2048


@dataclass
class ClassifierOutput(Output):
    """logits: (B, out_channels)."""

    logits: Tensor


class ADMClassifier(ADMNetwork):
    """Classes of noisy pictures or latents, with the parameters of OpenAI's classifiers.

    Fields have the names of guided-diffusion's EncoderUNetModel and the defaults of its command line; those
    not listed are as in `ADMUNet`.

    Args:
        image_size: side of the square input. Only pooling by attention needs just this one, as it has a
            position for each place of the last feature map.
        model_channels, num_res_blocks: `--classifier_width` and `--classifier_depth` on the command line.
        out_channels: how many classes there are.
        num_head_channels: channels per head, also of the pooling.
        pool: "attention"; "adaptive", the mean of the last feature map; or "spatial" and "spatial_v2", a
            perceptron over the means of all of them.

    Raises:
        ConfigError: for fields that do not fit together.
    """

    @configurable
    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 3,
        model_channels: int = 128,
        out_channels: int = 1000,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        conv_resample: bool = True,
        num_heads: int = 1,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
        pool: str = "attention",
    ) -> None:
        super().__init__()
        if pool not in _POOLS:
            raise ConfigError(f"pool={pool!r}; accepted are {', '.join(_POOLS)}")
        if pool == "attention" and num_head_channels == -1:
            raise ConfigError("pool='attention' needs num_head_channels, which is -1")
        blocks = self._make_blocks(new_order=use_new_attention_order)
        widths = self._build_encoder(blocks, in_channels)
        last, everything = widths[-1], sum(widths) + widths[-1]
        if pool == "attention":
            places = (image_size // self._size_factor()) ** 2
            layers = [
                GroupNorm(GROUPS, last, activation="silu"),
                nn.Identity(),
                AttentionPool2d(places, last, num_head_channels, out_channels),
            ]
        elif pool == "adaptive":
            layers = [
                GroupNorm(GROUPS, last, activation="silu"),
                nn.Identity(),
                nn.AdaptiveAvgPool2d(1),
                zeroed(nn.Conv2d(last, out_channels, 1)),
                nn.Flatten(),
            ]
        elif pool == "spatial":
            layers = [
                nn.Linear(everything, _SPATIAL_WIDTH),
                nn.ReLU(),
                nn.Linear(_SPATIAL_WIDTH, out_channels),
            ]
        else:
            layers = [
                nn.Linear(everything, _SPATIAL_WIDTH),
                GroupNorm(GROUPS, _SPATIAL_WIDTH, activation="silu"),
                nn.Identity(),
                nn.Linear(_SPATIAL_WIDTH, out_channels),
            ]
        self.out = nn.Sequential(*layers)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> ClassifierOutput | tuple[Tensor]:
        """Logits of x_t.

        Args:
            sample: (B, in_channels, H, W); H and W are `image_size` where the pooling is by attention.
            timestep: a number, or a tensor of one or B of them.

        Raises:
            InputError: for another size.
        """
        self._check_sample(sample)
        side = self.config.image_size
        if self.config.pool == "attention" and tuple(sample.shape[2:]) != (side, side):
            raise InputError(
                f"sample {tuple(sample.shape)}, but this classifier takes pictures {side}x{side}"
            )
        emb = self._embed_time(timestep, sample)
        maps = self._encode(sample, emb)
        hidden = self.middle_block(maps[-1], emb)
        if self.config.pool.startswith("spatial"):
            hidden = torch.cat([x.mean(dim=(2, 3)) for x in (*maps, hidden)], dim=1)
        logits = self.out(hidden)
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
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.empty(channels, places + 1))
        nn.init.normal_(self.positional_embedding, std=channels**-0.5)
        self.qkv_proj = PointwiseLinear(channels, 3 * channels)
        self.c_proj = PointwiseLinear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out_features)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding
        q, k, v = split_together(self.qkv_proj(x.transpose(1, 2)), 3, self.heads)
        pooled = ops.attention(q[:, :, :1], k, v)
        return self.c_proj(pooled.flatten(1))
