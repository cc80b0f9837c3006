"""The latent diffusion pipeline: the peer's pictures, what a call promises, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LDMTextToImagePipeline,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from fastldm.diffusion import NoiseSchedule
from fastldm.diffusion.samplers import SAMPLERS
from fastldm.errors import ConfigError, InputError
from fastldm.models import ClassConditioner, SpatialConditioner
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline, scale_from_batch

PEER_CALL = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
CALL = {"num_inference_steps": 3, "output_type": "pt", "progress": False}


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.mark.parametrize("scale", [1.0, 4.0, 0.0])
@pytest.mark.parametrize("stage", ["vq", "kl"])
def test_the_peer_s_folder_gives_the_peer_s_picture(pipeline, latents, stage, scale, tmp_path):
    ours = pipeline(first_stage=stage)
    ours.save_pretrained(tmp_path / "ours")
    peer = LDMTextToImagePipeline.from_pretrained(tmp_path / "ours")
    peer.set_progress_bar_config(disable=True)
    peer.save_pretrained(tmp_path / "peer")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "peer")
    arguments = {"prompt": ["a red circle", "star"], "guidance_scale": scale, **PEER_CALL}
    wanted = peer(latents=latents(2), **arguments).images
    for pipe in (ours, again):
        found = pipe(latents=latents(2), progress=False, **arguments).images
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert wanted.std() > 0.01


def test_the_peer_s_noise_is_ours(pipeline, tmp_path):
    ours = pipeline()
    ours.save_pretrained(tmp_path)
    peer = LDMTextToImagePipeline.from_pretrained(tmp_path)
    peer.set_progress_bar_config(disable=True)
    wanted = peer("a star", generator=seeds(3)[0], **PEER_CALL).images
    found = ours("a star", generator=seeds(3)[0], progress=False, **PEER_CALL).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "peer_class", "options"),
    [
        ("plms", PNDMScheduler, {"skip_prk_steps": True}),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {}),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        ("unipc", UniPCMultistepScheduler, {}),
        ("unipc", UniPCMultistepScheduler, {"use_karras_sigmas": True}),
    ],
)
def test_another_sampler_s_picture_is_the_peer_s(pipeline, latents, sampler, peer_class, options, tmp_path):
    ours = pipeline()
    ours.save_pretrained(tmp_path)
    peer = LDMTextToImagePipeline.from_pretrained(tmp_path)
    peer.set_progress_bar_config(disable=True)
    peer.scheduler = peer_class.from_config(peer.scheduler.config, **options)
    arguments = {"prompt": "a star", "guidance_scale": 3.0, **PEER_CALL, "num_inference_steps": 5}
    wanted = peer(latents=latents(1), **arguments).images
    karras = "use_karras_sigmas" in options
    found = ours(latents=latents(1), sampler=sampler, karras=karras, progress=False, **arguments).images
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    peer.save_pretrained(tmp_path / "peer")
    theirs = LatentDiffusionPipeline.from_pretrained(tmp_path / "peer")
    assert (theirs.sampler, theirs.karras) == (sampler, karras)
    assert np.array_equal(theirs(latents=latents(1), progress=False, **arguments).images, found)
    assert np.abs(found - ours(latents=latents(1), progress=False, **arguments).images).max() > 1e-3


def test_the_model_s_karras_levels_are_those_of_its_own_sampler(pipeline, latents):
    plain, karras = pipeline(sampler="heun"), pipeline(sampler="heun", karras=True)
    karras.unet.load_state_dict(plain.unet.state_dict())
    karras.first_stage.load_state_dict(plain.first_stage.state_dict())
    karras.conditioner = plain.conditioner
    call = {**CALL, "prompt": "a star", "latents": latents(1), "output_type": "latent"}

    def same(one, other):
        return torch.equal(karras(**call, **one).images, plain(**call, **other).images)

    assert same({}, {"karras": True})
    assert same({"sampler": "heun"}, {"karras": True})
    assert same({"karras": False}, {})
    assert same({"sampler": "euler"}, {"sampler": "euler"})
    assert same({"sampler": "ddim"}, {"sampler": "ddim"})
    assert not same({}, {})


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim", "eta": 0.7},
        *({"sampler": name} for name in SAMPLERS if name != "ddim"),
        *({"sampler": name, "karras": True} for name in ("euler", "euler_ancestral", "heun")),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_seed_gives_one_picture_whatever_the_batch(pipeline, options):
    pipe = pipeline()
    prompts = ["a red circle", "a star", "circle"]
    batch = pipe(prompts, generator=seeds(1, 2, 3), guidance_scale=2.0, **CALL, **options).images
    again = pipe(prompts, generator=seeds(1, 2, 3), guidance_scale=2.0, **CALL, **options).images
    alone = pipe(prompts[1], generator=seeds(2), guidance_scale=2.0, **CALL, **options).images
    assert torch.equal(batch, again)
    torch.testing.assert_close(batch[1:2], alone, atol=1e-4, rtol=0)


def test_output_types_are_one_picture(pipeline, latents):
    pipe, call = pipeline(), {**CALL, "prompt": ["a star", "circle"]}
    tensor = pipe(**call, latents=latents(2)).images
    assert tensor.shape == (2, 3, 64, 64)
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() <= tensor.max() <= 1
    array = pipe(**{**call, "output_type": "np"}, latents=latents(2)).images
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = pipe(**{**call, "output_type": "pil"}, latents=latents(2)).images
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert np.abs(np.asarray(pictures[1]) / 255 - array[1]).max() < 0.5001 / 255 + 1e-6
    final = pipe(**{**call, "output_type": "latent"}, latents=latents(2)).images
    torch.testing.assert_close((pipe.decode(final) / 2 + 0.5).clamp(0, 1), tensor)
    assert isinstance(pipe(**call, return_dict=False), tuple)


def test_sizes_other_than_square(pipeline):
    assert pipeline()("a star", height=32, width=48, **CALL).images.shape == (1, 3, 32, 48)


def test_pictures_of_one_prompt_stand_together(pipeline, latents):
    pipe = pipeline()
    images = pipe(["circle", "a star"], num_images_per_prompt=2, latents=latents(4), **CALL).images
    for i, prompt in enumerate(["circle", "circle", "a star", "a star"]):
        alone = pipe(prompt, latents=latents(4)[i : i + 1], **CALL).images
        torch.testing.assert_close(images[i : i + 1], alone, atol=1e-4, rtol=0)


def test_the_default_negative_prompt_is_the_null_caption(pipeline, latents):
    pipe = pipeline()
    call = {**CALL, "prompt": ["a star", "circle"], "guidance_scale": 3.0, "latents": latents(2)}
    plain = pipe(**call).images
    assert torch.equal(pipe(**call, negative_prompt="").images, plain)
    one, each = (pipe(**call, negative_prompt=n).images for n in ("red", ["red", "red"]))
    assert torch.equal(one, each)
    assert (one - plain).abs().max() > 1e-3


def test_each_picture_is_led_away_from_its_own_negative_prompt(pipeline, latents):
    pipe, call = pipeline(), {**CALL, "guidance_scale": 3.0}
    prompts, negatives = ["circle", "a star"], ["red", "a red circle"]
    images = pipe(
        prompts, negative_prompt=negatives, num_images_per_prompt=2, latents=latents(4), **call
    ).images
    for i, (prompt, negative) in enumerate((p, n) for p, n in zip(prompts, negatives) for _ in range(2)):
        alone = pipe(prompt, negative_prompt=negative, latents=latents(4)[i : i + 1], **call).images
        torch.testing.assert_close(images[i : i + 1], alone, atol=1e-4, rtol=0)
        other = negatives[1 - negatives.index(negative)]
        swapped = pipe(prompt, negative_prompt=other, latents=latents(4)[i : i + 1], **call).images
        assert (swapped - alone).abs().max() > 1e-3


def test_a_useless_negative_prompt_is_said(pipeline):
    with pytest.warns(UserWarning, match="no effect"):
        pipeline()("a star", negative_prompt="red", guidance_scale=1.0, **CALL)


def test_scale_one_runs_the_unet_once_per_step(pipeline):
    pipe, batches = pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    pipe("a star", guidance_scale=1.0, **CALL)
    pipe("a star", guidance_scale=2.0, **CALL)
    assert batches == [1, 1, 1, 2, 2, 2]


def test_a_callback_sees_and_replaces_latents(pipeline):
    pipe, seen = pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep, tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    images = pipe("a star", callback_on_step_end=callback, **{**CALL, "output_type": "latent"}).images
    assert seen == [(i, t, (1, 4, 8, 8)) for i, t in enumerate(pipe.schedule.timesteps(3).tolist())]
    assert not images.any()


def test_guidance_rescale_acts(pipeline, latents):
    call = {**CALL, "prompt": "a star", "guidance_scale": 6.0, "latents": latents(1)}
    pipe = pipeline()
    assert not torch.allclose(pipe(**call, guidance_rescale=0.7).images, pipe(**call).images, atol=1e-3)


def test_sampling_in_the_middle_of_training_leaves_training_on(pipeline, latents):
    pipe = pipeline()
    pipe.conditioner.train()
    first, again = (pipe("a star", latents=latents(1), **CALL).images for _ in range(2))
    assert torch.equal(first, again)
    assert pipe.conditioner.training
    assert not pipe.unet.training


def test_half_precision_stays_near(pipeline, latents):
    pipe = pipeline()
    call = {**CALL, "prompt": "a star", "latents": latents(1), "output_type": "latent"}
    full = pipe(**call).images
    half = pipe.to(torch.bfloat16)(**call).images
    assert pipe.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.abs().mean()


def test_class_labels_are_a_condition(pipeline, latents):
    pipe = pipeline(ClassConditioner(num_classes=3, embed_dim=16).eval())
    call = {**CALL, "latents": latents(2), "guidance_scale": 3.0}
    zero, one = pipe(torch.tensor([0, 1]), **call).images
    again = pipe([1, 0], **{**call, "latents": latents(2).flip(0)}).images
    torch.testing.assert_close(again, torch.stack([one, zero]), atol=1e-4, rtol=0)


def test_pictures_are_a_condition_and_set_the_size(pipeline):
    conditioner = SpatialConditioner(in_channels=2, out_channels=3, n_stages=3).eval()
    pipe = pipeline(conditioner)
    maps = torch.randn(2, 2, 32, 48)
    images = pipe(maps, guidance_scale=2.0, **CALL).images
    assert images.shape == (2, 3, 32, 48)
    with pytest.raises(InputError, match="which is for 32 x 48"):
        pipe(maps, height=64, width=64, **CALL)


def test_vq_latents_are_taken_before_quantisation_and_decoded_after_it(pipeline):
    pipe = pipeline(scaling_factor=0.5)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    encoded = pipe.encode(images)
    with torch.no_grad():
        assert torch.equal(encoded, pipe.first_stage.encode(images).latents * 0.5)
        wanted = pipe.first_stage(images).sample
    torch.testing.assert_close(pipe.decode(encoded), wanted, atol=1e-5, rtol=0)


def test_kl_latents_are_drawn(pipeline):
    pipe = pipeline(first_stage="kl")
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    first, again, other = (pipe.encode(images, seeds(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert pipe.scaling_factor == pipe.first_stage.config.scaling_factor


def test_scale_from_batch_brings_latents_to_unit_deviation():
    batch = torch.randn(16, 4, 8, 8) * 3.7 + 0.2
    assert abs((batch * scale_from_batch(batch)).std().item() - 1) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": 5}, "caption or a list of captions"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "a zebra"}, "'zebra'"),
        ({"height": 60}, "multiples of 8"),
        ({"width": 0}, "multiples of 8"),
        ({"num_inference_steps": 0}, "use 1 to 1000"),
        ({"guidance_rescale": 2.0}, "between 0 and 1"),
        ({"negative_prompt": ["red", "circle"]}, "one per prompt"),
        ({"num_images_per_prompt": 0}, "whole number from 1"),
        ({"eta": 1.5}, "eta=1.5: use a value between 0 and 1"),
        ({"eta": 0.5, "sampler": "ddpm"}, "0 for any other"),
        ({"sampler": "plmz"}, "ddim, ddpm, plms"),
        ({"sampler": "plms", "karras": True}, "karras=True with sampler 'plms'"),
        ({"output_type": "jpg"}, "pil, np, pt, latent"),
        ({"generator": seeds(1, 2)}, "2 generators for a batch of 1"),
        (
            {"latents": torch.zeros(1, 4, 4, 4)},
            r"\(1, 4, 4, 4\); this call needs a float tensor \(1, 4, 8, 8\)",
        ),
    ],
)
def test_unusable_calls_are_refused_before_any_step(pipeline, arguments, said):
    pipe, steps = pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda module, args: steps.append(1))
    with pytest.raises(InputError, match=said):
        pipe(**{"prompt": "a star", "guidance_scale": 2.0, **CALL, **arguments})
    assert not steps


def test_unusable_pictures_are_refused(pipeline):
    with pytest.raises(InputError, match="multiples of 8"):
        pipeline().encode(torch.zeros(1, 3, 30, 32))


def test_parts_that_do_not_fit_are_refused(pipeline):
    pipe = pipeline()
    parts = pipe.first_stage, ClassConditioner(3, 24), pipe.unet, NoiseSchedule.linear()
    with pytest.raises(ConfigError, match="cross_attention_dim is 16, but the condition has 24"):
        LatentDiffusionPipeline(*parts)
    parts = pipe.first_stage, SpatialConditioner(2, 3), pipe.unet, NoiseSchedule.linear()
    with pytest.raises(ConfigError, match=r"in_channels is 4, .* 4 \+ 3; its blocks have cross-attention"):
        LatentDiffusionPipeline(*parts)
    unseeing = pipeline(SpatialConditioner(2, 3, n_stages=3)).unet
    with pytest.raises(ConfigError, match="no cross-attention, but the condition gives a context"):
        LatentDiffusionPipeline(pipe.first_stage, pipe.conditioner, unseeing, NoiseSchedule.linear())
    for wrong, said in (
        ({"sampler": "plmz"}, "ddim, ddpm, plms"),
        ({"defaults": {"steps": 3}}, "num_inference_steps"),
        ({"defaults": {"num_inference_steps": 2.5}}, "whole number from 1, got 2.5"),
        ({"defaults": {"guidance_scale": None}}, "finite number, got None"),
    ):
        with pytest.raises(ConfigError, match=said):
            LatentDiffusionPipeline(pipe.first_stage, pipe.conditioner, pipe.unet, pipe.schedule, **wrong)
