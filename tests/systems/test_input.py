"""What every pipeline's call refuses, and of what it warns: alike, in one line, before a step is made."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.errors import FastLDMError, InputError
from fastldm.systems import GlidePipeline
from tests.systems.test_glide import PROMPTS, TOKENIZER, base_stage, upsampler_stage

CALL = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent", "progress": False}


@pytest.fixture(params=["latent diffusion", "glide"])
def pipe(request, pipeline):
    if request.param == "glide":
        return GlidePipeline(TOKENIZER, base_stage())
    return pipeline()


def evaluations(pipe):
    """A list that grows with every step."""
    steps = []
    unet = pipe.base.unet if isinstance(pipe, GlidePipeline) else pipe.unet
    unet.register_forward_pre_hook(lambda *a: steps.append(1))
    return steps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_inference_steps": "2"}, "num_inference_steps='2': "),
        ({"num_inference_steps": True}, "num_inference_steps=True: "),
        ({"generator": 3}, r"generator: int is none; give torch\.Generator\(\)\.manual_seed\(0\)"),
        ({"generator": [3]}, "generator: int is none"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"latents are ndarray of float64 .* needs a float tensor \(1,"),
        ({"latents": torch.zeros(1, 4, 8, 8).long()}, "latents are int64"),
        ({"latents": "nan"}, "latents hold NaN or infinity"),
        ({"prompt": "a \udcff circle"}, "prompt, item 0, 'a .*udcff circle', is no text in Unicode"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt='2'"),
        ({"eta": "0"}, "eta='0'"),
        ({"guidance_scale": "2"}, "guidance_scale='2'"),
        ({"guidance_scale": True}, "guidance_scale=True"),
        ({"gradient_scale": "2"}, "gradient_scale='2': give a finite number"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is int: give a function"),
        ({"prompt": [1]}, "prompt must be a caption or a list of captions, but its item 0 is 1, not text"),
        ({"prompt": None}, "prompt must be a caption or a list of captions, not NoneType"),
        ({"prompt": []}, "there is no prompt; give at least one"),
        ({"negative_prompt": [None]}, "negative_prompt.* item 0 is None, not text"),
    ],
)
def test_what_cannot_be_used_is_one_line_before_any_step(pipe, options, said):
    steps = evaluations(pipe)
    if isinstance(options.get("latents"), str):
        shape = pipe("a star", **CALL).images.shape
        options = {"latents": torch.full(shape, torch.nan)}
        steps.clear()
    with pytest.raises(InputError, match=said) as caught:
        pipe(**{"prompt": "a star", **CALL, **options})
    assert "\n" not in str(caught.value)
    assert steps == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "gave int at step 0"),
        ({"latents": 3}, r"gave \{'latents': int\} at step 0"),
        ({"latents": torch.zeros(1)}, r"gave \{'latents': float32 \(1,\)\}"),
        ({"latent": torch.zeros(1)}, r"gave \{'latent': float32"),
    ],
)
def test_a_callback_gives_latents_or_nothing(pipe, given, said):
    with pytest.raises(InputError, match=rf"callback_on_step_end {said}.*must give None or .\"latents\": a"):
        pipe("a star", callback_on_step_end=lambda *a: given, **CALL)
    for nothing in (None, {}):
        plain = pipe("a star", generator=torch.Generator().manual_seed(0), **CALL).images
        found = pipe(
            "a star",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=lambda *a, nothing=nothing: nothing,
            **CALL,
        ).images
        assert torch.equal(found, plain)


def test_numbers_may_be_of_numpy_or_torch(pipe):
    def pictures(number, whole):
        options = {
            "guidance_scale": number(3.0),
            "eta": number(0.5),
            "gradient_scale": number(2.0),
            "num_inference_steps": whole(2),
            "num_images_per_prompt": whole(2),
        }
        noise = torch.Generator().manual_seed(0)
        call = {**CALL, **options, "sampler": "ddim", "gradient": lambda x, t: x.sin()}
        return pipe(np.str_("a star"), generator=noise, **call).images

    wanted = pictures(float, int)
    for number, whole in ((np.float32, np.int64), (torch.tensor, np.int32), (np.array, int)):
        assert torch.equal(pictures(number, whole), wanted)


def test_what_has_no_effect_is_said_at_the_user_s_line(pipe):
    def said(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipe("a star", **{**CALL, **options})
        assert {warning.filename for warning in caught} <= {__file__}
        return [str(warning.message) for warning in caught]

    assert said(gradient_scale=3.0) == ["gradient_scale has no effect without a gradient"]
    unguided = {"guidance_scale": 1.0, "negative_prompt": "a circle"}
    assert said(**unguided) == ["negative_prompt has no effect at guidance_scale=1"]
    assert said(negative_prompt="a circle") == []
    assert said(gradient=lambda x, t: x, gradient_scale=0.0) == []


def test_the_rescaling_of_guidance_is_a_fraction_and_needs_guidance(pipeline):
    with pytest.raises(InputError, match="guidance_rescale='1': use a value between 0 and 1"):
        pipeline()("a star", guidance_rescale="1", **CALL)
    with pytest.warns(UserWarning, match="guidance_rescale has no effect at guidance_scale=1"):
        pipeline()("a star", **{**CALL, "guidance_scale": 1.0}, guidance_rescale=0.5)


def test_sizes_are_whole_numbers(pipeline):
    with pytest.raises(InputError, match="height='64', width=64: use multiples of 8"):
        pipeline()("a star", height="64", **CALL)


@pytest.fixture(scope="module")
def inpainter():
    torch.manual_seed(0)
    return GlidePipeline(TOKENIZER, base_stage(inpaint=True), upsampler_stage(inpaint=True))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Image.new("L", (0, 0)), "mask: a picture of 0x0 pixels"),
        (torch.zeros(12, 12), r"mask is float32 \(12, 12\): .*\(8, 8\) or \(16, 16\), or \(1, 1, "),
        (torch.zeros(3, 1, 16, 16), r"mask is float32 \(3, 1, 16, 16\): "),
        (np.zeros((16, 16)), r"mask is ndarray of float64 \(16, 16\): give a PIL image, or a tensor"),
    ],
)
def test_masks_that_do_not_fit_are_said_as_they_were_given(inpainter, given, said):
    with pytest.raises(InputError, match=said):
        inpainter.inpaint("a star", torch.zeros(1, 3, 16, 16), given, **CALL)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Image.new("RGB", (0, 5)), "a picture of 0x5 pixels"),
        ([Image.new("RGB", (8, 8)), 3], "must be a PIL image, a list of them, or a tensor .*a list of 2"),
        ("a.png", "must be a PIL image, .* not str"),
        (np.zeros((16, 16, 3)), "must be a PIL image, .* not ndarray of float64"),
    ],
)
def test_pictures_have_pixels(inpainter, given, said):
    with pytest.raises(InputError, match=f"image.*{said}") as caught:
        inpainter.inpaint("a star", given, torch.zeros(16, 16), **CALL)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"low_res.*{said}"):
        inpainter.upsample(PROMPTS, given, upsampler_steps=2, progress=False)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_and_masks_have_8_bits(inpainter, dtype):
    """PIL would make those of more white all over, and a mask of floats black."""
    deep = Image.fromarray(np.ones((16, 16), dtype))
    known, mask = torch.zeros(1, 3, 16, 16), torch.zeros(16, 16)
    for image, paint, name in ((deep, mask, "image"), (known, deep, "mask")):
        with pytest.raises(InputError, match=rf"{name}: a picture of mode {deep.mode} .* RGB or L"):
            inpainter.inpaint("a star", image, paint, **CALL)
    with pytest.raises(InputError, match=f"low_res: a picture of mode {deep.mode}"):
        inpainter.upsample(PROMPTS[0], deep, upsampler_steps=2, progress=False)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_mask_of_any_mode_is_white_from_the_middle_on(inpainter, mode):
    grey = np.repeat(np.uint8([[0, 127, 128, 255]]), 16, axis=0).repeat(4, axis=1)
    picture = Image.fromarray(np.where(grey < 128, 0, 255).astype(np.uint8) if mode in "1P" else grey)
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    image, white = torch.zeros(1, 3, 16, 16), torch.zeros(16, 16)
    white[:, 8:] = 1
    found, wanted = (
        inpainter.inpaint("a star", image, mask, generator=g, **CALL).images
        for mask, g in zip((picture.convert(mode), white), noise)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN or infinity"), (255.0, "numbers up to 255")])
def test_pixels_are_in_their_range(inpainter, value, said):
    given = torch.zeros(1, 3, 16, 16)
    given[0, 1, 2, 3] = value
    with pytest.raises(InputError, match=rf"the pixels of the image hold {said}: give pictures in \[-1, 1\]"):
        inpainter.inpaint("a star", given, torch.zeros(16, 16), **CALL)
    with pytest.raises(InputError, match=f"the pixels of low_res hold {said}"):
        inpainter.upsample("a star", given[..., :8, :8], upsampler_steps=2, progress=False)


def test_what_is_transparent_stands_on_white(inpainter):
    clear, white = (Image.new("RGBA", (16, 16), colour) for colour in ((9, 9, 9, 0), (255, 255, 255, 255)))
    found, wanted = (
        inpainter.inpaint("a star", picture, torch.zeros(16, 16), **CALL).images for picture in (clear, white)
    )
    assert torch.equal(found, wanted)
    assert found.min() == 1


def test_inpainting_wants_a_picture_and_a_mask(inpainter):
    for image, mask, name in ((None, None, "image"), (torch.zeros(1, 3, 16, 16), None, "mask")):
        with pytest.raises(InputError, match=f"there is no {name} to inpaint"):
            inpainter.inpaint("a star", image, mask, **CALL)


def test_small_pictures_are_of_the_size_that_an_upsampler_was_trained_on():
    stage = replace(upsampler_stage(), low_res=8)
    upsampler = GlidePipeline(TOKENIZER, None, stage)
    with pytest.raises(InputError, match=r"\(1, 3, 4, 8\), but .* trained to enlarge 8x8 pixels"):
        upsampler.upsample("a star", torch.zeros(1, 3, 4, 8), upsampler_steps=2, progress=False)


@pytest.mark.filterwarnings("error")
def test_an_upsampler_that_is_not_there_is_not_told(pipe):
    if isinstance(pipe, GlidePipeline):
        for name, value in (("steps", 3), ("temperature", 0.5), ("sampler", "ddim")):
            with pytest.warns(
                UserWarning, match=f"upsampler_{name} has no effect without an upsampler"
            ) as caught:
                pipe("a star", **CALL, **{f"upsampler_{name}": value})
            assert caught[0].filename == __file__


def test_samples_of_nan_are_said(pipe):
    call = {**CALL, "output_type": "pil", "gradient": lambda x, t: x * math.nan}
    with pytest.warns(UserWarning, match="the samples hold NaN or infinity"):
        pipe("a star", **call)


@pytest.mark.parametrize("dtype", ["float16", torch.int8])
def test_a_dtype_that_is_none(pipe, dtype, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(FastLDMError, match=f"torch_dtype={dtype!r}: give a floating dtype"):
        type(pipe).from_pretrained(tmp_path / "model", torch_dtype=dtype)


@pytest.mark.parametrize("steps", [0, "ten", True, 2.5, 2000])
def test_steps_of_the_upsampler_are_named_so(inpainter, steps):
    with pytest.raises(InputError, match=rf"upsampler_steps={steps!r}: use 1 to 1000, .* or 'fast27'"):
        inpainter("a star", **CALL, upsampler_steps=steps)


def test_defaults_of_numpy_are_stored_as_plain_numbers(pipe, tmp_path):
    parts = (TOKENIZER, pipe.base) if isinstance(pipe, GlidePipeline) else None
    if parts is None:
        parts = (pipe.first_stage, pipe.conditioner, pipe.unet, pipe.schedule)
    defaults = {"num_inference_steps": np.int64(3), "guidance_scale": torch.tensor(2.0)}
    type(pipe)(*parts, defaults=defaults).save_pretrained(tmp_path / "model")
    loaded = type(pipe).from_pretrained(tmp_path / "model").defaults
    assert (loaded["num_inference_steps"], loaded["guidance_scale"]) == (3, 2.0)
