"""Runs small enough to be repeated: 32x32 shapes, latents 4x16x16, a few thousand weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.vq_model import VQModel
from fastldm.training.config import FirstStageConfig, LatentDiffusionConfig, load_config

STAGE = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 8],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
RUN = {
    "max_steps": 6,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "data": {"size": 32, "length": 24, "kind": "one"},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
}
VQ = {
    **RUN,
    "gradient_accumulation_steps": 2,
    "model": {
        "kind": "vq",
        "config": {**STAGE, "num_vq_embeddings": 16},
        "ema_codebook_decay": 0.9,
        "revive_below": 0.5,
    },
}
LDM = {
    **RUN,
    "conditioner": {
        "kind": "text",
        "config": {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "head_dim": 8,
        },
    },
    "unet": {
        "block_out_channels": [16, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "schedule": {"beta_schedule": "squaredcos_cap_v2"},
    "prediction_type": "v_prediction",
    "condition_dropout": 0.5,
    "sampling": {"prompts": ["a red circle"], "num_inference_steps": 2},
}


@pytest.fixture
def said_of_captions():
    """of(run) -> the warnings of captions that are too long, while run() trains."""

    def of(run) -> list[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
        return [str(one.message) for one in said if "text window" in str(one.message)]

    return of


@pytest.fixture(scope="session")
def first_stages(tmp_path_factory):
    """Folders of an untrained VQModel ("vq") and AutoencoderKL ("kl")."""
    root = tmp_path_factory.mktemp("first_stages")
    torch.manual_seed(0)
    VQModel(**STAGE, num_vq_embeddings=16).save_pretrained(root / "vq")
    AutoencoderKL(**STAGE).save_pretrained(root / "kl")
    return root


@pytest.fixture
def vq_config(tmp_path):
    """make(*overrides) -> FirstStageConfig that writes below tmp_path."""

    def make(*overrides: str) -> FirstStageConfig:
        values = {**copy.deepcopy(VQ), "output_dir": str(tmp_path / "runs")}
        return load_config(FirstStageConfig, values, overrides)

    return make


@pytest.fixture
def ldm_config(tmp_path, first_stages):
    """make(*overrides) -> LatentDiffusionConfig on the untrained VQ first stage, writing below tmp_path."""

    def make(*overrides: str) -> LatentDiffusionConfig:
        values = {**copy.deepcopy(LDM), "output_dir": str(tmp_path / "runs")}
        return load_config(
            LatentDiffusionConfig, values, [f"first_stage.path={first_stages / 'vq'}", *overrides]
        )

    return make
