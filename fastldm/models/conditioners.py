"""Conditioners: from what a user gives (captions, labels, pictures) to what a UNet takes.

Each has the same interface, so that training and sampling need not know which one they hold:

- `prepare(raw)` -> tensor (B, ...) that batches, drops out and moves between devices;
- `forward(tensor)` -> `Conditioning`, differentiable;
- `null_like(tensor)` -> the same shape, standing for "no condition";
- `components()` -> what a pipeline folder stores of it, by folder name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastldm.checks import described
from fastldm.errors import ConfigError, InputError
from fastldm.models.base import Model, configurable
from fastldm.models.captions import as_captions
from fastldm.models.text_transformer import LDMBertModel
from fastldm.models.tokenizer import Tokenizer


class Conditioning(NamedTuple):
    """context: (B, S, D) for cross-attention, or None; concat: (B, C, h, w) beside the latents, or None."""

    context: Tensor | None = None
    concat: Tensor | None = None


def predict(
    unet: nn.Module, x: Tensor, t: Tensor, context: Tensor | None = None, concat: Tensor | None = None
) -> Tensor:
    """The UNet's output at (x_t, t) under a `Conditioning`: the one way by which conditions reach a UNet.

    x (B, C, h, w), t int64 (B,) -> (B, out_channels, h, w).
    """
    if concat is not None:
        x = torch.cat([x, concat.to(x.dtype)], dim=1)
    return unet(x, t, encoder_hidden_states=context).sample


class TextConditioner(nn.Module):
    """Captions, through a tokenizer and a text encoder, to cross-attention context."""

    concat_channels = 0

    def __init__(self, text_encoder: LDMBertModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        positions, rows = text_encoder.config.max_position_embeddings, text_encoder.config.vocab_size
        if tokenizer.max_length > positions or tokenizer.vocab_size > rows:
            raise ConfigError(
                f"the tokenizer makes up to {tokenizer.max_length} tokens of {tokenizer.vocab_size} kinds, "
                f"the text encoder takes {positions} of {rows}; use the tokenizer it was trained with"
            )
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.register_buffer("null_ids", tokenizer(""), persistent=False)

    @property
    def context_dim(self) -> int:
        return self.text_encoder.config.d_model

    def prepare(self, raw: str | Sequence[str]) -> Tensor:
        """Caption(s) to token ids, int64 (B, S); "" is the null caption. See `Tokenizer`."""
        return self.tokenizer(as_captions("prompt", raw, at_least=0))

    def forward(self, ids: Tensor) -> Conditioning:
        return Conditioning(context=self.text_encoder(ids).last_hidden_state)

    def null_like(self, ids: Tensor) -> Tensor:
        return self.null_ids.to(ids.device).expand_as(ids)

    def components(self) -> dict[str, Model | Tokenizer]:
        return {"bert": self.text_encoder, "tokenizer": self.tokenizer}


class ClassConditioner(Model):
    """Class labels to one token of cross-attention context; label `num_classes` is the null condition."""

    concat_channels = 0

    @configurable
    def __init__(self, num_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)

    @property
    def context_dim(self) -> int:
        return self.config.embed_dim

    def prepare(self, raw: int | Sequence[int] | Tensor) -> Tensor:
        """Label(s) in [0, num_classes) to int64 (B,)."""
        last = self.config.num_classes - 1
        try:
            labels = torch.as_tensor(raw).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"class labels must be integers from 0 to {last}, not {raw!r}") from None
        if labels.numel() and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise InputError(f"class labels must be integers from 0 to {last}, not {labels.dtype}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= last:
            raise InputError(f"class labels {labels.tolist()}: this model knows 0 to {last}")
        return labels.to(torch.int64)

    def forward(self, labels: Tensor) -> Conditioning:
        return Conditioning(context=self.embedding(labels)[:, None])

    def null_like(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.config.num_classes)

    def components(self) -> dict[str, Model]:
        return {"conditioner": self}


class SpatialConditioner(Model):
    """Pictures or label maps, made smaller and mapped to other channels, beside the latents.

    LDM's SpatialRescaler: `n_stages` times resized by `multiplier`, then a 1x1 convolution (no bias unless
    `bias`). A picture of zeros is the null condition.
    """

    context_dim = None

    @configurable
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        n_stages: int = 1,
        multiplier: float = 0.5,
        method: str = "bilinear",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if method not in ("nearest", "bilinear", "bicubic", "area"):
            raise ConfigError(f"method={method!r} is not offered; use nearest, bilinear, bicubic or area")
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    @property
    def concat_channels(self) -> int:
        return self.config.out_channels

    def prepare(self, raw: Tensor) -> Tensor:
        """One picture (C, H, W) or a batch (B, C, H, W), in [-1, 1] or one-hot, to float32 (B, C, H, W)."""
        channels = self.config.in_channels
        fits = isinstance(raw, Tensor) and raw.ndim in (3, 4) and raw.shape[-3] == channels
        if not fits or 0 in raw.shape[-2:]:
            raise InputError(f"the condition must be a tensor (B, {channels}, H, W), not {described(raw)}")
        return raw.float().reshape(-1, *raw.shape[-3:])

    def forward(self, images: Tensor) -> Conditioning:
        images = images.to(self.dtype)
        for _ in range(self.config.n_stages):
            images = F.interpolate(images, scale_factor=self.config.multiplier, mode=self.config.method)
        return Conditioning(concat=self.channel_mapper(images))

    def null_like(self, images: Tensor) -> Tensor:
        return torch.zeros_like(images)

    def components(self) -> dict[str, Model]:
        return {"conditioner": self}


Conditioner = TextConditioner | ClassConditioner | SpatialConditioner
