"""Sinusoidal timestep features and the small network that embeds them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastldm.errors import InputError


def timestep_embedding(
    timesteps: torch.Tensor,
    dim: int,
    *,
    flip_sin_to_cos: bool = False,
    freq_shift: float = 1.0,
    max_period: float = 10000.0,
) -> torch.Tensor:
    """Sinusoidal features of `timesteps` (N,), float32 (N, dim); Ho et al. 2020 after Vaswani et al. 2017.

    Frequency i of `dim // 2` is `max_period ** (-i / (dim // 2 - freq_shift))`. The first half is the sines,
    the second the cosines; `flip_sin_to_cos` swaps the halves. An odd `dim` ends in a zero column.
    """
    half = dim // 2
    # in the peers' order of operations: at timestep 1000 the last bit of a frequency shows in the features
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(exponent / (half - freq_shift))
    angles = timesteps.float()[:, None] * frequencies[None, :]
    halves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    features = torch.cat(halves, dim=-1)
    return F.pad(features, (0, 1)) if dim % 2 else features


class Timesteps(nn.Module):
    """`timestep_embedding` as a layer without parameters; its output is float32 in any model."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timestep_embedding(
            timesteps, self.num_channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, linear: (N, in_channels) to (N, time_embed_dim).

    With `cond_proj_dim`, a second input (N, cond_proj_dim), such as an embedded guidance scale, is projected
    without bias and added to the first.
    """

    def __init__(self, in_channels: int, time_embed_dim: int, *, cond_proj_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        if condition is not None:
            if self.cond_proj is None:
                raise InputError("a timestep condition was given to an embedding built without cond_proj_dim")
            sample = sample + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(sample)))
