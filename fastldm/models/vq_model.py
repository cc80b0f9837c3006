"""The VQ-VAE first stage (van den Oord et al. 2017; Esser et al. 2021) with diffusers' parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.models.autoencoder_blocks import Decoder, DecoderOutput, Encoder, check_activation
from fastldm.models.base import Model, configurable
from fastldm.models.outputs import Output
from fastldm.nn.vector_quantizer import VectorQuantizer


@dataclass
class VQEncoderOutput(Output):
    """`latents` (B, vq_embed_dim, h, w), before quantisation."""

    latents: Tensor


class VQModel(Model):
    """Autoencoder with a discrete latent; fields of the configuration as in diffusers.

    `encode` gives the latents before quantisation, on which diffusion runs; `decode` quantises first. The
    quantizer's loss puts beta on the commitment term, as the paper does; `legacy` of `model.quantize` is the
    other order, in which diffusers trains. Set on it, too: an EMA codebook (`model.quantize.enable_ema`).

    Args:
        block_out_channels: channels per resolution, finest first; the latent is 2^(len - 1) times smaller.
        num_vq_embeddings: number of codes.
        vq_embed_dim: length of a code; None means latent_channels.
        scaling_factor: multiplies the latents on which diffusion runs.
        lookup_from_codebook: `decode(..., force_not_quantize=True)` takes indices and looks them up.
        sample_size, force_upcast: kept for pipelines that read them.
    """

    @configurable
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ):
        super().__init__()
        check_activation(act_fn)
        if norm_type != "group":
            raise ConfigError(f"norm_type {norm_type!r} is not supported by VQModel; accepted: 'group'")
        vq_embed_dim = latent_channels if vq_embed_dim is None else vq_embed_dim
        shared = {
            "widths": block_out_channels,
            "layers_per_block": layers_per_block,
            "groups": norm_num_groups,
            "mid_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(in_channels, latent_channels, block_types=down_block_types, **shared)
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, vq_embed_dim)
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, block_types=up_block_types, **shared)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that `encode` gives."""
        config = self.config
        return config.latent_channels if config.vq_embed_dim is None else config.vq_embed_dim

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Picture (B, in_channels, H, W) to latents (B, vq_embed_dim, h, w), not yet quantised."""
        latents = self.quant_conv(self.encoder(x))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Latents to pictures.

        Args:
            h: (B, vq_embed_dim, h, w), quantised first. With `force_not_quantize` they are decoded as they
                are, or, if the configuration says `lookup_from_codebook`, they are code indices.
            shape: (B, h, w, vq_embed_dim) of the looked-up latents.

        Returns:
            `sample` (B, out_channels, H, W); `commit_loss`, float32 scalar, or zeros (B,) if not quantised;
            `indices` of the codes chosen, (B * h * w,) (not in the tuple).
        """
        indices = None
        if not force_not_quantize:
            quantized, commit_loss, (_, _, indices) = self.quantize(h)
        else:
            quantized = self.quantize.get_codebook_entry(h, shape) if self.config.lookup_from_codebook else h
            commit_loss = torch.zeros(h.shape[0], device=h.device, dtype=h.dtype)
        sample = self.decoder(self.post_quant_conv(quantized))
        if not return_dict:
            return sample, commit_loss
        return DecoderOutput(sample=sample, commit_loss=commit_loss, indices=indices)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Encode, quantise and decode pictures (B, in_channels, H, W); see `decode`."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _exported_state_dict(self) -> dict[str, Tensor]:
        # The averages of an EMA codebook belong to the training run; diffusers' VQModel has no such tensors.
        state = self.state_dict()
        return {key: value for key, value in state.items() if not key.startswith("quantize.ema_")}
