"""Residual convolution blocks and the resampling layers between resolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastldm.errors import ConfigError, InputError
from fastldm.nn.normalization import GroupNorm


class ResnetBlock2D(nn.Module):
    """(norm, SiLU, conv) twice around the time embedding, plus the input: (N, in, H, W) to (N, out, H, W).

    Args:
        temb_channels: width of the time embedding; None for a block without one (autoencoders).
        time_embedding_norm: "default" adds the projected embedding before the second norm; "scale_shift"
            modulates that norm's output with it (Dhariwal & Nichol 2021, adaptive group norm).
        output_scale_factor: the sum is divided by this.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        temb_channels: int | None = 512,
        dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-6,
        time_embedding_norm: str = "default",
        output_scale_factor: float = 1.0,
    ):
        super().__init__()
        if time_embedding_norm not in ("default", "scale_shift"):
            raise ConfigError(
                f"time_embedding_norm is {time_embedding_norm!r}; accepted are 'default' and 'scale_shift'"
            )
        if time_embedding_norm == "scale_shift" and temb_channels is None:
            raise ConfigError("time_embedding_norm 'scale_shift' needs temb_channels, which is None")
        out_channels = in_channels if out_channels is None else out_channels
        self.time_embedding_norm = time_embedding_norm
        self.output_scale_factor = output_scale_factor

        self.norm1 = GroupNorm(groups, in_channels, eps=eps, activation="silu")
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = None
        if temb_channels is not None:
            width = 2 * out_channels if time_embedding_norm == "scale_shift" else out_channels
            self.time_emb_proj = nn.Linear(temb_channels, width)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, activation="silu")
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """`temb` is (N, temb_channels), before its activation."""
        hidden = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is None:
            hidden = self.norm2(hidden)
        elif temb is None:
            raise InputError("this ResnetBlock2D was built with temb_channels and needs a time embedding")
        elif self.time_embedding_norm == "default":
            hidden = self.norm2(hidden, channel_bias=self.time_emb_proj(F.silu(temb)))
        else:
            scale, shift = self.time_emb_proj(F.silu(temb)).chunk(2, dim=1)
            hidden = self.norm2(hidden, scale=scale, shift=shift)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


class Downsample2D(nn.Module):
    """Halve height and width with a 3x3 convolution of stride 2.

    `padding=0` does not mean an unpadded convolution: as in the autoencoders of latent diffusion, one row and
    column of zeros is then added at the bottom and right only.
    """

    def __init__(self, channels: int, *, out_channels: int | None = None, padding: int = 1):
        super().__init__()
        self.padding = padding
        out_channels = channels if out_channels is None else out_channels
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling, by 2 or to `output_size` (H, W), then a 3x3 convolution."""

    def __init__(self, channels: int, *, out_channels: int | None = None):
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)

    def forward(
        self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        if output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        return self.conv(hidden_states)
