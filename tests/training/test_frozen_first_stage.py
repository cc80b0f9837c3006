"""Where guides and denoisers are trained: pixels, a first stage, or that of a whole pipeline."""

from __future__ import annotations

import pytest
import torch

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import ConfigError
from fastldm.models import PixelSpace
from fastldm.systems import LatentDiffusionPipeline
from fastldm.training.config import FrozenFirstStageConfig
from fastldm.training.data import StreamSampler, batches
from fastldm.training.datasets import CaptionedShapes
from fastldm.training.frozen_first_stage import FrozenFirstStage
from fastldm.training.latent_diffusion import LatentDiffusionTask
from fastldm.training.loop import train

CPU = torch.device("cpu")


def stage(path, size=64, seed=0, **fields):
    found = FrozenFirstStage(FrozenFirstStageConfig(path=str(path), **fields), size, seed)
    found.to(CPU)
    return found


def batch(size=64):
    return next(batches(CaptionedShapes("train", "one", size, 8), StreamSampler(8, 4, seed=0)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_shipped_model_gives_its_latents_and_its_noise():
    found, pipe = stage("shapes"), LatentDiffusionPipeline.from_pretrained("shapes")
    found.start(batch())
    assert found.scaling_factor == pipe.scaling_factor
    assert found.shape == (4, 8, 8)
    assert found.record().scaling_factor == pipe.scaling_factor
    wanted = pipe.encode(batch()["image"], generator(3))
    torch.testing.assert_close(found.scaled(batch(), generator(3)), wanted, atol=1e-5, rtol=0)
    assert torch.equal(found.noise({}).alphas_cumprod, pipe.schedule.alphas_cumprod)
    given = found.noise({"beta_schedule": "squaredcos_cap_v2"})
    assert torch.equal(given.betas, NoiseSchedule.cosine().betas)
    assert not given.clip_sample
    measured = stage("shapes", scaling_factor="std")
    measured.start(batch())
    assert measured.scaling_factor != pipe.scaling_factor
    assert measured.scaled(batch(), generator(0)).std().item() == pytest.approx(1, rel=1e-5)


def test_a_folder_of_a_pipeline_is_one_too(ldm_config):
    config = ldm_config("max_steps=1")
    folder = train(config, lambda: LatentDiffusionTask(config), progress=False)
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    found = stage(folder, 32)
    assert found.scaling_factor == pipe.scaling_factor
    assert torch.equal(found.schedule.betas, pipe.schedule.betas)
    assert all(torch.equal(v, found.model.state_dict()[k]) for k, v in pipe.first_stage.state_dict().items())
    assert not any(p.requires_grad for p in found.model.parameters())


def test_pixels_are_pictures_as_they_are():
    found, pictures = stage("pixels"), CaptionedShapes("train", "one", 64, 8)
    found.start(batch())
    assert isinstance(found.model, PixelSpace)
    assert (found.scaling_factor, found.shape, found.record()) == (1.0, (3, 64, 64), None)
    assert torch.equal(found.scaled(batch(), generator()), batch()["image"])
    assert found.cached(pictures, None, 0) is pictures
    assert torch.equal(found.noise({}).betas, NoiseSchedule.linear().betas)
    scaled = stage("pixels", scaling_factor=2.0)
    assert scaled.record().scaling_factor == 2.0


def test_pictures_that_the_first_stage_cannot_halve_are_refused():
    with pytest.raises(ConfigError, match=r"data\.size=60 for first_stage\.path=shapes: use a multiple of 8"):
        stage("shapes", 60)
    with pytest.raises(ConfigError, match=r"'first_stage\.scaling_factor' must be above 0"):
        FrozenFirstStageConfig(path="pixels", scaling_factor=-1.0)


@pytest.mark.parametrize("cached", [False, True])
def test_diffusion_in_pixels_trains_and_samples(ldm_config, cached):
    config = ldm_config("first_stage.path=pixels", f"cache_latents={cached}", "max_steps=2", "sample_every=2")
    tasks = []

    def build():
        tasks.append(LatentDiffusionTask(config))
        return tasks[0]

    folder = train(config, build, progress=False)
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    assert (pipe.downsample_factor, pipe.scaling_factor, pipe.latent_scaling) == (1, 1.0, None)
    assert pipe.unet.config.in_channels == pipe.unet.config.out_channels == 3
    assert pipe.unet.config.sample_size == 32
    images = pipe("a red circle", output_type="pt", generator=generator(), progress=False).images
    assert images.shape == (1, 3, 32, 32)
    latents = pipe("a red circle", output_type="latent", generator=generator(), progress=False).images
    assert torch.equal((latents.clamp(-1, 1) / 2 + 0.5), images)
    # The folder also says where a guide of it is trained.
    found = stage(folder, 32)
    assert found.record() is None
    assert torch.equal(found.noise({}).betas, pipe.schedule.betas)


def test_a_loss_in_pixels_falls(ldm_config):
    steps = ("max_steps=30", "optimizer.lr=3e-3", "data.length=200", "checkpoint_every=30")
    config = ldm_config("first_stage.path=pixels", "prediction_type=epsilon", *steps)
    tasks = []

    def build():
        tasks.append(LatentDiffusionTask(config))
        return tasks[0]

    def loss(task):
        with torch.no_grad():
            prepared = task.prepare(next(batches(task.pictures, StreamSampler(200, 32, seed=1))), generator())
            return task.module(prepared, step=0, generator=generator(2))[0].item()

    fresh = LatentDiffusionTask(config)
    fresh.to(CPU)
    before = loss(fresh)
    train(config, build, progress=False)
    assert loss(tasks[0]) < 0.8 * before
