"""`fastldm sample` and `fastldm evaluate`."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastldm import dispatch
from fastldm.cli import common, main
from fastldm.cli import sample as cli_sample
from fastldm.diffusion import NoiseSchedule
from fastldm.diffusion.samplers import SAMPLERS
from fastldm.models import CLIPModel, CLIPTokenizer, GlideTokenizer, GlideUNet
from fastldm.systems import CLIPScorer, GlidePipeline, GlideStage
from fastldm.systems.glide_stage import BASE_NOISE, UPSAMPLER_NOISE
from fastldm.systems.guides import Latents
from fastldm.systems.latent_diffusion import LatentDiffusionPipeline
from fastldm.training.datasets.shapes import vocabulary

CAPTION = "a large red circle at the top left"


@pytest.fixture
def sample(model, tmp_path):
    """sample(*arguments) -> the picture that was written."""

    def run(*arguments):
        out = tmp_path / "out.png"
        assert main(["sample", *arguments, "--model", str(model), "--out", str(out)]) == 0
        return np.asarray(Image.open(out))

    return run


def test_a_caption_becomes_a_picture_and_the_command_says_how(sample, capsys, tmp_path):
    assert sample(CAPTION).shape == (32, 32, 3)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(tmp_path / "out.png")
    words = [line.split() for line in said[1:]]
    ops = {line[0]: line[1:] for line in words}
    assert {"attention", "group_norm", "vq_nearest", "load", "sample"} == ops.keys()
    assert ops["attention"][0] in dispatch.BACKENDS
    assert float(ops["sample"][0]) > 0
    assert ops["sample"][1] == "s"


@pytest.fixture
def glide(tmp_path):
    """Folder of those of an untrained base, `base`, and of two upsamplers, `large` and `other`, which takes
    pictures of another size."""
    tokenizer = GlideTokenizer.from_captions(["a red circle"], 4)
    fields = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    fields["num_head_channels"] = 32
    text = {"n_vocab": tokenizer.vocab_size, "text_ctx": 4, "xf_width": 16, "xf_layers": 1, "xf_heads": 2}
    base, large = (
        GlideStage(GlideUNet(image_size=size, super_res=size == 16, **fields, **text), NoiseSchedule(**noise))
        for size, noise in ((8, BASE_NOISE), (16, UPSAMPLER_NOISE))
    )
    GlidePipeline(tokenizer, base).save_pretrained(tmp_path / "base")
    for name, low_res in (("large", 8), ("other", 4)):
        stage = GlideStage(large.unet, large.schedule, low_res)
        alone = GlidePipeline(tokenizer, None, stage, defaults={"upsampler_steps": 2})
        alone.save_pretrained(tmp_path / name)
    return tmp_path


def test_the_folder_of_a_glide_is_sampled(glide, tmp_path, fails):
    joined = GlidePipeline.from_parts(glide / "base", glide / "large")
    joined.save_pretrained(tmp_path / "glide")
    command = ["--model", str(tmp_path / "glide"), "--num-inference-steps", "2"]
    out = tmp_path / "out.png"
    assert main(["sample", "a red circle", *command, "--sampler", "ddim", "--out", str(out)]) == 0
    assert Image.open(out).size == (16, 16)
    line = fails("evaluate", *command, "--out", tmp_path / "report.json")
    assert "is a GlidePipeline; give one of latent diffusion" in line


def test_an_upsampler_enlarges_what_a_base_of_another_folder_makes(glide, model, fails):
    out = glide / "out.png"
    command = ["sample", "a red circle", "--num-inference-steps", "2", "--out", str(out)]
    base, large = ["--model", str(glide / "base")], ["--upsampler", str(glide / "large")]
    assert main([*command, *base]) == 0
    assert Image.open(out).size == (8, 8)
    assert main([*command, *base, *large]) == 0
    found = np.asarray(Image.open(out))
    GlidePipeline.from_parts(glide / "base", glide / "large").save_pretrained(glide / "whole")
    assert main([*command, "--model", str(glide / "whole")]) == 0
    assert np.array_equal(found, np.asarray(Image.open(out)))
    assert found.shape == (16, 16, 3)
    assert main([*command, *base, *large, "--upsampler-steps", "fast27"]) == 0
    assert not np.array_equal(found, np.asarray(Image.open(out)))
    line = fails(*command, *base, *large, "--upsampler-steps", "fast28")
    assert "upsampler_steps='fast28': use 1 to 1000, a whole number, or 'fast27'" in line
    assert "add --upsampler FOLDER" in fails(*command, *base, "--upsampler-steps", "5")
    line = fails(*command, *base, "--upsampler", glide / "other")
    assert "the upsampler was trained to enlarge those of 4; train one with low_res=8" in line
    assert "second has no upsampler" in fails(*command, *base, "--upsampler", glide / "base")
    assert "is an LDMTextToImagePipeline" in fails(*command, "--model", model, *large)


@pytest.mark.parametrize("flag", ["--model", "--clip", "--upsampler"])
def test_the_name_of_a_folder_is_not_empty(fails, model, flag):
    assert f"argument {flag}: the name is empty; give a folder" in fails("sample", CAPTION, flag, "")


def test_what_has_no_effect_is_said(sample, capfd):
    sample(CAPTION, "--guidance-scale", "1", "--negative-prompt", "a star")
    assert "fastldm: warning: negative_prompt has no effect at guidance_scale=1" in capfd.readouterr().err


def test_the_seed_alone_decides(sample):
    one, same, other = sample(CAPTION), sample(CAPTION), sample(CAPTION, "--seed", "1")
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the pipeline, with its sampler."""
    found = []
    real = LatentDiffusionPipeline.__call__

    def spy(self, prompt, **settings):
        found.append({"prompt": prompt, "sampler": self.sampler, **settings})
        return real(self, prompt, **settings)

    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", spy)
    return found


def test_several_pictures_become_a_grid(sample):
    grid = sample(CAPTION, "a small blue star", "--num-images", "2")
    assert grid.shape[0] > 2 * 32
    assert grid.shape[1] > 2 * 32


@pytest.fixture
def clip(model, tmp_path):
    """Folder of an untrained CLIP of the latents of `model`."""
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    tokenizer = CLIPTokenizer.from_captions([" ".join(vocabulary())], 12)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 12}
    vision = {"num_channels": 4, "image_size": 16, "patch_size": 4, "timestep_conditioning": True}
    text["eos_token_id"] = tokenizer.eos_token_id
    network = CLIPModel({**tower, **text}, {**tower, **vision}, projection_dim=8)
    latents = Latents(pipeline.scaling_factor)
    CLIPScorer(network, tokenizer, schedule=pipeline.schedule, latents=latents).save_pretrained(
        tmp_path / "clip"
    )
    return tmp_path / "clip"


def test_clip_guides_to_the_captions(sample, clip, fails, model, tmp_path, calls):
    plain = sample(CAPTION)
    still = sample(CAPTION, "--clip", str(clip), "--clip-scale", "0")
    guided = sample(CAPTION, "--clip", str(clip), "--clip-scale", "500")
    assert np.array_equal(still, plain)
    assert not np.array_equal(guided, plain)
    sample(CAPTION, "a star", "--clip", str(clip), "--num-images", "2")
    assert [settings["gradient_scale"] for settings in calls] == [None, 0, 500, None]
    x, t = torch.randn(4, 4, 16, 16), torch.tensor([3, 3, 9, 9])
    each = [CAPTION, CAPTION, "a star", "a star"]
    wanted = CLIPScorer.from_pretrained(clip).gradient(each)(x, t)
    assert torch.equal(calls[-1]["gradient"](x, t), wanted)

    command = ["sample", CAPTION, "--model", model, "--out", tmp_path / "out.png"]
    assert "add the folder of a CLIP" in fails(*command, "--clip-scale", "2")
    assert "absent" in fails(*command, "--clip", tmp_path / "absent")
    (clip / "latents.json").write_text('{"scaling_factor": 3.0}')
    assert "another first stage" in fails(*command, "--clip", clip)


def test_words_without_quotes_are_one_caption(sample, capfd):
    assert np.array_equal(sample(*CAPTION.split()), sample(CAPTION))
    assert f"reading the words as one caption, {CAPTION!r}" in capfd.readouterr().err


def test_memory_that_runs_out_is_said_in_one_line(model, fails, monkeypatch, tmp_path):
    def full(*_, **__):
        torch.empty(2**55)

    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", full)
    assert "memory ran out" in fails("sample", CAPTION, "--model", model, "--out", tmp_path / "out.png")


def test_many_pictures_go_through_the_networks_in_parts(sample, clip, calls, monkeypatch):
    monkeypatch.setattr(cli_sample, "_BATCH", 2)
    command = [CAPTION, "a star", "--num-images", "3", "--clip", str(clip), "--clip-scale", "9"]
    parts = sample(*command, "--num-inference-steps", "2")
    batches = [call["prompt"] for call in calls]
    assert batches == [[CAPTION, CAPTION], [CAPTION, "a star"], ["a star", "a star"]]
    monkeypatch.setattr(cli_sample, "_BATCH", 64)
    whole = sample(*command, "--num-inference-steps", "2")
    assert np.abs(parts.astype(int) - whole.astype(int)).max() <= 1


def test_a_caption_that_the_shipped_model_has_not_learned_to_read_is_noted(tmp_path, capfd):
    command = ["--num-inference-steps", "2", "--out", str(tmp_path / "out.png")]
    assert main(["sample", "red red red star", CAPTION, *command]) == 0
    said = capfd.readouterr().err
    assert "'red red red star' is no caption of the kind that this model has learned" in said
    assert CAPTION not in said


def test_flags_reach_the_pipeline(sample, calls):
    sample(CAPTION)
    sample(
        *[CAPTION, "--guidance-scale", "1.5", "--num-inference-steps", "3", "--sampler", "ddim"],
        *["--eta", "1", "--negative-prompt", "a blue star", "--num-images", "2", "--seed", "7"],
    )
    sample(CAPTION, "--sampler", "ddpm")
    sample(CAPTION, "--sampler", "dpmpp_2m", "--karras")
    plain, told, ddpm, karras = calls
    assert (plain["prompt"], told["prompt"]) == ([CAPTION], [CAPTION, CAPTION])
    assert (plain["guidance_scale"], told["guidance_scale"]) == (None, 1.5)
    assert (plain["num_inference_steps"], told["num_inference_steps"]) == (None, 3)
    assert (plain["eta"], told["eta"]) == (0.0, 1.0)
    assert (plain["negative_prompt"], told["negative_prompt"]) == (None, "a blue star")
    assert told["generator"].initial_seed() == 7
    assert (karras["sampler"], karras["karras"], plain["karras"]) == ("dpmpp_2m", True, None)
    assert (plain["sampler"], told["sampler"], ddpm["sampler"]) == ("ddim", "ddim", "ddpm")


def test_another_sampler_than_the_model_s_does_not_take_its_karras_levels(model, tmp_path):
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    pipeline.sampler, pipeline.karras = "euler", True
    pipeline.save_pretrained(tmp_path / "model")

    def picture(folder, *flags):
        out = tmp_path / "out.png"
        assert main(["sample", CAPTION, "--model", str(folder), "--out", str(out), *flags]) == 0
        return np.asarray(Image.open(out))

    karras = picture(model, "--sampler", "euler", "--karras")
    assert np.array_equal(picture(tmp_path / "model"), karras)
    assert np.array_equal(picture(tmp_path / "model", "--sampler", "euler"), karras)
    assert np.array_equal(
        picture(tmp_path / "model", "--sampler", "ddim"), picture(model, "--sampler", "ddim")
    )


def test_the_flag_offers_every_sampler():
    assert list(SAMPLERS) == common.SAMPLERS


def test_a_backend_that_is_named_is_used(sample, capsys):
    sample(CAPTION, "--backend", "reference")
    assert "attention      reference" in capsys.readouterr().out


def test_the_backend_of_the_environment_is_used_unless_a_flag_names_another(sample, capsys, monkeypatch):
    monkeypatch.setenv("FASTLDM_BACKEND", "reference")
    sample(CAPTION)
    assert "attention      reference" in capsys.readouterr().out
    sample(CAPTION, "--backend", "torch")
    assert "attention      torch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "absent"], "absent"),
        (["--num-images", "0"], "--num-images 0 for 1 captions: give 1 or more"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--num-inference-steps", "1001"], "num_inference_steps=1001"),
        (["--eta", "2"], "eta"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "99999999999999999999"], "below 2^63"),
        (["--guidance-scale", "nan"], "nan is not a guidance scale"),
        (["--guidance-scale", "-3"], "-3 is not a guidance scale"),
        (["--backend", "tritton"], "backend tritton is not known; use one of: auto, reference"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta computes nothing"),
        (["--guidance-scale", "abc"], "abc is not a guidance scale"),
        (["--num-images", "9999999999999"], "up to 4096 pictures in all"),
        (["--negative-prompt", "a zebra"], "'zebra'"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(fails, model, tmp_path, flags, said):
    assert said in fails("sample", CAPTION, "--model", model, "--out", tmp_path / "out.png", *flags)
    assert not (tmp_path / "out.png").exists()


def test_a_picture_is_not_written_under_the_name_of_another_format(fails, tmp_path):
    assert "end the name in .png" in fails("sample", CAPTION, "--out", tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("model_index.json", '"num_inference_steps": ', '"num_inference_steps": "x", "was": '),
        ("unet/config.json", '"block_out_channels": [', '"block_out_channels": "ninety", "was": ['),
        ("scheduler/scheduler_config.json", '"num_train_timesteps": ', '"num_train_timesteps": "x'),
    ],
)
def test_a_folder_whose_settings_are_of_another_type(fails, model, tmp_path, file, old, new):
    broken = shutil.copytree(model, tmp_path / "broken")
    text = (broken / file).read_text()
    assert old in text
    (broken / file).write_text(text.replace(old, new))
    line = fails("sample", CAPTION, "--model", broken, "--out", tmp_path / "out.png")
    assert str(broken) in line


def test_words_the_model_has_never_seen_are_named(fails, model, tmp_path):
    line = fails("sample", "a large crimson circle", "--model", model, "--out", tmp_path / "out.png")
    assert "'crimson'" in line
    assert "circle" in line


def test_a_caption_longer_than_the_window_is_cut_and_said(sample, capfd):
    sample("a red circle " * 4 + "at the top left")
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastldm: warning: ")]
    assert len(warnings) == 1
    assert "'red circle at the top left' is cut off" in warnings[0]


@pytest.mark.parametrize("out", ["absent/out.png", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(fails, tmp_path, monkeypatch, out):
    def load(arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastldm.cli.sample.load_pipeline", load)
    assert "cannot write" in fails("sample", CAPTION, "--out", tmp_path / out)


def test_an_output_that_fails_while_it_is_written(fails, model, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    out.write_bytes(b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in fails("sample", CAPTION, "--model", model, "--out", out)
    assert out.read_bytes() == b"old"


def test_a_checkpoint_of_another_architecture_names_the_keys(fails, model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "unet" / "config.json").read_text())
    (broken / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    line = fails("sample", CAPTION, "--model", broken, "--out", tmp_path / "out.png")
    assert "missing (down_blocks." in line


def test_evaluate_writes_numbers_and_pictures(model, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    flags = ["--num-captions", "2", "--guidance-scale", "1", "2", "--num-inference-steps", "1"]
    assert main(["evaluate", "--model", str(model), "--out", str(out), *flags]) == 0
    report = json.loads(out.read_text())
    assert report["num_captions"] == 2
    scales = {row["guidance_scale"] for row in report["rows"] if row["pictures"] == "samples"}
    assert scales == {1.0, 2.0}
    assert Image.open(tmp_path / "numbers.png").width > 32
    said = capsys.readouterr().out
    assert "held-out" in said
    assert str(out) in said


def test_evaluate_refuses_what_it_cannot_do(fails, model, tmp_path):
    assert "cannot write" in fails("evaluate", "--out", tmp_path / "absent" / "x.json")
    assert "give the JSON's name" in fails("evaluate", "--out", tmp_path / "x.png")
    line = fails("evaluate", "--model", model, "--num-captions", "0", "--out", tmp_path / "x.json")
    assert "num_captions" in line
