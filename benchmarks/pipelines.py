"""A whole pipeline of diffusers, from the embedding of a prompt to a picture, as it is and applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastldm
from benchmarks.models import products
from benchmarks.providers import compiled, packs_here
from benchmarks.registry import Case, Function, Judge, Op, Problem, Provider, Verdict, Work
from fastldm.nn import pack_weights
from fastldm.testing import assert_as_accurate

_STEPS = 4


@dataclass(frozen=True)
class Size:
    """A small Stable Diffusion: channels of the UNet and of the VAE, pixels of the picture's side."""

    unet_channels: tuple[int, ...]
    vae_channels: tuple[int, ...]
    side: int
    context: int = 256


PIPELINES = {
    "demo": Size((32, 64), (16, 32), 64),
    "small": Size((128, 256, 512), (64, 128, 128, 128), 256),
}


def _pipeline(size: Size, dtype: torch.dtype, device: str) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    depth, factor = len(size.unet_channels), 2 ** (len(size.vae_channels) - 1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=size.side // factor,
        block_out_channels=size.unet_channels,
        down_block_types=["CrossAttnDownBlock2D"] * (depth - 1) + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (depth - 1),
        cross_attention_dim=size.context,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=size.vae_channels,
        down_block_types=["DownEncoderBlock2D"] * len(size.vae_channels),
        up_block_types=["UpDecoderBlock2D"] * len(size.vae_channels),
        latent_channels=4,
        norm_num_groups=16,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def _call(pipe: Any) -> Function:
    @torch.no_grad()
    def function(latents: Tensor, prompt: Tensor, negative: Tensor) -> Tensor:
        return pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            latents=latents,
            num_inference_steps=_STEPS,
            output_type="pt",
        ).images

    return function


def _problem(case: Case) -> Problem:
    size = PIPELINES[case.shape]
    latent = size.side // 2 ** (len(size.vae_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, latent, latent), (1, 77, size.context), (1, 77, size.context))
    inputs = tuple(torch.randn(s, generator=generator).to(case.device, case.torch_dtype) for s in shapes)
    networks = partial(_pipeline, size, case.torch_dtype, case.device)
    return Problem(case, ("latents", "prompt", "negative"), inputs, networks=networks)


def _judge(problem: Problem) -> Judge:
    """By the error rule, against the untouched pipeline in a wider dtype."""
    dtype = problem.case.torch_dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    plain = _call(problem.networks())(*problem.inputs)
    exact = _call(problem.networks().to(wide))(*(x.to(wide) for x in problem.inputs))
    terms = max(x.numel() for x in problem.inputs)

    def judge(results: Sequence[Tensor]) -> Verdict:
        (result,) = results
        error = (result.double() - exact.double()).abs().max().item()
        try:
            assert_as_accurate(result, exact, plain, terms=terms)
        except AssertionError as fault:
            return Verdict(error, str(fault))
        return Verdict(error)

    return judge


def _work(problem: Problem) -> Work:
    return products(_call(problem.networks()), problem.inputs)


def _plain(channels_last: bool, problem: Problem) -> Function:
    pipe = problem.networks()
    if channels_last:
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)
    return _call(pipe)


def _applied(channels_last: bool, packed: bool, problem: Problem) -> Function:
    pipe = problem.networks()
    for part in (pipe.unet, pipe.vae):
        if channels_last:
            part.to(memory_format=torch.channels_last)
        if packed:
            pack_weights(part)
    fastldm.apply(pipe)
    return _call(pipe)


def _compiled(problem: Problem) -> Function:
    pipe = problem.networks()
    pipe.unet = compiled(pipe.unet)
    pipe.vae.decode = compiled(pipe.vae.decode)
    return _call(pipe)


def _providers() -> list[Provider]:
    both = (("", False), ("-channels-last", True))
    return [
        *(Provider(f"applied{end}", partial(_applied, last, False), ours=True) for end, last in both),
        Provider("applied-packed", partial(_applied, True, True), ours=True, refuse=packs_here),
        *(Provider(f"diffusers{end}", partial(_plain, last)) for end, last in both),
        Provider("compile", _compiled),
    ]


OPS = (
    Op(
        "pipeline",
        shapes=PIPELINES,
        full=("small",),
        dtypes=("float32", "bfloat16"),
        problem=_problem,
        judge=_judge,
        work=_work,
        providers=_providers,
        torch="diffusers",
    ),
)
