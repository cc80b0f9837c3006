"""The identity as a first stage."""

from __future__ import annotations

import torch

from fastldm.models import AutoencoderKL, PixelSpace, VQModel

STAGE = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 8],
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def test_pictures_come_back_as_they_are_and_others_are_clamped():
    stage, pictures = PixelSpace(), torch.rand(2, 3, 6, 10) * 2 - 1
    latents = stage.encode(pictures).latents
    assert torch.equal(latents, pictures)
    assert torch.equal(stage.decode(latents).sample, pictures)
    assert torch.equal(stage(pictures).sample, pictures)
    assert torch.equal(stage.encode(pictures, return_dict=False)[0], pictures)
    far = torch.tensor([-3.0, -0.5, 1.5]).view(1, 3, 1, 1)
    (sample,) = stage.decode(far, return_dict=False)
    assert sample.flatten().tolist() == [-1.0, -0.5, 1.0]


def test_a_folder_keeps_its_fields(tmp_path):
    PixelSpace(latent_channels=1, scaling_factor=2.0).save_pretrained(tmp_path)
    loaded = PixelSpace.from_pretrained(tmp_path)
    assert (loaded.config.latent_channels, loaded.config.scaling_factor) == (1, 2.0)


def test_every_first_stage_states_its_latents():
    pictures = torch.zeros(1, 3, 16, 16)
    for stage in (PixelSpace(), VQModel(**STAGE), VQModel(**STAGE, vq_embed_dim=2)):
        shape = (1, stage.latent_channels, *[16 // stage.downsample_factor] * 2)
        assert stage.encode(pictures).latents.shape == shape
    kl = AutoencoderKL(**STAGE)
    shape = (1, kl.latent_channels, *[16 // kl.downsample_factor] * 2)
    assert kl.encode(pictures).latent_dist.mode().shape == shape
