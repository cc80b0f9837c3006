"""Saving and loading whole pipelines: nothing is lost, and what does not fit is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import LDMTextToImagePipeline

from fastldm.diffusion import NoiseSchedule
from fastldm.diffusion.samplers import SAMPLERS
from fastldm.diffusion.scheduler_config import class_of, takes_karras
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import ClassConditioner, SpatialConditioner
from fastldm.systems import LatentDiffusionPipeline, folders

CALL = {"num_inference_steps": 2, "output_type": "latent", "progress": False}


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline(defaults={"num_inference_steps": 7, "guidance_scale": 2.5}, scaling_factor=0.7).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_everything_comes_back(pipeline, saved):
    pipe = LatentDiffusionPipeline.from_pretrained(saved)
    assert pipe.defaults == {"num_inference_steps": 7, "guidance_scale": 2.5}
    assert pipe.scaling_factor == 0.7
    assert pipe.sampler == "ddim"
    assert pipe.schedule.to_config() == pipeline().schedule.to_config()
    assert not any(module.training for module in (pipe.unet, pipe.first_stage, pipe.conditioner))
    steps = []
    pipe("a star", callback_on_step_end=lambda *a: steps.append(a[1]), output_type="latent", progress=False)
    assert steps == list(range(7))


@pytest.mark.parametrize(
    ("conditioner", "raw"),
    [
        (ClassConditioner(num_classes=3, embed_dim=16), [1]),
        (SpatialConditioner(in_channels=2, out_channels=3, n_stages=3), torch.ones(1, 2, 64, 64)),
    ],
)
def test_other_conditions_come_back(pipeline, latents, conditioner, raw, tmp_path):
    pipe = pipeline(conditioner)
    pipe.save_pretrained(tmp_path / "model")
    back = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(back.conditioner) is type(conditioner)
    wanted = pipe(raw, latents=latents(1), guidance_scale=2.0, **CALL).images
    assert torch.equal(back(raw, latents=latents(1), guidance_scale=2.0, **CALL).images, wanted)


def test_the_ddpm_sampler_comes_back(pipeline, tmp_path):
    schedule = NoiseSchedule.cosine(variance_type="fixed_large", prediction_type="v_prediction")
    pipe = pipeline(schedule=schedule, sampler="ddpm")
    pipe.save_pretrained(tmp_path)
    back = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert back.sampler == "ddpm"
    assert back.schedule.to_config("DDPMScheduler") == schedule.to_config("DDPMScheduler")


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_and_its_schedule_come_back_and_load_in_the_peer(pipeline, sampler, karras, tmp_path):
    """Also the fields that diffusers' class of the sampler does not have."""
    schedule = NoiseSchedule.scaled_linear(
        steps_offset=1,
        set_alpha_to_one=False,
        variance_type="fixed_large",
        clip_sample=True,
        clip_sample_range=3.0,
        thresholding=True,
        timestep_spacing="trailing",
    )
    if karras and not takes_karras(sampler):
        with pytest.raises(ConfigError, match="can be that of euler, heun, dpmpp_2m, unipc"):
            pipeline(sampler=sampler, karras=True)
        return
    pipeline(schedule=schedule, sampler=sampler, karras=karras).save_pretrained(tmp_path)
    back = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert (back.sampler, back.karras) == (sampler, karras)
    assert back.schedule.to_fields() == schedule.to_fields()
    peer = LDMTextToImagePipeline.from_pretrained(tmp_path).scheduler
    assert type(peer).__name__ == class_of(sampler)
    assert torch.equal(peer.alphas_cumprod, schedule.alphas_cumprod)
    assert peer.config.get("use_karras_sigmas", False) == karras
    assert peer.config.timestep_spacing == "trailing"


def test_a_field_beside_the_scheduler_is_checked(saved, folder):
    change(folder / "model_index.json", _schedule={"clip_simple": True})
    with pytest.raises(CheckpointError, match="clip_simple"):
        LatentDiffusionPipeline.from_pretrained(folder)


def test_a_learned_variance_comes_back(pipeline, latents, tmp_path):
    schedule = NoiseSchedule.scaled_linear(variance_type="learned_range")
    for sampler in ("ddim", "ddpm", "dpmpp_2m"):
        pipe = pipeline(schedule=schedule, sampler=sampler)
        assert pipe.unet.config.out_channels == 8
        pipe.save_pretrained(tmp_path / sampler)
        back = LatentDiffusionPipeline.from_pretrained(tmp_path / sampler)
        assert back.schedule.to_fields() == schedule.to_fields()
        call = {**CALL, "prompt": "a star", "guidance_scale": 2.0, "latents": latents(1)}
        found, wanted = (p(**call, generator=torch.Generator().manual_seed(0)).images for p in (back, pipe))
        assert torch.equal(found, wanted)
        assert found.shape == (1, 4, 8, 8)
    change(tmp_path / "ddpm" / "scheduler" / "scheduler_config.json", variance_type="fixed_small")
    with pytest.raises(CheckpointError, match=r"out_channels is 8, but latents of 4 .*'fixed_small' need 4"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "ddpm")


def test_half_size_export(saved, tmp_path):
    pipe = LatentDiffusionPipeline.from_pretrained(saved)
    pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert size(tmp_path / "half") < 0.6 * size(saved)
    back = LatentDiffusionPipeline.from_pretrained(tmp_path / "half")
    assert back.dtype == torch.float32
    assert torch.equal(back.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())
    assert LatentDiffusionPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_variant_and_other_files_stand_beside_the_rest(folder):
    (folder / "README.md").write_text("ours")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder, variant="fp16", dtype=torch.float16)
    assert (folder / "README.md").read_text() == "ours"
    assert torch.equal(
        LatentDiffusionPipeline.from_pretrained(folder).unet.conv_in.weight, pipe.unet.conv_in.weight
    )
    half = LatentDiffusionPipeline.from_pretrained(folder, variant="fp16")
    assert torch.equal(half.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())


def test_a_save_that_fails_leaves_the_old_one(folder, monkeypatch):
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipe.unet, "save_pretrained", full_disk)
    with torch.no_grad():
        pipe.first_stage.encoder.conv_in.weight.zero_()
    with pytest.raises(CheckpointError, match="No space left"):
        pipe.save_pretrained(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_replaced(pipeline, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no pipeline"):
        pipeline().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no pipeline"):
        pipeline().save_pretrained(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_shipped_models_go_by_name(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"shipped: none"):
        LatentDiffusionPipeline.from_pretrained("squares")
    shutil.copytree(saved, tmp_path / "assets" / "squares")
    assert LatentDiffusionPipeline.from_pretrained("squares").scaling_factor == 0.7
    with pytest.raises(CheckpointError, match=r"no folder 'sqares'.*shipped: squares"):
        LatentDiffusionPipeline.from_pretrained("sqares")
    (tmp_path / "squares").mkdir()
    assert LatentDiffusionPipeline.from_pretrained("squares").scaling_factor == 0.7
    shutil.copytree(saved, tmp_path / "squares", dirs_exist_ok=True)
    change(tmp_path / "squares" / "vqvae" / "config.json", scaling_factor=3.0)
    assert LatentDiffusionPipeline.from_pretrained("squares").scaling_factor == 3.0


def drop(*names):
    def damage(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def cut(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def other_weights(folder):
    change(folder / "unet" / "config.json", layers_per_block=2)


def other_width(folder):
    change(folder / "unet" / "config.json", sample_size=8, cross_attention_dim=24)


def other_stage(folder):
    change(folder / "vqvae" / "config.json", _class_name="AutoencoderKL")


def other_sampler(folder):
    change(folder / "model_index.json", scheduler=["diffusers", "LMSDiscreteScheduler"])


def other_solver(folder):
    change(folder / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    change(folder / "scheduler" / "scheduler_config.json", solver_order=3)


def other_pipeline(folder):
    change(
        folder / "model_index.json",
        _class_name="StableDiffusionPipeline",
        bert=None,
        text_encoder=["transformers", "CLIPTextModel"],
    )


def other_unet(folder):
    change(folder / "model_index.json", unet=["diffusers", "UNet2DModel"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop("model_index.json"), "holds no model_index.json"),
        (drop("unet"), "unet holds no config.json"),
        (drop("bert/model.safetensors"), "bert holds no model.safetensors"),
        (drop("tokenizer"), "holds neither tokenizer.json nor vocab.txt"),
        (drop("scheduler"), "cannot read .*scheduler_config.json"),
        (cut, "cannot read the weights"),
        (other_weights, r"does not fit UNet2DConditionModel: \d+ missing \(.*resnets\.1"),
        (other_width, r"attn2\.to_k\.weight is"),
        (other_stage, "the configuration is of an AutoencoderKL, not of a VQModel"),
        (other_sampler, "LMSDiscreteScheduler is not offered"),
        (other_solver, "DPMSolverMultistepScheduler with solver_order=3 is not offered; use 2"),
        (other_pipeline, r"StableDiffusionPipeline\) has no part bert"),
        (other_unet, "unet is a UNet2DModel; fastldm reads UNet2DConditionModel there"),
    ],
)
def test_folders_that_do_not_fit_are_named(folder, damage, said):
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as raised:
        LatentDiffusionPipeline.from_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_parts_of_two_models_are_told_apart(pipeline, folder, tmp_path):
    pipeline(ClassConditioner(3, 24), context_dim=24).save_pretrained(tmp_path / "other")
    shutil.rmtree(folder / "unet")
    shutil.copytree(tmp_path / "other" / "unet", folder / "unet")
    with pytest.raises(CheckpointError, match="cross_attention_dim is 24, but the condition has 16"):
        LatentDiffusionPipeline.from_pretrained(folder)
