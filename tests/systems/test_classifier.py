"""A classifier at work: its gradient against differences, its folder, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.systems import ClassifierGuide
from fastldm.systems.classifier import build_classifier
from fastldm.systems.guides import GuideSpace, Latents

SHAPE = (4, 8, 8)
CLASSES = ["red circle", "blue star", "green square"]
CONFIG = {
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "num_head_channels": 8,
}


@pytest.fixture
def guide():
    torch.manual_seed(0)
    model = build_classifier(CONFIG, SHAPE, 3).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # gradients far above the rounding of finite differences
            torch.nn.init.normal_(parameter, std=0.2)
    return ClassifierGuide(
        model, CLASSES, GuideSpace(SHAPE, Latents(0.5, "f" * 64), NoiseSchedule.cosine(40))
    )


def test_the_gradient_is_that_of_the_label_s_log_probability(guide):
    guide.to(torch.float64)
    # The log-probability is computed from float32 logits: steps of 0.01 keep their rounding below 1e-4.
    x, t, labels = torch.randn(3, *SHAPE), torch.tensor([0, 20, 39]), torch.tensor([2, 0, 1])
    gradient = guide.gradient(labels)(x, t)
    direction = torch.randn_like(x)
    log = [
        guide.classify(x + step * direction, t).log().gather(1, labels[:, None])[:, 0]
        for step in (-0.01, 0.01)
    ]
    wanted = (log[1] - log[0]) / 0.02
    torch.testing.assert_close((gradient * direction).sum(dim=(1, 2, 3)), wanted, atol=2e-3, rtol=2e-3)
    assert wanted.abs().min() > 1e-2


def test_probabilities_are_the_model_s(guide):
    x = torch.randn(2, *SHAPE)
    for t in (7, torch.tensor([7, 30])):
        with torch.no_grad():
            wanted = guide.model(x, t).logits.softmax(1)
        assert torch.equal(guide.classify(x, t), wanted)
    assert not torch.equal(guide.classify(x, 7), guide.classify(x, 30))


def test_pil_images_are_prepared_as_for_training(guide):
    size, model = (3, 8, 8), build_classifier(CONFIG, (3, 8, 8), 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    seeing = ClassifierGuide(model, CLASSES, GuideSpace(size, None, NoiseSchedule.cosine(40)))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), np.uint8)
    pictures = [Image.fromarray(p) for p in pixels]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(seeing.classify(pictures), seeing.classify(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(seeing.classify(pictures[0]), seeing.classify(x[:1]), atol=1e-5, rtol=0)
    wide = Image.new("RGB", (14, 8), "white")  # of which the white ends are cut off
    wide.paste(pictures[1], (3, 0))
    torch.testing.assert_close(seeing.classify([wide]), seeing.classify(x[1:]), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="list of 2"):
        seeing.classify([pictures[0], x])
    with pytest.raises(InputError, match=r"takes latents \(4, 8, 8\), not pictures; give .*pipeline\.encode"):
        guide.classify(pictures)


def test_labels_are_numbers_or_names(guide):
    x, t = torch.randn(2, *SHAPE), torch.tensor([3, 3])
    wanted = guide.gradient([1, 2])(x, t)
    for labels in (
        ["blue star", "green square"],
        torch.tensor([1, 2]),
        ("blue star", 2),
        np.array([1, 2], np.uint8),
        [np.int64(1), np.str_("green square")],
    ):
        assert torch.equal(guide.gradient(labels)(x, t), wanted)
    assert torch.equal(guide.gradient("blue star")(x, t)[0], wanted[0])
    assert torch.equal(guide.gradient(np.int32(1))(x, t)[0], wanted[0])
    for wrong in (3, -1, "star", 1.0, True, [0, None], torch.tensor([0.5]), np.bool_(True), np.float64(1)):
        with pytest.raises(InputError, match=r"is no class; give 0 to 2, or a name \(red circle, "):
            guide.gradient(wrong)


def test_it_guides_the_pipeline_to_its_label(guide, pipeline):
    pipe = pipeline(schedule=NoiseSchedule.cosine(40), scaling_factor=0.5)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 10, "output_type": "latent", "progress": False, "latents": noise}
    prompts = ["a star", "circle"]
    plain = guide.classify(pipe(prompts, **call).images)
    guided = pipe(prompts, gradient=guide.gradient([2, 0]), gradient_scale=300.0, **call).images
    found = guide.classify(guided)
    # Random weights carry x so far that its gradient is small.
    assert found[0, 2] > plain[0, 2] + 3e-3
    assert found[1, 0] > plain[1, 0] + 3e-3
    with pytest.raises(InputError, match="another first stage"):
        pipeline(schedule=NoiseSchedule.cosine(40))("a star", gradient=guide.gradient(0), **call)


def test_a_folder_gives_the_same_guide(guide, tmp_path):
    guide.save_pretrained(tmp_path)
    loaded, x = ClassifierGuide.from_pretrained(tmp_path), torch.randn(2, *SHAPE)
    assert torch.equal(loaded.classify(x, 5), guide.classify(x, 5))
    assert loaded.classes == tuple(CLASSES)
    assert loaded.space.latents == guide.space.latents
    assert loaded.space.shape == SHAPE
    assert torch.equal(loaded.schedule.alphas_cumprod, guide.schedule.alphas_cumprod)


def test_what_cannot_be_used_is_refused(guide, tmp_path):
    with pytest.raises(
        InputError, match=r"x is float32 \(1, 3, 64, 64\), .* scaled latents, float \(B, 4, 8, 8\)"
    ):
        guide.classify(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match="needs the noise schedule"):
        ClassifierGuide(guide.model, CLASSES, GuideSpace(SHAPE, None, None))
    with pytest.raises(ConfigError, match="different names"):
        ClassifierGuide(guide.model, ["a", "b", "a"], guide.space)
    with pytest.raises(ConfigError, match=r"model\.out_channels=7 for data with 3; leave it out"):
        build_classifier({**CONFIG, "out_channels": 7}, SHAPE, 3)
    with pytest.raises(CheckpointError, match=r"classes\.json"):
        ClassifierGuide.from_pretrained(tmp_path)
    guide.save_pretrained(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["one"]}))
    with pytest.raises(CheckpointError, match="must name the model's 3 classes"):
        ClassifierGuide.from_pretrained(tmp_path)
    guide.save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match="needs the noise schedule"):
        ClassifierGuide.from_pretrained(tmp_path)


@pytest.mark.parametrize("timestep", [-1, 40, "3", True, None, [1, 2, 3], torch.tensor([0, 99])])
def test_a_timestep_is_one_of_the_schedule(guide, timestep):
    x = torch.zeros(2, *SHAPE)
    with pytest.raises(InputError, match=r"timestep.* 0 \(no noise\) to 39, one or one per sample"):
        guide.classify(x, timestep)
    for fits in ([39, 39], np.array([39, 39]), np.int16(39), torch.tensor(39)):
        assert torch.equal(guide.classify(x, fits), guide.classify(x, 39))


@pytest.mark.parametrize(
    "x", [[1, 2], 3, np.zeros((2, *SHAPE)), torch.zeros(2, *SHAPE).long(), torch.zeros(0, *SHAPE)]
)
def test_x_is_a_floating_tensor_of_at_least_one_sample(guide, x):
    with pytest.raises(InputError, match=r"x is .* scaled latents, float \(B, 4, 8, 8\)") as caught:
        guide.classify(x)
    assert "\n" not in str(caught.value)


def test_a_gradient_needs_a_label_and_timesteps_of_the_schedule(guide):
    for nothing in ([], torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(InputError, match="there is no label; give at least one of 3 classes"):
            guide.gradient(nothing)
    with pytest.raises(InputError, match=r"timestep=\[40\]: give 0"):
        guide.gradient(0)(torch.zeros(1, *SHAPE), torch.tensor([40]))
