"""CLIP at work: the loss against its formula, scores and folders against transformers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel as PeerCLIP
from transformers import CLIPTokenizerFast as PeerTokenizer

from fastldm.diffusion import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.models import CLIPModel, CLIPTokenizer
from fastldm.systems import CLIPScorer
from fastldm.systems.clip import clip_loss
from fastldm.systems.guides import Latents

try:
    from transformers import CLIPImageProcessorPil as PeerProcessor
except ImportError:  # transformers 4 has that one alone, under the name that 5 gave to another
    from transformers import CLIPImageProcessor as PeerProcessor

CAPTIONS = ["a large red circle", "a small blue star at the top left", "green"]


def build(**vision):
    tokenizer = CLIPTokenizer.from_captions(CAPTIONS, 20)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 20,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = CLIPModel(
        {**small, **text}, {**small, "image_size": 32, "patch_size": 8, **vision}, projection_dim=24
    ).eval()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


@pytest.fixture
def scorer():
    return CLIPScorer(*build())


def photographs():
    rng = np.random.default_rng(0)
    sizes = ((40, 70), (33, 32), (90, 50), (32, 32), (20, 25))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_loss_is_that_of_the_paper_s_figure_3():
    images, texts, t = torch.randn(6, 8), torch.randn(6, 8), torch.tensor(2.0)
    i, e = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (images, texts))
    logits = i @ e.T * math.exp(2.0)
    wanted = -(logits.log_softmax(0).diagonal().mean() + logits.log_softmax(1).diagonal().mean()) / 2
    loss, accuracy = clip_loss(images, texts, t)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == torch.arange(6)).double().mean().item())
    loss, accuracy = clip_loss(images, 3 * images, torch.tensor(math.log(100.0)))
    assert accuracy == 1


def test_the_loss_is_float32_under_autocast():
    images, texts, t = torch.randn(6, 8), torch.randn(6, 8), torch.tensor(math.log(100.0))
    plain, _ = clip_loss(images, texts, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(clip_loss(images, texts, t)[0], plain)


@torch.no_grad()
def test_scores_are_transformers(scorer, tmp_path):
    scorer.save_pretrained(tmp_path)
    model, tokenizer = PeerCLIP.from_pretrained(tmp_path).eval(), PeerTokenizer.from_pretrained(tmp_path)
    processor = PeerProcessor.from_pretrained(tmp_path)
    pictures = photographs()
    pixels = processor(pictures, return_tensors="pt").pixel_values
    close(scorer.prepare(pictures), pixels)
    ids = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")
    wanted = model(pixel_values=pixels, **ids).logits_per_image
    close(scorer.scores(pictures, CAPTIONS), wanted)
    close(CLIPScorer.from_pretrained(tmp_path).scores(pictures, CAPTIONS), wanted)
    close(scorer.classify(pictures, CAPTIONS), wanted.softmax(dim=1))
    assert wanted.std() > 0.1


def test_a_folder_that_transformers_wrote_loads(scorer, tmp_path):
    scorer.save_pretrained(tmp_path / "ours")
    for peer in (PeerCLIP, PeerTokenizer, PeerProcessor):
        peer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded, pictures = CLIPScorer.from_pretrained(tmp_path / "theirs"), photographs()
    close(loaded.scores(pictures, CAPTIONS), scorer.scores(pictures, CAPTIONS))
    assert loaded.tokenizer.max_length == 20


def test_tensors_are_prepared_as_the_pictures_they_are(scorer):
    (picture,) = [p for p in photographs() if p.size == (32, 32)]
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    close(scorer.prepare(tensor), scorer.prepare(picture))
    assert scorer.scores(tensor, "green").shape == (1, 1)


def test_templates_are_averaged_on_the_sphere(scorer):
    labels, templates, pictures = ["red", "blue"], ["a {} star", "large {}"], photographs()
    texts = scorer.encode_texts([t.format(label) for label in labels for t in templates])
    close(texts.norm(dim=1), torch.ones(4))
    classes = texts.view(2, 2, -1).mean(1)
    classes = classes / classes.norm(dim=1, keepdim=True)
    wanted = scorer.encode_images(pictures) @ classes.T * scorer.model.logit_scale.exp()
    close(scorer.classify(pictures, labels, templates), wanted.softmax(1).detach())


def test_noised_clip_keeps_its_schedule_and_reads_the_timestep(tmp_path):
    scorer = CLIPScorer(*build(timestep_conditioning=True), schedule=NoiseSchedule.cosine(50))
    scorer.save_pretrained(tmp_path)
    loaded, pictures = CLIPScorer.from_pretrained(tmp_path), photographs()
    assert torch.equal(loaded.schedule.alphas_cumprod, scorer.schedule.alphas_cumprod)
    late = scorer.scores(pictures, CAPTIONS, timestep=40)
    close(loaded.scores(pictures, CAPTIONS, timestep=40), late)
    assert (late - scorer.scores(pictures, CAPTIONS, timestep=0)).abs().max() > 1e-2


@pytest.mark.parametrize("noised", [False, True])
def test_the_gradient_is_that_of_the_similarity(noised):
    schedule = NoiseSchedule.cosine(50) if noised else None
    scorer = CLIPScorer(*build(timestep_conditioning=noised), schedule=schedule)
    if noised:
        torch.nn.init.normal_(scorer.model.vision_model.time_embedding.linear_2.weight, std=0.2)
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([2, 30, 49])
    gradient = scorer.gradient(CAPTIONS)(x, t)

    def similarity(x):
        return scorer.scores(x, CAPTIONS, timestep=t if noised else None).diagonal()

    step, direction = 1e-2, torch.randn_like(x)
    wanted = (similarity(x + step * direction) - similarity(x - step * direction)) / (2 * step)
    # Central differences of float32: an error of about step^2 and of 1e-6 / step.
    found = (gradient * direction).sum(dim=(1, 2, 3))
    torch.testing.assert_close(found, wanted, atol=1e-2 * wanted.abs().max().item(), rtol=0)
    assert wanted.abs().min() > 5e-2 * wanted.abs().max()
    one = scorer.gradient(CAPTIONS[1])(x, t)
    torch.testing.assert_close(one[1], gradient[1], atol=1e-5, rtol=1e-4)
    assert torch.equal(scorer.gradient(CAPTIONS)(x, t + 0), gradient)
    assert torch.equal(scorer.gradient(CAPTIONS)(x, t - 1), gradient) != noised


def test_a_clip_of_latents_keeps_which_ones_and_guides_them_alone(pipeline, tmp_path):
    pipe = pipeline()
    vision = {"num_channels": 4, "image_size": 8, "patch_size": 2, "timestep_conditioning": True}
    latents = Latents(pipe.scaling_factor, "0" * 64)
    made = CLIPScorer(*build(**vision), schedule=pipe.schedule, latents=latents)
    made.save_pretrained(tmp_path)
    scorer, x = CLIPScorer.from_pretrained(tmp_path), torch.randn(2, 4, 8, 8)
    assert scorer.latents == latents
    assert not (tmp_path / "preprocessor_config.json").exists()
    close(scorer.prepare(x), x)
    assert torch.equal(scorer.scores(x, CAPTIONS, timestep=3), made.scores(x, CAPTIONS, timestep=3))
    with pytest.raises(
        InputError, match=r"takes latents \(4, 8, 8\), not pictures; give .*`pipeline\.encode"
    ):
        scorer.scores(photographs(), CAPTIONS, timestep=0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 10, "output_type": "latent", "progress": False, "latents": noise}
    plain = scorer.scores(pipe(["a star"] * 2, **call).images, CAPTIONS[:2], timestep=0)
    guided = pipe(["a star"] * 2, gradient=scorer.gradient(CAPTIONS[:2]), gradient_scale=300.0, **call).images
    assert (scorer.scores(guided, CAPTIONS[:2], timestep=0) - plain).diagonal().min() > 0.1
    with pytest.raises(InputError, match="another first stage"):
        pipeline(scaling_factor=1.0)("a star", gradient=scorer.gradient("green"), progress=False)
    with pytest.raises(InputError, match=r"trained on pictures \(3, 32, 32\)"):
        pipe("a star", gradient=CLIPScorer(*build()).gradient("green"), progress=False)


def test_what_cannot_be_used_is_refused(scorer, tmp_path):
    model, tokenizer = scorer.model, scorer.tokenizer
    with pytest.raises(ConfigError, match="up to 30 tokens"):
        CLIPScorer(model, CLIPTokenizer.from_captions(CAPTIONS, 30))
    with pytest.raises(ConfigError, match="1 means and 3 deviations"):
        CLIPScorer(model, tokenizer, image_mean=[0.5])
    with pytest.raises(ConfigError, match="timestep_conditioning=True"):
        CLIPScorer(model, tokenizer, schedule=NoiseSchedule.cosine())
    with pytest.raises(InputError, match=r"pictures must be a PIL image, .* not a list of 1"):
        scorer.scores(["picture.png"], CAPTIONS)
    with pytest.raises(InputError, match=r"pictures must be a PIL image, .* not a list of 0"):
        scorer.scores([], CAPTIONS)
    with pytest.raises(InputError, match="uint8"):
        scorer.scores(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), CAPTIONS)
    with pytest.raises(InputError, match="resize"):
        scorer.scores(torch.zeros(1, 3, 40, 40), CAPTIONS)
    with pytest.raises(InputError, match="1 channels"):
        scorer.scores(torch.zeros(1, 1, 32, 32), CAPTIONS)
    with pytest.raises(InputError, match="labels must be a list of at least one"):
        scorer.classify(photographs(), "red")
    with pytest.raises(InputError, match="where the label goes"):
        scorer.classify(photographs(), ["red"], ["a star"])
    scorer.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    written = json.loads(file.read_text())
    for change, said in (({"do_normalize": False}, "do_normalize=false"), ({"size": 40}, "another size")):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises(CheckpointError, match=said):
            CLIPScorer.from_pretrained(tmp_path)


@pytest.mark.parametrize("timestep", [-1, 50, "3", True, [1, 2], math.nan, torch.tensor([60] * 5), None])
def test_noised_clip_is_told_a_timestep_of_its_schedule(timestep):
    scorer = CLIPScorer(*build(timestep_conditioning=True), schedule=NoiseSchedule.cosine(50))
    pictures = photographs()
    for call in (
        lambda: scorer.encode_images(pictures, timestep),
        lambda: scorer.scores(pictures, "green", timestep),
        lambda: scorer.classify(pictures, CAPTIONS, timestep=timestep),
    ):
        with pytest.raises(InputError, match=r"timestep.* 0 \(no noise\) to 49, one or one per sample"):
            call()
    close(scorer.scores(pictures, "green", [49] * 5), scorer.scores(pictures, "green", torch.tensor(49)))


def test_a_clip_that_saw_no_noise_takes_no_timestep(scorer):
    with pytest.raises(InputError, match="timestep=0, but this model was trained on x without noise"):
        scorer.scores(photographs(), "green", timestep=0)
    with pytest.raises(ConfigError, match="timestep_conditioning=True, and a schedule is missing"):
        CLIPScorer(*build(timestep_conditioning=True))


@pytest.mark.parametrize("outside", [-1, 50])
def test_a_gradient_is_of_timesteps_of_the_schedule(outside):
    scorer = CLIPScorer(*build(timestep_conditioning=True), schedule=NoiseSchedule.cosine(50))
    gradient, x = scorer.gradient("green"), torch.randn(2, 3, 32, 32)
    gradient(x, torch.tensor([0, 49]))
    with pytest.raises(InputError, match=r"timestep=.* to 49"):
        gradient(x, torch.tensor([3, outside]))
    with pytest.raises(InputError, match=r"x is float32 \(2, 3, 16, 16\)"):
        gradient(x[..., :16, :16], torch.tensor([3, 3]))


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([1, 2], {}, "labels must be a name or a list of names, but its item 0 is 1, not text"),
        (3, {}, "labels must be a name or a list of names, not int"),
        ([], {}, "there is no label"),
        (["red"], {"templates": "a {}"}, r"templates must be a list of at least one, such as \['a \{\}'\]"),
        (["red"], {"templates": [3]}, "templates .*item 0 is 3, not text"),
        (["red"], {"templates": []}, "there is no template"),
    ],
)
def test_labels_and_templates_are_lists_of_text(scorer, labels, options, said):
    with pytest.raises(InputError, match=said):
        scorer.classify(photographs(), labels, **options)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (3, "pictures must be a PIL image, .* not int"),
        (Image.new("RGB", (0, 0)), "a picture of 0x0 pixels"),
        ([Image.new("RGB", (5, 0))], "a picture of 5x0 pixels"),
        (torch.zeros(0, 3, 32, 32), r"pictures are float32 \(0, 3, 32, 32\): .* at least one"),
        (np.zeros((32, 32, 3), np.uint8), "not ndarray of uint8"),
    ],
)
def test_pictures_that_show_nothing_are_refused(scorer, pictures, said):
    with pytest.raises(InputError, match=said):
        scorer.scores(pictures, "green")


@pytest.mark.parametrize(("captions", "said"), [([], "no caption"), (3, "not int"), ([1], "item 0 is 1")])
def test_captions_are_text_and_at_least_one(scorer, captions, said):
    for call in (lambda: scorer.scores(photographs(), captions), lambda: scorer.gradient(captions)):
        with pytest.raises(InputError, match=said):
            call()
