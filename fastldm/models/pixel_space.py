"""Diffusion without a first stage: "LDM-1" of Rombach et al. 2022, section 4.1."""

from __future__ import annotations

from torch import Tensor

from fastldm.models.autoencoder_blocks import DecoderOutput
from fastldm.models.base import Model, configurable
from fastldm.models.vq_model import VQEncoderOutput


class PixelSpace(Model):
    """The identity in the place of a first stage: its latents are the pictures. It has no weights.

    Args:
        latent_channels: of the pictures.
        scaling_factor: multiplies the pictures on which diffusion runs.
    """

    downsample_factor = 1

    @configurable
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0) -> None:
        super().__init__()

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Pictures (B, latent_channels, H, W) in [-1, 1], as they are, under the name of latents."""
        return VQEncoderOutput(latents=x) if return_dict else (x,)

    def decode(self, h: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """What diffusion made of pictures (B, latent_channels, H, W), clamped to [-1, 1]."""
        sample = h.clamp(-1, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode pictures (B, latent_channels, H, W)."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)
