"""A pipeline with random weights on a few thousand parameters, and the configurations to train such ones."""

from __future__ import annotations

import pytest
import torch

from fastldm.diffusion import NoiseSchedule
from fastldm.models.conditioners import TextConditioner
from fastldm.models.text_transformer import LDMBertModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet2DConditionModel
from fastldm.models.vq_model import VQModel
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.datasets.shapes import vocabulary

VQ = """
output_dir: {runs}
max_steps: 4
batch_size: 2
log_every: 2
checkpoint_every: 2
sample_every: 0
data: {{size: 32, length: 8, kind: one}}
model:
  config:
    down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D]
    up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D]
    block_out_channels: [8, 8]
    latent_channels: 4
    norm_num_groups: 4
    num_vq_embeddings: 16
    mid_block_add_attention: false
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of an untrained text-to-image model for 32x32 pictures, with a text window of 12."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    }
    stage = VQModel(
        **blocks,
        block_out_channels=[8, 8],
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )
    tokenizer = Tokenizer.from_captions([" ".join(vocabulary())], 12)
    text_encoder = LDMBertModel(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=12,
        d_model=16,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=[16, 16],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    with torch.no_grad():
        # Fresh codes lie so close together that all pictures look alike.
        stage.quantize.embedding.weight.normal_()
    pipeline = LatentDiffusionPipeline(
        stage,
        TextConditioner(text_encoder, tokenizer),
        unet,
        NoiseSchedule.cosine(),
        1.0,
        defaults={"num_inference_steps": 2, "guidance_scale": 2.0},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def vq_file(tmp_path):
    """A configuration file for `fastldm train vq` that writes to tmp_path/runs/vq."""
    file = tmp_path / "tiny-vq.yaml"
    file.write_text(VQ.format(runs=tmp_path / "runs"))
    return file


@pytest.fixture
def fails(capfd):
    """fails(*arguments) runs a command that must end with code 2 and one line; returns that line."""
    from fastldm.cli import main

    def run(*arguments) -> str:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        lines = [
            line
            for line in capfd.readouterr().err.splitlines()
            if not line.startswith(("fastldm: warning", "step "))
        ]
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("fastldm: error: ")
        return lines[0]

    return run
