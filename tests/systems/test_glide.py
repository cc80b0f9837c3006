"""GLIDE as a system: the published loop written out, inpainting, what a call promises and what it refuses."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastldm.diffusion import NoiseSchedule, randn, score_gradient
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import GlideTokenizer, GlideUNet
from fastldm.systems import GlidePipeline, GlideStage, LatentDiffusionPipeline
from fastldm.systems.glide_stage import BASE_NOISE, UPSAMPLER_NOISE
from fastldm.systems.guides import Guide, GuideSpace, Latents
from tests.models.adm_oracle import randomised

CALL = {"num_inference_steps": 4, "upsampler_steps": 3, "output_type": "latent", "progress": False}
# On timesteps with and without noise, of several steps, and on noise levels.
KINDS_OF_SAMPLERS = ["ddpm", "ddim", "plms", "heun"]
PROMPTS = ["a red circle", "a blue star"]
TOKENIZER = GlideTokenizer.from_captions(PROMPTS, 6, merges=20)
TINY = {
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "num_head_channels": 16,
    "n_vocab": TOKENIZER.vocab_size,
    "text_ctx": 6,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
}


def calmed(network):
    """Random weights of which a rounding error does not become a picture of its own within a few steps."""
    randomised(network)
    with torch.no_grad():
        network.out[2].weight.mul_(0.05)
    return network


def base_stage(**fields):
    network = GlideUNet(**{"image_size": 8, "attention_resolutions": (4,), **TINY, **fields})
    return GlideStage(calmed(network), NoiseSchedule(**BASE_NOISE))


def upsampler_stage(**fields):
    sizes = {"image_size": 16, "attention_resolutions": (8,), "super_res": True}
    return GlideStage(calmed(GlideUNet(**{**sizes, **TINY, **fields})), NoiseSchedule(**UPSAMPLER_NOISE))


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return GlidePipeline(TOKENIZER, base_stage(), upsampler_stage())


@pytest.fixture(scope="module")
def inpainter():
    torch.manual_seed(0)
    return GlidePipeline(TOKENIZER, base_stage(inpaint=True), upsampler_stage(inpaint=True))


def seeds(*values):
    return [torch.Generator().manual_seed(value) for value in values]


def picture(size=16):
    return torch.rand(1, 3, size, size, generator=seeds(7)[0]) * 2 - 1


def hole(size=16):
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 4 + 1 : 3 * size // 4, size // 8 : size // 2] = 1
    return mask


# glide-text2im's loop, after Nichol and Dhariwal 2021: a new process of the chosen timesteps alone.


def process(stage, timesteps):
    """Of the respaced process, float64: abar, the abar before, beta, and the posterior's log-variance.

    abar is the schedule's own, of float32: rounding it moves pictures by 2e-5.
    """
    alpha_bar = stage.schedule.alphas_cumprod.double().numpy()[timesteps]
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    return alpha_bar, before, beta, np.log(np.append(variance[1], variance[1:]))


def written_out(stage, x, timesteps, model, noises, known=None):
    """p_sample_loop where there are noises, else ddim_sample_loop; `timesteps` rise."""
    alpha_bar, before, beta, lowest = process(stage, timesteps)
    x = x.double()
    for i in reversed(range(len(timesteps))):
        eps, v = model(x.float(), timesteps[i])
        x0 = (x - (1 - alpha_bar[i]) ** 0.5 * eps.double()) / alpha_bar[i] ** 0.5
        x0 = x0.clamp(-1, 1)
        if known is not None:
            x0 = x0 * (1 - known[1]) + known[0].double() * known[1]
        if noises is None:
            left = (x - alpha_bar[i] ** 0.5 * x0) / (1 - alpha_bar[i]) ** 0.5
            x = before[i] ** 0.5 * x0 + (1 - before[i]) ** 0.5 * left
            continue
        mean = before[i] ** 0.5 * beta[i] / (1 - alpha_bar[i]) * x0
        mean = mean + (1 - beta[i]) ** 0.5 * (1 - before[i]) / (1 - alpha_bar[i]) * x
        share = (v.double() + 1) / 2
        log_variance = share * np.log(beta[i]) + (1 - share) * lowest[i]
        x = mean if i == 0 else mean + (0.5 * log_variance).exp() * noises[len(timesteps) - 1 - i].double()
    return x


def guided(stage, prompts, scale, **pictures):
    """glide-text2im's model_fn: both captions in one batch, the first three channels alone guided."""
    tokens, mask = TOKENIZER([*prompts, *[""] * len(prompts)])
    pictures = {name: torch.cat([value, value]).float() for name, value in pictures.items()}

    def model(x, t):
        output = stage.unet(torch.cat([x, x]), float(t), tokens, mask, **pictures).sample
        eps, v = output[:, :3], output[:, 3:]
        own, null = eps.chunk(2)
        return null + scale * (own - null), v.chunk(2)[0]

    return model


def unguided(stage, prompts, **pictures):
    tokens, mask = TOKENIZER(prompts)
    pictures = {name: value.float() for name, value in pictures.items()}

    def model(x, t):
        return stage.unet(x, float(t), tokens, mask, **pictures).sample.chunk(2, dim=1)

    return model


@contextmanager
def plausible(stage):
    """Add the best guess of the noise in pictures of deviation 1: random weights alone make x0 -1 or 1."""

    def hook(unet, args, output):
        x, t = args[0], torch.as_tensor(args[1]).long()
        sigma = (1 - stage.schedule.alphas_cumprod[t]).sqrt().reshape(-1, 1, 1, 1)
        output.sample = output.sample + torch.cat([sigma * x, torch.zeros_like(x)], dim=1)
        return output

    handle = stage.unet.register_forward_hook(hook)
    yield
    handle.remove()


FAST27 = [
    *[0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399],
    *[400, 500, 599, 600, 799, 800, 997],
]


@torch.no_grad()
@pytest.mark.parametrize("paint", [False, True])
def test_the_whole_loop_is_the_published_one(pipe, inpainter, paint):
    pipe = inpainter if paint else pipe
    with plausible(pipe.base), plausible(pipe.upsampler):
        check_the_loop(pipe, paint)


def check_the_loop(pipe, paint):
    found = {}
    if paint:
        # Not on the base's grid: it paints every place of which a part is masked.
        small = 1 - (F.avg_pool2d(hole(), 2) > 0).float()
        kept = {"image": picture(), "mask": hole()}
    result = pipe(
        PROMPTS,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=seeds(3)[0],
        output_type="latent",
        progress=False,
        callback_on_step_end=lambda pipe, i, t, tensors: found.update({i: (t, tensors["latents"])}),
        **(kept if paint else {}),
    ).images

    source = seeds(3)[0]
    first, *noises = (randn((2, 3, 8, 8), source) for _ in range(6))
    steps = [0, 200, 400, 599, 799, 999]
    known_small = known_large = None
    shown_small, shown_large = {}, {}
    if paint:
        known_small = (F.avg_pool2d(picture(), 2).expand(2, -1, -1, -1), small.expand(2, -1, -1, -1))
        known_large = (picture().expand(2, -1, -1, -1), 1 - hole().expand(2, -1, -1, -1))
        shown_small, shown_large = (
            {"inpaint_image": image * mask, "inpaint_mask": mask}
            for image, mask in (known_small, known_large)
        )
    model = guided(pipe.base, PROMPTS, 3.0, **shown_small)
    small_pictures = written_out(pipe.base, first, steps, model, noises, known_small)
    torch.testing.assert_close(found[5][1].double(), small_pictures, atol=1e-5, rtol=0)

    low_res = ((found[5][1] + 1) * 127.5).round() / 127.5 - 1
    model = unguided(pipe.upsampler, PROMPTS, low_res=low_res, **shown_large)
    x = randn((2, 3, 16, 16), source) * 0.997
    wanted = written_out(pipe.upsampler, x, FAST27, model, None, known_large)
    torch.testing.assert_close(result.double(), wanted, atol=1e-5, rtol=0)
    assert [t for t, _ in found.values()] == [*reversed(steps), *reversed(FAST27)]
    assert wanted.std() > 0.1
    assert (wanted.abs() < 0.999).double().mean() > 0.1


def test_a_text_is_read_once_by_each_network(pipe, monkeypatch):
    read = {"base": [], "upsampler": []}
    for name, batches in read.items():
        unet = getattr(pipe, name).unet
        original = unet.encode_text

        def counted(tokens, mask=None, original=original, batches=batches):
            batches.append(len(tokens))
            return original(tokens, mask)

        monkeypatch.setattr(unet, "encode_text", counted)
    pipe(PROMPTS, guidance_scale=3.0, num_images_per_prompt=2, **CALL)
    # The empty caption is one text, and one caption is read once for all its pictures.
    assert read == {"base": [3], "upsampler": [2]}
    pipe(PROMPTS, guidance_scale=1.0, **CALL)
    assert read == {"base": [3, 2], "upsampler": [2, 2]}


@pytest.mark.parametrize("sampler", KINDS_OF_SAMPLERS)
def test_a_seed_gives_one_picture_whatever_the_batch(pipe, sampler):
    call = {**CALL, "sampler": sampler, "upsampler_sampler": sampler}
    call["num_inference_steps"] = 3
    batch = pipe(PROMPTS, generator=seeds(1, 2), **call).images
    again = pipe(PROMPTS, generator=seeds(1, 2), **call).images
    alone = pipe(PROMPTS[1], generator=seeds(2), **call).images
    assert torch.equal(batch, again)
    torch.testing.assert_close(batch[1:], alone, atol=1e-4, rtol=0)
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_pictures_of_one_prompt_stand_together_and_each_has_its_negative_prompt(pipe):
    negatives = ["star", "red"]
    batch = pipe(
        PROMPTS, negative_prompt=negatives, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **CALL
    )
    plain = pipe(PROMPTS, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **CALL).images
    for i in range(4):
        alone = pipe(PROMPTS[i // 2], negative_prompt=negatives[i // 2], generator=seeds(i), **CALL).images
        torch.testing.assert_close(batch.images[i : i + 1], alone, atol=1e-4, rtol=0)
        assert (alone - plain[i : i + 1]).abs().max() > 1e-3
    empty = pipe(PROMPTS, negative_prompt="", num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **CALL)
    assert torch.equal(empty.images, plain)


def test_guidance_at_zero_is_the_empty_caption(pipe):
    alone = GlidePipeline(TOKENIZER, pipe.base, sampler="ddim")
    null, zero, other = (
        alone(prompt, guidance_scale=scale, generator=seeds(1)[0], **CALL).images
        for prompt, scale in (("", 1.0), ("a red circle", 0.0), ("a red circle", 1.0))
    )
    torch.testing.assert_close(zero, null, atol=1e-5, rtol=0)
    assert (other - null).abs().max() > 1e-3
    assert zero.shape == (1, 3, 8, 8)


def test_temperature_and_steps_of_the_upsampler(pipe):
    def images(**options):
        return pipe("a star", generator=seeds(1)[0], **{**CALL, **options}).images

    assert not torch.equal(images(), images(upsampler_temperature=0.5))
    assert torch.equal(images(), images(upsampler_temperature=0.997))
    assert not torch.equal(images(), images(upsampler_steps="fast27"))
    cold = images(upsampler_temperature=0)
    other = pipe.upsample(
        "a star",
        GlidePipeline(TOKENIZER, pipe.base)("a star", generator=seeds(1)[0], **CALL).images,
        generator=seeds(9)[0],
        **{key: CALL[key] for key in ("upsampler_steps", "output_type", "progress")},
        upsampler_temperature=0,
    ).images
    torch.testing.assert_close(cold, other, atol=1e-5, rtol=0)


def test_output_types_are_one_picture(pipe):
    def images(kind):
        return pipe(PROMPTS, generator=seeds(1)[0], **{**CALL, "output_type": kind}).images

    x, tensor, array, pil = (images(kind) for kind in ("latent", "pt", "np", "pil"))
    assert torch.equal(tensor, (x / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert [p.size for p in pil] == [(16, 16)] * 2
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() < 0.5001 / 255 + 1e-6
    assert isinstance(pipe("a star", return_dict=False, **CALL), tuple)


def test_a_callback_replaces_what_the_next_step_sees(pipe):
    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step in (3, 6) else None

    assert (pipe("a star", callback_on_step_end=callback, **CALL).images == 0.25).all()


# Inpainting.


@pytest.mark.parametrize("sampler", KINDS_OF_SAMPLERS)
def test_outside_the_mask_the_picture_is_the_given_one(inpainter, sampler):
    call = {**CALL, "sampler": sampler, "upsampler_sampler": sampler}
    kept = hole() == 0
    found = inpainter.inpaint(PROMPTS, picture(), hole(), generator=seeds(1, 2), **call).images
    for image in found:
        assert torch.equal(image[:, kept[0, 0]], picture()[0][:, kept[0, 0]])
    assert (found[0] - found[1])[:, ~kept[0, 0]].abs().max() > 0.1


def test_pil_pictures_and_masks(inpainter):
    pixels = ((picture()[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    white = Image.fromarray((hole()[0, 0] * 255).to(torch.uint8).numpy())
    call = {**CALL, "generator": seeds(1)[0], "output_type": "pil"}
    (found,) = inpainter.inpaint("a star", image, white, **call).images
    kept = np.asarray(white) == 0
    assert np.array_equal(np.asarray(found)[kept], np.asarray(image)[kept])
    assert not np.array_equal(np.asarray(found), np.asarray(image))
    tensor = (pixels.permute(2, 0, 1)[None].float()) / 127.5 - 1
    (same,) = inpainter.inpaint(
        "a star", tensor, hole().bool()[0, 0], **{**call, "generator": seeds(1)[0]}
    ).images
    assert np.array_equal(np.asarray(same), np.asarray(found))


def test_a_mask_of_the_base_s_size_is_enlarged(inpainter):
    small = torch.zeros(8, 8)
    small[2:5, 3:7] = 1
    large = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
    one, other = (
        inpainter.inpaint("a star", picture(), mask, generator=seeds(1)[0], **CALL).images
        for mask in (small, large)
    )
    assert torch.equal(one, other)


def test_each_prompt_can_have_its_own_picture_and_mask(inpainter):
    images = torch.cat([picture(), -picture()])
    masks = torch.cat([hole(), hole().transpose(2, 3)])
    call = {**CALL, "num_images_per_prompt": 2}
    batch = inpainter.inpaint(PROMPTS, images, masks, generator=seeds(0, 1, 2, 3), **call).images
    for i in range(4):
        alone = inpainter.inpaint(
            PROMPTS[i // 2],
            images[i // 2 : i // 2 + 1],
            masks[i // 2 : i // 2 + 1],
            generator=seeds(i),
            **CALL,
        ).images
        torch.testing.assert_close(batch[i : i + 1], alone, atol=1e-4, rtol=0)


def test_an_upsampler_that_does_not_inpaint_keeps_the_picture_too(inpainter, pipe):
    mixed = GlidePipeline(TOKENIZER, inpainter.base, pipe.upsampler)
    found = mixed.inpaint("a star", picture(), hole(), **CALL).images
    kept = (hole() == 0).expand(1, 3, -1, -1)
    assert torch.equal(found[kept], picture()[kept])


def test_a_network_that_inpaints_makes_pictures_from_nothing(inpainter):
    shown = []
    hook = inpainter.base.unet.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append(kwargs.keys()), with_kwargs=True
    )
    plain = inpainter("a star", generator=seeds(1)[0], **CALL).images
    inpainter.inpaint("a star", picture(), hole(), **CALL)
    hook.remove()
    assert plain.isfinite().all()
    assert "inpaint_image" not in shown[0]
    assert {"inpaint_image", "inpaint_mask"} <= shown[-1]


# Guidance by a gradient.


def brightness(x, t):
    return 40 * x.mean(dim=(1, 2, 3))


def guide(pipe, shape=(3, 8, 8), latents=None, schedule=None):
    space = GuideSpace(shape, latents, schedule or pipe.base.schedule)
    return Guide(lambda labels: score_gradient(brightness), torch.tensor([0]), space)


@pytest.mark.parametrize("sampler", KINDS_OF_SAMPLERS)
def test_every_sampler_of_the_base_follows_the_gradient(pipe, sampler):
    alone = GlidePipeline(TOKENIZER, pipe.base)
    call = {**CALL, "sampler": sampler, "guidance_scale": 2.0}
    bright, plain, dark = (
        alone(PROMPTS, generator=seeds(1, 2), gradient=guide(pipe), gradient_scale=scale, **call).images
        for scale in (1.0, 0.0, -1.0)
    )
    assert dark.mean() < plain.mean() < bright.mean()
    assert torch.equal(plain, alone(PROMPTS, generator=seeds(1, 2), **call).images)


def test_nothing_known_is_moved_by_the_gradient(inpainter):
    seen = []
    inpainter.inpaint(
        "a star",
        picture(),
        hole(),
        gradient=guide(inpainter),
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"]),
        generator=seeds(1)[0],
        **CALL,
    )
    plain = []
    inpainter.inpaint(
        "a star",
        picture(),
        hole(),
        callback_on_step_end=lambda pipe, i, t, tensors: plain.append(tensors["latents"]),
        generator=seeds(1)[0],
        **CALL,
    )
    kept = F.max_pool2d(hole(), 2) == 0
    # In the steps before, the known part has the noise of a learned variance, which sees the rest.
    assert torch.equal(seen[3][:, :, kept[0, 0]], plain[3][:, :, kept[0, 0]])
    assert not torch.equal(seen[3], plain[3])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": (3, 16, 16)}, r"trained on pictures \(3, 16, 16\).* pictures \(3, 8, 8\)"),
        ({"latents": Latents(1.0)}, "trained on latents"),
        ({"schedule": NoiseSchedule.linear()}, "noise of another schedule"),
    ],
)
def test_a_guide_of_another_space_is_refused(pipe, given, said):
    with pytest.raises(InputError, match=said):
        pipe("a star", gradient=guide(pipe, **given), **CALL)


# Folders.


def test_a_folder_gives_the_same_pictures(pipe, tmp_path):
    defaults = {"num_inference_steps": 3, "guidance_scale": 2.0, "upsampler_steps": 4}
    saved = GlidePipeline(
        TOKENIZER, pipe.base, pipe.upsampler, sampler="heun", karras=True, defaults=defaults
    )
    saved.save_pretrained(tmp_path / "model")
    back = GlidePipeline.from_pretrained(tmp_path / "model")
    assert back.defaults == {**defaults, "upsampler_temperature": 0.997}
    assert (back.sampler, back.karras, back.upsampler_sampler) == ("heun", True, "ddim")
    for stage in ("base", "upsampler"):
        assert getattr(back, stage).schedule.to_fields() == getattr(saved, stage).schedule.to_fields()
        assert not getattr(back, stage).unet.training
    call = {"output_type": "latent", "progress": False}
    found, wanted = (p("a star", generator=seeds(1)[0], **call).images for p in (back, saved))
    assert torch.equal(found, wanted)
    half = GlidePipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half("a star", **CALL).images.dtype == torch.float32


def test_a_base_and_an_upsampler_are_joined(pipe, tmp_path):
    GlidePipeline(TOKENIZER, pipe.base, defaults={"guidance_scale": 1.5}).save_pretrained(tmp_path / "base")
    alone = GlidePipeline(TOKENIZER, None, pipe.upsampler, defaults={"upsampler_steps": 3})
    alone.save_pretrained(tmp_path / "upsampler")
    joined = GlidePipeline.from_parts(tmp_path / "base", tmp_path / "upsampler")
    assert (joined.defaults["guidance_scale"], joined.defaults["upsampler_steps"]) == (1.5, 3)
    call = {**CALL, "guidance_scale": 1.5}
    found, wanted = (p("a star", generator=seeds(1)[0], **call).images for p in (joined, pipe))
    assert torch.equal(found, wanted)
    with pytest.raises(ConfigError, match="first has no base network; give the base first"):
        GlidePipeline.from_parts(tmp_path / "upsampler", tmp_path / "base")
    with pytest.raises(InputError, match="upsampler alone; join it with a base"):
        alone("a star")
    with pytest.raises(InputError, match="no upsampler; join one"):
        GlidePipeline.from_pretrained(tmp_path / "base").upsample("a star", picture(8))
    other = GlideTokenizer.from_captions(["other words"], 6, merges=20)
    GlidePipeline(other, None, upsampler_stage(n_vocab=400)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="different tokenizers"):
        GlidePipeline.from_parts(tmp_path / "base", tmp_path / "other")


def test_openai_s_files(pipe, inpainter, tmp_path):
    merges = "\n".join(" ".join(pair) for pair in TOKENIZER.merges)
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
    for kind, models, extra in (("", pipe, {}), ("_inpaint", inpainter, {"inpaint": True})):
        configs = {}
        for name, argument in (("base", "base_config"), ("upsampler", "upsampler_config")):
            unet = getattr(models, name).unet
            torch.save(unet.state_dict(), tmp_path / f"{name}{kind}.pt")
            configs[argument] = dict(unet.config)
        loaded = GlidePipeline.from_openai(
            tmp_path / f"base{kind}.pt",
            tmp_path / f"upsampler{kind}.pt",
            tmp_path / "vocab.bpe",
            **configs,
        )
        found, wanted = (p("a star", generator=seeds(1)[0], **CALL).images for p in (loaded, models))
        assert torch.equal(found, wanted)
        with pytest.raises(CheckpointError, match="does not fit GlideUNet"):
            GlidePipeline.from_openai(tmp_path / f"base{kind}.pt", None, tmp_path / "vocab.bpe", **extra)
    assert loaded.defaults["num_inference_steps"] == 100
    assert loaded.sampler == "ddpm"


def test_another_pipeline_s_folder_is_refused(pipe, pipeline, tmp_path):
    pipeline().save_pretrained(tmp_path / "ldm")
    with pytest.raises(CheckpointError, match="holds an LDMTextToImagePipeline, not a GlidePipeline"):
        GlidePipeline.from_pretrained(tmp_path / "ldm")
    pipe.save_pretrained(tmp_path / "glide")
    with pytest.raises(CheckpointError, match=r"\(a GlidePipeline\) has no part vqvae"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "glide")
    config = tmp_path / "glide" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "variance_type": "fixed_small"}))
    with pytest.raises(CheckpointError, match="learn_sigma=True with variance_type='fixed_small'"):
        GlidePipeline.from_pretrained(tmp_path / "glide")


# What is refused.


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: GlidePipeline(TOKENIZER, None), "a base network, an upsampler, or both; none is given"),
        (lambda: GlidePipeline(TOKENIZER, upsampler_stage()), "given as base is an upsampler"),
        (lambda: GlidePipeline(TOKENIZER, None, base_stage()), "given as upsampler is no upsampler"),
        (lambda: GlidePipeline(TOKENIZER, base_stage(n_vocab=99)), "takes 6 of 99; use the tokenizer"),
        (lambda: GlidePipeline(TOKENIZER, base_stage(text_ctx=7)), "takes 7 of "),
        (
            lambda: GlidePipeline(
                TOKENIZER, base_stage(image_size=12, attention_resolutions=(6,)), upsampler_stage()
            ),
            "size a multiple",
        ),
        (lambda: base_stage(learn_sigma=False), "learn_sigma=False with variance_type='learned_range'"),
        (lambda: base_stage(out_channels=4), "in_channels=3 and out_channels=4 must be the same"),
        (lambda: GlidePipeline(TOKENIZER, base_stage(), sampler="ddimm"), "sampler='ddimm' is not offered"),
        (
            lambda: GlidePipeline(TOKENIZER, base_stage(), defaults={"temperature": 1}),
            "unknown default.*temperature; known: .*upsampler_temperature",
        ),
        (
            lambda: GlidePipeline(TOKENIZER, base_stage(), defaults={"upsampler_temperature": -1.0}),
            "upsampler_temperature=-1.0: give a number from 0",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(build, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": 3}, "prompt must be a caption or a list of captions, not int"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: give a finite number"),
        ({"num_inference_steps": 2000}, "use 1 to 1000"),
        (
            {"num_inference_steps": "fast"},
            "num_inference_steps='fast': use 1 to 1000, a whole number, or 'fast27'",
        ),
        ({"num_inference_steps": 4.5}, "num_inference_steps=4.5.*use 1 to 1000"),
        ({"num_inference_steps": 4.5, "sampler": "unipc"}, "num_inference_steps=4.5.*use 1 to 999"),
        ({"num_inference_steps": "fast27", "sampler": "euler", "karras": True}, "karras=True.*'fast27'"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5: ask for a whole number from 1"),
        ({"upsampler_steps": 0}, "upsampler_steps=0: use 1 to 1000"),
        ({"upsampler_steps": "ddim"}, "upsampler_steps='ddim': use 1 to 1000"),
        ({"upsampler_sampler": "ddimm"}, "upsampler_sampler='ddimm' is not offered"),
        ({"upsampler_temperature": float("inf")}, "upsampler_temperature=inf"),
        ({"output_type": "jpg"}, "output_type='jpg' is not offered"),
        ({"generator": seeds(1)}, "1 generators for a batch of 2"),
        (
            {"latents": torch.zeros(2, 3, 16, 16)},
            r"latents are float32 \(2, 3, 16, 16\); this call needs a float tensor \(2, 3, 8, 8\)",
        ),
        ({"image": picture()}, "image and mask go together"),
        ({"image": picture(8), "mask": hole()}, r"image is float32 \(1, 3, 8, 8\).*\(1 or 2, 3, 16, 16\)"),
        (
            {"image": [], "mask": hole()},
            "image must be a PIL image, a list of them, or a tensor .*a list of 0",
        ),
        (
            {"image": picture(), "mask": hole(12)},
            r"mask is float32 \(1, 1, 12, 12\).*tensor \(8, 8\) or \(16, 16\), or \(1 or 2, 1, ",
        ),
        ({"image": picture(), "mask": hole() / 2}, "values other than 0 and 1"),
        ({"image": picture().to(torch.uint8), "mask": hole()}, "image is uint8.*give float"),
        ({"image": picture(), "mask": [1]}, "mask is list: give a PIL image, or a tensor"),
    ],
)
def test_what_cannot_be_used_is_refused_before_sampling(inpainter, options, said, monkeypatch):
    monkeypatch.setattr(GlideUNet, "forward", None)
    with pytest.raises(InputError, match=said) as caught:
        inpainter(**{"prompt": PROMPTS, **CALL, **options})
    assert "\n" not in str(caught.value)


def test_a_base_that_does_not_inpaint_is_refused(pipe):
    with pytest.raises(InputError, match="not trained to inpaint"):
        pipe.inpaint("a star", picture(), hole())


@pytest.mark.parametrize("steps", [0, 2.5, True, "fast", None])
def test_a_default_that_no_upsampler_can_use_is_refused(pipe, steps):
    with pytest.raises(ConfigError, match="upsampler_steps must be a whole number from 1, or 'fast27'"):
        GlidePipeline(TOKENIZER, pipe.base, defaults={"upsampler_steps": steps})


@pytest.mark.parametrize("low_res", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 0, 8)])
def test_small_pictures_are_floating_and_not_empty(pipe, low_res):
    with pytest.raises(InputError, match=r"low_res .*give float \(2, 3, h, w\)"):
        pipe.upsample(PROMPTS, low_res, upsampler_steps=2, progress=False)


def test_plms_is_refused_where_a_schedule_ends_in_noise_alone(pipe):
    noise = {**UPSAMPLER_NOISE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    zero = GlidePipeline(TOKENIZER, GlideStage(pipe.base.unet, NoiseSchedule(**noise)))
    with pytest.raises(InputError, match=r"sampler 'plms' .*zero SNR.*such as 'ddim'"):
        zero("a star", **{**CALL, "sampler": "plms"})
    assert zero("a star", **{**CALL, "sampler": "ddim"}).images.isfinite().all()


def test_pictures_stay_in_range_where_no_prediction_is_clipped(pipe):
    noise = NoiseSchedule(**{**BASE_NOISE, "clip_sample": False})
    free = GlidePipeline(TOKENIZER, GlideStage(pipe.base.unet, noise))
    seen = {}
    images = free(
        "a star",
        latents=3 * torch.randn(1, 3, 8, 8, generator=seeds(1)[0]),
        callback_on_step_end=lambda pipe, i, t, values: seen.update(values),
        **CALL,
    ).images
    assert seen["latents"].abs().max() > 1.5
    assert torch.equal(images, seen["latents"].clamp(-1, 1))


def test_an_upsampler_of_other_small_pictures_is_refused(pipe, tmp_path):
    other = GlideStage(pipe.upsampler.unet, pipe.upsampler.schedule, low_res=4)
    GlidePipeline(TOKENIZER, pipe.base).save_pretrained(tmp_path / "base")
    GlidePipeline(TOKENIZER, None, other).save_pretrained(tmp_path / "other")
    assert GlidePipeline.from_pretrained(tmp_path / "other").upsampler.low_res == 4
    with pytest.raises(ConfigError, match=r"pictures of 8 pixels, .* enlarge those of 4; .*low_res=8"):
        GlidePipeline.from_parts(tmp_path / "base", tmp_path / "other")
    fits = GlideStage(pipe.upsampler.unet, pipe.upsampler.schedule, low_res=np.int64(8))
    GlidePipeline(TOKENIZER, None, fits).save_pretrained(tmp_path / "fits")
    joined = GlidePipeline.from_parts(tmp_path / "base", tmp_path / "fits")
    joined.save_pretrained(tmp_path / "whole")
    assert GlidePipeline.from_pretrained(tmp_path / "whole").upsampler.low_res == 8
    with pytest.raises(ConfigError, match=r"low_res=8 with super_res=False"):
        GlideStage(pipe.base.unet, pipe.base.schedule, low_res=8)
    index = tmp_path / "fits" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_low_res": "x"}))
    with pytest.raises(CheckpointError, match=r"low_res='x'"):
        GlidePipeline.from_pretrained(tmp_path / "fits")


def test_pil_pictures_are_enlarged_from_the_side_the_upsampler_knows(pipe):
    known = GlidePipeline(
        TOKENIZER, None, GlideStage(pipe.upsampler.unet, pipe.upsampler.schedule, low_res=8)
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8))
    call = {"upsampler_steps": 2, "output_type": "latent", "progress": False}
    found = known.upsample("a star", image, generator=seeds(1)[0], **call).images
    small = image.resize((8, 8), Image.Resampling.BICUBIC)
    wanted = pipe.upsample("a star", small, generator=seeds(1)[0], **call).images
    assert torch.equal(found, wanted)
    assert not torch.equal(found, pipe.upsample("a star", image, generator=seeds(1)[0], **call).images)


def test_parts_of_other_text_windows_are_refused(pipe):
    longer = GlideTokenizer(TOKENIZER.vocab, TOKENIZER.merges, 7)
    other = GlidePipeline(longer, None, upsampler_stage(text_ctx=7))
    with pytest.raises(ConfigError, match=r"different tokenizers, of 6 and 7 tokens per caption.*max_length"):
        GlidePipeline.from_parts(GlidePipeline(TOKENIZER, pipe.base), other)
