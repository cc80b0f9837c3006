"""Guidance of the pipeline by gradients: their place among samplers and scales, and what is refused."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fastldm.diffusion import (
    NoiseSchedule,
    classifier_gradient,
    gradient_guided,
    noise_levels,
    sample_ddim,
    sample_ddpm,
)
from fastldm.diffusion.samplers import SAMPLERS
from fastldm.errors import CheckpointError, InputError
from fastldm.models import PixelSpace, UNet2DConditionModel
from fastldm.systems import LatentDiffusionPipeline
from fastldm.systems.guides import Guide, GuideSpace, Latents, fingerprint, read_latents, read_schedule

CALL = {"num_inference_steps": 4, "output_type": "latent", "progress": False}
SHAPE = (4, 8, 8)


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def classifier(x, t):
    """Two classes whose logits depend on the means of the channels, and on t."""
    features = x.mean(dim=(2, 3))[:, :2] * 20
    return features * (1 + t[:, None] / 1000)


def guide(pipe, labels=(0,), **changes):
    space = {"shape": SHAPE, "latents": Latents(pipe.scaling_factor), "schedule": pipe.schedule, **changes}
    return Guide(
        lambda labels: classifier_gradient(classifier, labels), torch.tensor(labels), GuideSpace(**space)
    )


def parts(pipe, prompts, scale):
    """The unguided denoiser of a call."""
    ids = pipe.conditioner.prepare(prompts)
    null = pipe.conditioner.null_like(ids)
    with torch.no_grad():
        return pipe.denoiser(pipe.conditioner(ids), pipe.conditioner(null), scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 0.0])
def test_ddim_is_guided_by_the_noise_and_ddpm_by_the_mean(pipeline, latents, guidance_scale):
    pipe, gradient = pipeline(), classifier_gradient(classifier, torch.tensor([0, 1]))
    prompts = ["a red circle", "a star"]
    denoiser = parts(pipe, prompts, guidance_scale)
    call = {**CALL, "guidance_scale": guidance_scale, "gradient": gradient, "gradient_scale": 1.5}

    found = pipe(prompts, latents=latents(2), **call).images
    steps = noise_levels(pipe.schedule, "ddim", 4).timesteps
    guided = gradient_guided(denoiser, gradient, 1.5, pipe.schedule)
    with torch.no_grad():
        wanted = sample_ddim(guided, latents(2), pipe.schedule, steps)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

    found = pipe(prompts, latents=latents(2), sampler="ddpm", generator=seeds(5)[0], **call).images
    with torch.no_grad():
        wanted = sample_ddpm(
            denoiser,
            latents(2),
            pipe.schedule,
            noise_levels(pipe.schedule, "ddpm", 4).timesteps,
            guidance=gradient,
            guidance_scale=1.5,
            generator=seeds(5)[0],
        )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    plain = pipe(prompts, latents=latents(2), **{**call, "gradient": None}).images
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_follows_the_gradient(pipeline, latents, sampler):
    pipe = pipeline()
    call = {**CALL, "latents": latents(2), "sampler": sampler}
    plain = pipe("a star", num_images_per_prompt=2, generator=seeds(1, 2), **call).images
    probability = {0: [], 1: []}
    for label, found in probability.items():
        x = pipe(
            "a star", num_images_per_prompt=2, generator=seeds(1, 2), gradient=guide(pipe, (label,)), **call
        ).images
        assert x.isfinite().all()
        found.append(classifier(x, torch.zeros(2)).softmax(1)[:, 0].mean())
    before = classifier(plain, torch.zeros(2)).softmax(1)[:, 0].mean()
    assert probability[1][0] < before < probability[0][0]
    still = pipe(
        "a star",
        num_images_per_prompt=2,
        generator=seeds(1, 2),
        gradient=guide(pipe),
        gradient_scale=0.0,
        **call,
    ).images
    assert torch.equal(still, plain)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_seed_gives_one_guided_picture_whatever_the_batch(pipeline, sampler):
    pipe = pipeline()
    call = {**CALL, "sampler": sampler}
    both = pipe(["a star", "circle"], generator=seeds(1, 2), gradient=guide(pipe, (0, 1)), **call).images
    again = pipe(["a star", "circle"], generator=seeds(1, 2), gradient=guide(pipe, (0, 1)), **call).images
    alone = pipe("circle", generator=seeds(2), gradient=guide(pipe, (1,)), **call).images
    assert torch.equal(both, again)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)


def test_each_label_guides_the_pictures_of_its_prompt(pipeline, latents):
    pipe, seen = pipeline(), []

    def bind(labels):
        seen.append(labels.tolist())
        return classifier_gradient(classifier, labels)

    space = GuideSpace(SHAPE, Latents(pipe.scaling_factor), pipe.schedule)
    two = Guide(bind, torch.tensor([0, 1]), space)
    pipe(["a star", "circle"], num_images_per_prompt=2, latents=latents(4), gradient=two, **CALL)
    assert seen == [[0, 0, 1, 1]] * 4


def test_the_schedule_of_the_shipped_model_is_guided(pipeline, latents):
    """It ends at zero SNR, where there is nothing to guide."""
    schedule = NoiseSchedule.scaled_linear(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    pipe = pipeline(schedule=schedule)
    plain, guided = (
        pipe("a star", latents=latents(1), gradient=gradient, **CALL).images
        for gradient in (None, guide(pipe))
    )
    assert guided.isfinite().all()
    assert (guided - plain).abs().max() > 1e-3


def test_a_guide_of_something_else_is_refused_before_sampling(pipeline):
    pipe = pipeline()
    cosine = NoiseSchedule.cosine()
    cases = [
        (guide(pipe, shape=(4, 4, 4)), r"trained on latents \(4, 4, 4\).* diffuses latents \(4, 8, 8\)"),
        (guide(pipe, latents=None), "trained on pictures"),
        (guide(pipe, latents=Latents(2 * pipe.scaling_factor)), "another first stage"),
        (guide(pipe, latents=Latents(1.001 * pipe.scaling_factor)), "another first stage"),
        (guide(pipe, schedule=cosine), "another schedule"),
        (guide(pipe, schedule=NoiseSchedule.scaled_linear(500)), "another schedule"),
        (guide(pipe, schedule=NoiseSchedule.scaled_linear(beta_end=0.01201)), "another schedule"),
        (guide(pipe, (0, 1)), "2 captions or labels for 1 prompts"),
        (guide(pipe, ()), "0 captions or labels"),
    ]
    evaluated = []
    pipe.unet.register_forward_pre_hook(lambda *a: evaluated.append(a))
    for gradient, said in cases:
        with pytest.raises(InputError, match=said) as caught:
            pipe("a star", gradient=gradient, **CALL)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="gradient_scale=nan"):
        pipe("a star", gradient=guide(pipe), gradient_scale=math.nan, **CALL)
    with pytest.raises(InputError, match=r"diffuses latents \(4, 4, 4\)"):
        pipe("a star", height=32, width=32, gradient=guide(pipe), **CALL)
    assert evaluated == []
    # Without noise, or with the same noise under other settings of the sampler, it fits.
    other = NoiseSchedule.scaled_linear(timestep_spacing="trailing", prediction_type="v_prediction")
    for schedule in (None, other):
        pipe("a star", gradient=guide(pipe, schedule=schedule), **CALL)


def test_what_a_guide_was_trained_on_is_kept_in_its_folder(tmp_path):
    schedule = NoiseSchedule.cosine(50)
    GuideSpace(SHAPE, Latents(0.6421597540617603, "ab" * 32), schedule).save(tmp_path)
    assert read_latents(tmp_path) == Latents(0.6421597540617603, "ab" * 32)
    assert torch.equal(read_schedule(tmp_path).alphas_cumprod, schedule.alphas_cumprod)
    (tmp_path / "empty").mkdir()
    GuideSpace(SHAPE, None, None).save(tmp_path / "empty")
    assert read_latents(tmp_path / "empty") is None
    assert read_schedule(tmp_path / "empty") is None
    (tmp_path / "latents.json").write_text('{"scaling_factor": "std"}')
    with pytest.raises(CheckpointError, match="must hold a number scaling_factor"):
        read_latents(tmp_path)


@pytest.fixture
def pixels(pipeline):
    """A text-conditioned pipeline for 16x16 pictures that diffuses the pixels."""
    conditioner = pipeline().conditioner
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    return LatentDiffusionPipeline(PixelSpace(), conditioner, unet, NoiseSchedule.linear())


def test_a_pipeline_in_pixels_samples_saves_and_loads(pixels, tmp_path):
    assert (pixels.downsample_factor, pixels.latent_channels, pixels.scaling_factor) == (1, 3, 1.0)
    call = {"num_inference_steps": 2, "progress": False, "generator": seeds(0)[0]}
    wanted = pixels("a star", output_type="pt", **call).images
    assert wanted.shape == (1, 3, 16, 16)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(pixels.decode(pixels.encode(pictures)), pictures)
    assert pixels.decode(3 * pictures).abs().max() == 1
    pixels.save_pretrained(tmp_path / "model")
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.first_stage, PixelSpace)
    assert loaded.latent_scaling is None
    found = loaded("a star", output_type="pt", **{**call, "generator": seeds(0)[0]}).images
    assert torch.equal(found, wanted)
    assert pixels("a star", height=8, width=12, output_type="pt", **call).images.shape == (1, 3, 8, 12)


def test_a_guide_of_pictures_guides_pixels_and_no_latents(pixels):
    of_pictures = {"shape": (3, 16, 16), "latents": None}
    pixels("a star", gradient=guide(pixels, **of_pictures), **CALL)
    scaled = LatentDiffusionPipeline(
        pixels.first_stage, pixels.conditioner, pixels.unet, pixels.schedule, 2.0
    )
    scaled("a star", gradient=guide(scaled, shape=(3, 16, 16)), **CALL)
    with pytest.raises(InputError, match=r"trained on pictures \(3, 16, 16\).* diffuses latents"):
        scaled("a star", gradient=guide(scaled, **of_pictures), **CALL)
    with pytest.raises(InputError, match=r"trained on latents \(3, 16, 16\).* diffuses pictures"):
        pixels("a star", gradient=guide(pixels, shape=(3, 16, 16), latents=Latents(1.0)), **CALL)


@pytest.mark.parametrize(
    ("labels", "prompts", "pictures"), [((0, 1), 4, 1), ((0, 1), 1, 2), ((0, 1, 0), 2, 3)]
)
def test_a_guide_has_one_condition_or_one_per_prompt(pipeline, labels, prompts, pictures):
    pipe = pipeline()
    with pytest.raises(InputError, match=rf"{len(labels)} captions or labels for {prompts} prompts"):
        pipe(["a star"] * prompts, num_images_per_prompt=pictures, gradient=guide(pipe, labels), **CALL)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_gradient_is_a_function_whose_value_has_the_shape_of_x(pipeline, sampler):
    pipe = pipeline()
    with pytest.raises(InputError, match=r"gradient is a str: give what CLIPScorer\.gradient"):
        pipe("a star", gradient="a star", sampler=sampler, **CALL)
    for wrong in (lambda x, t: x[:1, :1], lambda x, t: torch.ones(1), lambda x, t: 1.0):
        with pytest.raises(InputError, match="must have the shape of x"):
            pipe(["a star"] * 2, gradient=wrong, sampler=sampler, **CALL)


@pytest.mark.parametrize("images", ["a star", torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64).byte()])
def test_what_is_no_picture_is_not_encoded(pipeline, images):
    with pytest.raises(InputError, match="give a float tensor"):
        pipeline().encode(images)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_guide_of_another_first_stage_is_refused(pipeline, kind):
    pipe, other = pipeline(first_stage=kind), pipeline(first_stage=kind)
    known = Latents(pipe.scaling_factor, "a" * 64, fingerprint(pipe.first_stage))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a star", gradient=guide(pipe, latents=known), **CALL)
        # The same weights in another dtype are the same first stage.
        pipe.first_stage.to(torch.bfloat16)
        known.check(pipe.first_stage)
    steps = []
    other.unet.register_forward_pre_hook(lambda *a: steps.append(1))
    with pytest.raises(InputError, match=r"latents of another first stage.*first_stage\.path the pipeline's"):
        other("a star", gradient=guide(other, latents=known), **CALL)
    assert steps == []


@pytest.mark.parametrize(("change", "same"), [(0.02, True), (0.15, False)])
def test_a_first_stage_that_was_trained_on_a_little_is_the_same(pipeline, change, same):
    """A few percent of the latents, as of the fingerprint, are less than the noise that a guide reads."""
    torch.manual_seed(0)
    stage = pipeline(first_stage="kl").first_stage
    known = Latents(1.0, None, fingerprint(stage))
    pictures = torch.rand(8, 3, 32, 32, generator=seeds(0)[0]) * 2 - 1
    with torch.no_grad():
        before = stage.encode(pictures).latent_dist.mean
        for parameter in stage.parameters():
            noise = torch.randn(parameter.shape, generator=seeds(parameter.numel())[0])
            parameter.add_(change * parameter.abs().mean() * noise)
        after = stage.encode(pictures).latent_dist.mean
    assert ((before - after).norm() < 0.1 * before.norm()) == same
    if same:
        known.check(stage)
    else:
        with pytest.raises(InputError, match="latents of another first stage"):
            known.check(stage)


def test_a_first_stage_of_other_channels_first_is_another(pipeline):
    """Such as one of BGR: the picture of the fingerprint has a colour."""
    stage = pipeline().first_stage
    known = Latents(1.0, None, fingerprint(stage))
    with torch.no_grad():
        stage.encoder.conv_in.weight.copy_(stage.encoder.conv_in.weight.flip(1))
    with pytest.raises(InputError, match="latents of another first stage"):
        known.check(stage)


def test_a_fingerprint_of_another_length_is_another_first_stage(pipeline):
    pipe = pipeline()
    with pytest.raises(InputError, match="latents of another first stage"):
        Latents(1.0, None, fingerprint(pipe.first_stage)[:-1]).check(pipe.first_stage)
    nan = (math.nan,) * len(fingerprint(pipe.first_stage))
    with pytest.raises(InputError, match="latents of another first stage"):
        Latents(1.0, None, nan).check(pipe.first_stage)


def test_a_guide_whose_first_stage_cannot_be_compared_is_warned_of(pipeline):
    pipe = pipeline()
    with pytest.warns(UserWarning, match="no fingerprint of its first stage"):
        pipe("a star", gradient=guide(pipe, latents=Latents(pipe.scaling_factor, "a" * 64)), **CALL)


def test_the_fingerprint_is_kept_in_the_folder(pipeline, tmp_path):
    kept = Latents(0.5, "ab" * 32, fingerprint(pipeline().first_stage))
    GuideSpace(SHAPE, kept, None).save(tmp_path)
    assert read_latents(tmp_path) == kept
    (tmp_path / "latents.json").write_text('{"scaling_factor": 1.0, "fingerprint": "abc"}')
    with pytest.raises(CheckpointError, match="must hold a list of numbers as its fingerprint"):
        read_latents(tmp_path)


def test_a_guide_s_numbers_of_numpy_are_kept(tmp_path):
    schedule = NoiseSchedule.linear(np.int64(50), trained_betas=np.linspace(0.01, 0.1, 50, dtype=np.float32))
    GuideSpace(SHAPE, Latents(np.float32(0.5)), schedule).save(tmp_path)
    assert read_latents(tmp_path) == Latents(0.5)
    assert torch.equal(read_schedule(tmp_path).alphas_cumprod, schedule.alphas_cumprod)
