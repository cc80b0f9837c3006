"""The KL first stage (Rombach et al. 2022; Kingma & Welling 2014) with diffusers' parameter names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastldm.models.autoencoder_blocks import Decoder, DecoderOutput, Encoder, check_activation
from fastldm.models.base import Model, configurable
from fastldm.models.outputs import Output


class DiagonalGaussianDistribution:
    """Normal distribution with a diagonal covariance per picture.

    Args:
        parameters: (B, 2C, h, w): mean, then log-variance, which is clamped to [-30, 20].
        deterministic: no variance; samples are the mean, KL and negative log-likelihood 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Draw (B, C, h, w). With a list of generators, picture i draws from the i-th."""
        return self.mean + self.std * _randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        """The mean, (B, C, h, w)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats, (B,); `other` None is the standard normal."""
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device, dtype=self.mean.dtype)
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() + self.var
            terms = distance / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample` (B, C, h, w) in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(len(self.mean), device=self.mean.device, dtype=self.mean.dtype)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))


@dataclass
class AutoencoderKLOutput(Output):
    """`latent_dist`: the posterior q(z | picture)."""

    latent_dist: DiagonalGaussianDistribution


class AutoencoderKL(Model):
    """Autoencoder with a Gaussian latent; fields of the configuration as in diffusers.

    Args:
        block_out_channels: channels per resolution, finest first; the latent is 2^(len - 1) times smaller.
        sample_size: side of the training pictures, an int or (height, width); tiles have this size.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions around the latent.
        scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: kept for pipelines that read
        them.
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
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        check_activation(act_fn)
        shared = {
            "widths": block_out_channels,
            "layers_per_block": layers_per_block,
            "groups": norm_num_groups,
            "mid_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(in_channels, 2 * latent_channels, block_types=down_block_types, **shared)
        self.decoder = Decoder(latent_channels, out_channels, block_types=up_block_types, **shared)
        moments = 2 * latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        self.use_slicing = False
        self.use_tiling = False
        side = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.tile_sample_min_size = side
        self.tile_latent_min_size = side // 2 ** (len(block_out_channels) - 1)
        self.tile_overlap_factor = 0.25

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that `encode` gives."""
        return self.config.latent_channels

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent position, along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def enable_slicing(self, enabled: bool = True) -> None:
        """Encode and decode one picture at a time: the same result with the memory of a batch of one."""
        self.use_slicing = enabled

    def disable_slicing(self) -> None:
        self.enable_slicing(False)

    def enable_tiling(self, enabled: bool = True) -> None:
        """Encode and decode pictures larger than `sample_size` in overlapping, blended tiles of that size.

        Memory no longer grows with the picture; the result differs a little from that without tiles, because
        group norm and attention see one tile at a time.
        """
        self.use_tiling = enabled

    def disable_tiling(self) -> None:
        self.enable_tiling(False)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Pictures (B, in_channels, H, W) to the posterior over latents (B, latent_channels, h, w)."""
        posterior = DiagonalGaussianDistribution(self._sliced(self._encode, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, latent_channels, h, w) to pictures `sample` (B, out_channels, H, W).

        `generator` is taken because pipelines pass it to any first stage; decoding here draws nothing.
        """
        sample = self._sliced(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode pictures (B, in_channels, H, W), take the posterior's mean or a sample of it, decode.

        The output also carries `latent_dist`, for the KL term (not in the tuple).
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        decoded = self.decode(z).sample
        return DecoderOutput(sample=decoded, latent_dist=posterior) if return_dict else (decoded,)

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.use_slicing and len(x) > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            return self._tiled(self._encode_tile, x, self.tile_sample_min_size, self.tile_latent_min_size)
        return self._encode_tile(x)

    def _encode_tile(self, x: Tensor) -> Tensor:
        moments = self.encoder(x)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            return self._tiled(self._decode_tile, z, self.tile_latent_min_size, self.tile_sample_min_size)
        return self._decode_tile(z)

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _tiled(self, function: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int) -> Tensor:
        """Apply `function` to overlapping tiles of `size`, whose results have `out_size`, and blend the
        seams."""
        stride = int(size * (1 - self.tile_overlap_factor))
        overlap = int(out_size * self.tile_overlap_factor)
        kept = out_size - overlap
        above: list[Tensor] = []
        rows = []
        for top in range(0, x.shape[2], stride):
            row: list[Tensor] = []
            for left in range(0, x.shape[3], stride):
                tile = function(x[:, :, top : top + size, left : left + size])
                if above:
                    tile = _blend(above[len(row)], tile, overlap, dim=2)
                if row:
                    tile = _blend(row[-1], tile, overlap, dim=3)
                row.append(tile)
            rows.append(torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3))
            above = row
        return torch.cat(rows, dim=2)


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the end of `before` into the start of `tile` along `dim`, linearly over `extent`
    positions."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if extent == 0:
        return tile
    weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent
    weight = weight.view([-1] + [1] * (tile.dim() - 1 - dim))
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start, rest = tile.split([extent, tile.shape[dim] - extent], dim=dim)
    return torch.cat([end * (1 - weight) + start * weight, rest], dim=dim)


def _randn_like(x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise, drawn on the generator's device, so a CPU seed gives the same picture
    everywhere."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    parts = [
        torch.randn(x[:1].shape, generator=g, device=g.device, dtype=x.dtype).to(x.device) for g in generator
    ]
    return torch.cat(parts)
