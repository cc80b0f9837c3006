"""Layers over `fastldm.ops`, with the parameter names that diffusers gives its own."""

from __future__ import annotations

from fastldm.nn.attention import Attention
from fastldm.nn.embeddings import TimestepEmbedding, Timesteps, timestep_embedding
from fastldm.nn.normalization import GroupNorm
from fastldm.nn.packing import pack_weights, unpack_weights
from fastldm.nn.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from fastldm.nn.transformer import GEGLU, BasicTransformerBlock, FeedForward, Transformer2DModel
from fastldm.nn.vector_quantizer import VectorQuantizer

__all__ = [
    "GEGLU",
    "Attention",
    "BasicTransformerBlock",
    "Downsample2D",
    "FeedForward",
    "GroupNorm",
    "ResnetBlock2D",
    "TimestepEmbedding",
    "Timesteps",
    "Transformer2DModel",
    "Upsample2D",
    "VectorQuantizer",
    "pack_weights",
    "timestep_embedding",
    "unpack_weights",
]
