"""Pipelines of diffusers with random weights that run in a fraction of a second.

Each maker returns the pipeline and the arguments of its call. The widths differ on purpose: heads of 8, 12,
16 and 20 channels, one head of 12 in the first stages, groups of 2 to 8 channels.
"""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DOWN_XA, DOWN, DOWN_A = "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"
UP_XA, UP, UP_A = "CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"
STAGE = {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 24),
    "down_block_types": (DOWN, DOWN_XA),
    "up_block_types": (UP_XA, UP),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
CONTROLLED = {
    key: UNET[key]
    for key in (
        "block_out_channels",
        "down_block_types",
        "layers_per_block",
        "cross_attention_dim",
        "attention_head_dim",
        "norm_num_groups",
    )
}
SIMPLE = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Noise(TorchFunctionMode):
    """Random normal numbers in `dtype` that are the same, and exact, whatever it is."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn:
            return func(*args, **{**kwargs, "dtype": torch.float32}).bfloat16().to(self.dtype)
        return func(*args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With tensors of this size, several threads on a busy machine only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights under which every layer matters: unit gain, norms and biases away from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()


@cache
def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, of letters alone."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=77
    )


def text_encoder(kind: type[nn.Module] = CLIPTextModel, width: int = 16, seed: int = 1) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return randomize(kind(config), seed)


def first_stage(**changes) -> nn.Module:
    return randomize(diffusers.AutoencoderKL(**{**STAGE, **changes}), 2)


def unet(**changes) -> nn.Module:
    return randomize(diffusers.UNet2DConditionModel(**{**UNET, **changes}))


def vq_model(**changes) -> nn.Module:
    return randomize(diffusers.VQModel(**{**STAGE, "num_vq_embeddings": 32, **changes}), 2)


def _stable_diffusion(folder: Path) -> dict:
    return {
        "vae": first_stage(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(folder),
        "unet": unet(),
        "scheduler": diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion(folder: Path):
    pipe = diffusers.StableDiffusionPipeline(**_stable_diffusion(folder))
    return pipe, {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "pt"}


def stable_diffusion_img2img(folder: Path):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**_stable_diffusion(folder))
    picture = randn(1, 3, 16, 24).sigmoid().bfloat16().float()
    return pipe, {"prompt": "a star", "image": picture, "num_inference_steps": 4, "output_type": "pt"}


def stable_diffusion_controlnet(folder: Path):
    controlnet = randomize(
        diffusers.ControlNetModel(**CONTROLLED, conditioning_embedding_out_channels=(8, 16)), 3
    )
    pipe = diffusers.StableDiffusionControlNetPipeline(**_stable_diffusion(folder), controlnet=controlnet)
    picture = randn(1, 3, 16, 16).sigmoid().bfloat16().float()
    return pipe, {"prompt": "a star", "image": picture, "num_inference_steps": 2, "output_type": "pt"}


def stable_diffusion_xl(folder: Path):
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=first_stage(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 24),
        tokenizer=tokenizer(folder),
        tokenizer_2=tokenizer(folder),
        unet=unet(
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 3),
            cross_attention_dim=40,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
    )
    return pipe, {"prompt": "a red star", "num_inference_steps": 2, "output_type": "pt"}


def ldm_text_to_image(folder: Path):
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=54,
            encoder_layers=1,
            encoder_ffn_dim=32,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=16,
            max_position_embeddings=77,
        )
    )
    stage = vq_model(
        block_out_channels=(8, 8, 8, 12),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipe = diffusers.LDMTextToImagePipeline(
        vqvae=stage,
        bert=randomize(bert, 1),
        tokenizer=tokenizer(folder),
        unet=unet(sample_size=4),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    )
    return pipe, {
        "prompt": "a star",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "np",
    }


def ldm_unconditional(folder: Path):
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 24),
        down_block_types=(DOWN, DOWN_A),
        up_block_types=(UP_A, UP),
        layers_per_block=1,
        attention_head_dim=12,
        norm_num_groups=4,
    )
    pipe = diffusers.LDMPipeline(
        vqvae=vq_model(),
        unet=randomize(model),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    )
    return pipe, {"batch_size": 2, "num_inference_steps": 2, "output_type": "np"}


def unclip(folder: Path):
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=16, num_layers=1
    )
    # Its package moves between versions of diffusers.
    text_proj = inspect.getmodule(diffusers.UnCLIPPipeline).UnCLIPTextProjModel(
        clip_embeddings_dim=16, time_embed_dim=64, cross_attention_dim=16
    )

    def super_resolution(seed: int) -> nn.Module:
        model = diffusers.UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
        )
        return randomize(model, seed)

    # Its defaults clip what noise is predicted to hide, with random weights nearly everywhere.
    def scheduler(variance_type: str):
        return diffusers.UnCLIPScheduler(
            variance_type=variance_type, prediction_type="sample", clip_sample=False
        )

    pipe = diffusers.UnCLIPPipeline(
        prior=randomize(prior, 1),
        decoder=randomize(diffusers.UNet2DConditionModel(**SIMPLE, class_embed_type="identity")),
        text_proj=randomize(text_proj, 3),
        text_encoder=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(folder),
        super_res_first=super_resolution(4),
        super_res_last=super_resolution(5),
        prior_scheduler=scheduler("fixed_small_log"),
        decoder_scheduler=scheduler("learned_range"),
        super_res_scheduler=scheduler("fixed_small_log"),
    )
    return pipe, {
        "prompt": "a star",
        "prior_num_inference_steps": 2,
        "decoder_num_inference_steps": 2,
        "super_res_num_inference_steps": 2,
        "decoder_guidance_scale": 2.0,
        "output_type": "np",
    }


def deepfloyd_if(folder: Path):
    # diffusers fixes the groups of the norm of the context at 32.
    model = diffusers.UNet2DConditionModel(
        **{**SIMPLE, "cross_attention_dim": 32},
        act_fn="gelu",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        encoder_hid_dim=16,
        resnet_skip_time_act=True,
    )
    pipe = diffusers.IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=randomize(model),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=100.0,
            variance_type="learned_range",
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return pipe, {
        "prompt_embeds": randn(1, 7, 16),
        "negative_prompt_embeds": randn(1, 7, 16, seed=6),
        "num_inference_steps": 2,
        "output_type": "pt",
    }


def dit(folder: Path):
    model = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
    )
    pipe = diffusers.DiTPipeline(
        transformer=randomize(model),
        vae=first_stage(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    return pipe, {"class_labels": [3, 207], "num_inference_steps": 2, "output_type": "pt"}


def latte(folder: Path):
    model = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_channels=16,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        video_length=3,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = diffusers.LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=first_stage(),
        transformer=randomize(model),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    return pipe, {
        "prompt_embeds": randn(1, 7, 16),
        "negative_prompt": None,
        "negative_prompt_embeds": randn(1, 7, 16, seed=6),
        "height": 16,
        "width": 16,
        "video_length": 3,
        "num_inference_steps": 2,
        "clean_caption": False,
        "output_type": "pt",
    }


def stable_diffusion_3(folder: Path):
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=20,
        num_attention_heads=2,
        caption_projection_dim=40,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = diffusers.StableDiffusion3Pipeline(
        **dict.fromkeys(absent),
        transformer=randomize(model),
        vae=first_stage(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return pipe, {
        "prompt_embeds": randn(1, 7, 32),
        "negative_prompt_embeds": randn(1, 7, 32, seed=6),
        "pooled_prompt_embeds": randn(1, 24, seed=7),
        "negative_pooled_prompt_embeds": randn(1, 24, seed=8),
        "num_inference_steps": 2,
        "output_type": "pt",
    }


def flux(folder: Path):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxPipeline(
        **dict.fromkeys(absent),
        transformer=randomize(model),
        vae=first_stage(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return pipe, {
        "prompt_embeds": randn(1, 7, 32),
        "pooled_prompt_embeds": randn(1, 24, seed=7),
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
