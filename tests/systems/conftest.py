"""Fixtures: pipelines with random weights that sample in milliseconds."""

from __future__ import annotations

import pytest
import torch

from fastldm.diffusion import NoiseSchedule
from fastldm.models import (
    AutoencoderKL,
    LDMBertModel,
    SpatialConditioner,
    TextConditioner,
    Tokenizer,
    UNet2DConditionModel,
    VQModel,
)
from fastldm.systems import LatentDiffusionPipeline

# The peer's class takes a window of 77 tokens and a first stage of factor 8 for granted.
_WINDOW = 77
_STAGE = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.fixture(scope="session")
def pipeline():
    """make(conditioner=None, *, first_stage="vq", schedule=None, context_dim=16, **options) -> pipeline."""
    return _pipeline


@pytest.fixture(scope="session")
def latents():
    """make(batch) -> the same first noise every time."""
    return lambda batch: torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(11))


def _text_conditioner():
    tokenizer = Tokenizer.from_captions(["a red circle", "a star"], max_length=_WINDOW)
    encoder = LDMBertModel(
        vocab_size=tokenizer.vocab_size,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=16,
        init_std=0.5,
    )
    return TextConditioner(encoder, tokenizer).eval()


def _pipeline(conditioner=None, *, first_stage="vq", schedule=None, context_dim=16, **options):
    spatial = isinstance(conditioner, SpatialConditioner)
    concat = conditioner.config.out_channels if spatial else 0
    down, up = ("DownBlock2D", "UpBlock2D") if spatial else ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    schedule = schedule or NoiseSchedule.scaled_linear(steps_offset=1, set_alpha_to_one=False)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4 + concat,
        out_channels=schedule.output_channels(4),
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", down),
        up_block_types=(up, "UpBlock2D"),
        mid_block_type="UNetMidBlock2D" if spatial else "UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        cross_attention_dim=context_dim,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return LatentDiffusionPipeline(
        _mixing(AutoencoderKL(**_STAGE) if first_stage == "kl" else VQModel(**_STAGE, num_vq_embeddings=16)),
        conditioner or _text_conditioner(),
        _mixing(unet),
        schedule,
        **options,
    )


def _mixing(model):
    """Weights twice as large as fresh ones, or conditions hardly show in what a UNet puts out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model.eval()
