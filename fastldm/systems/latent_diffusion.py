"""Latent diffusion (Rombach et al. 2022): first stage, conditioner tau_theta, UNet, noise schedule."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.checks import described, is_count, is_number
from fastldm.diffusion.guidance import Denoiser, Gradient, classifier_free
from fastldm.diffusion.samplers import Generators, check_generators, noise_levels
from fastldm.diffusion.scheduler_config import sampler_of
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError, ConfigError, InputError
from fastldm.io import write_json
from fastldm.models.autoencoder_kl import AutoencoderKL
from fastldm.models.conditioners import (
    ClassConditioner,
    Conditioner,
    Conditioning,
    SpatialConditioner,
    TextConditioner,
    predict,
)
from fastldm.models.pixel_space import PixelSpace
from fastldm.models.text_transformer import LDMBertModel
from fastldm.models.tokenizer import Tokenizer
from fastldm.models.unet import UNet2DConditionModel
from fastldm.models.vq_model import VQModel
from fastldm.models.weights import read_json
from fastldm.pictures import check_range
from fastldm.systems import folders
from fastldm.systems.guides import Guide, check_gradient
from fastldm.systems.sampling import (
    ImagePipelineOutput,
    StepCallback,
    as_output,
    check_call,
    check_sampler,
    evaluating,
    first_noise,
    step_callback,
    walk_down,
    with_defaults,
)

# What a call uses where neither the caller nor the model's folder says: as diffusers' LDMTextToImagePipeline.
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 1.0}

FirstStage = VQModel | AutoencoderKL | PixelSpace
FIRST_STAGES: dict[str, type[FirstStage]] = {
    "VQModel": VQModel,
    "AutoencoderKL": AutoencoderKL,
    "PixelSpace": PixelSpace,
}
# The part of a pipeline folder that is the first stage, in the order in which they are looked for.
FIRST_STAGE_PARTS = ("vqvae", "vae")
_CONDITIONERS = {"ClassConditioner": ClassConditioner, "SpatialConditioner": SpatialConditioner}


def scale_from_batch(latents: Tensor) -> float:
    """The factor that brings latents to unit standard deviation: 1 / std over all their elements."""
    return 1 / latents.float().std().item()


class LatentDiffusionPipeline:
    """Conditions to pictures, and the parts to train that.

    Args:
        first_stage: VQModel, AutoencoderKL, or PixelSpace for diffusion in pixels. Diffusion runs on VQ
            latents before quantisation.
        conditioner: tau_theta: TextConditioner, ClassConditioner or SpatialConditioner.
        unet: the denoiser; its `cross_attention_dim` and `in_channels` must fit the other two.
        schedule: the noise schedule, prediction type and timestep spacing.
        scaling_factor: multiplies first-stage latents; None = the first stage's own `scaling_factor`.
        sampler: what a call uses by default, a name of `fastldm.diffusion.samplers.SAMPLERS`.
        karras: whether it does so on Karras' noise levels; for "euler", "heun", "dpmpp_2m" and "unipc".
        defaults: `num_inference_steps` and `guidance_scale` a call uses by default; stored with the model.

    Raises:
        ConfigError: if the parts do not fit each other.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        conditioner: Conditioner,
        unet: UNet2DConditionModel,
        schedule: NoiseSchedule,
        scaling_factor: float | None = None,
        *,
        sampler: str = "ddim",
        karras: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        check_sampler(sampler, karras)
        self.first_stage = first_stage
        self.conditioner = conditioner
        self.unet = unet
        self.schedule = schedule
        self.scaling_factor = first_stage.config.scaling_factor if scaling_factor is None else scaling_factor
        if not is_number(self.scaling_factor) or not self.scaling_factor > 0:
            raise ConfigError(
                f"scaling_factor={self.scaling_factor!r}: give a number above 0, such as 0.18215"
            )
        self.sampler = sampler
        self.karras = karras
        self.defaults = with_defaults(DEFAULTS, defaults)
        self._check_parts()

    def _check_parts(self) -> None:
        latent, concat = self.latent_channels, self.conditioner.concat_channels
        config, problems = self.unet.config, []
        if config.in_channels != latent + concat:
            found = f"in_channels is {config.in_channels}"
            problems.append(f"{found}, but latents and condition have {latent} + {concat}")
        if config.out_channels != self.schedule.output_channels(latent):
            problems.append(
                f"out_channels is {config.out_channels}, but latents of {latent} with variance_type "
                f"{self.schedule.variance_type!r} need {self.schedule.output_channels(latent)}"
            )
        width, taken = self.conditioner.context_dim, config.cross_attention_dim
        if self.unet.has_cross_attention != (width is not None):
            has, wants = ("cross-attention", "no") if width is None else ("no cross-attention", "a")
            problems.append(f"blocks have {has}, but the condition gives {wants} context for it")
        elif width is not None and {width} != ({taken} if isinstance(taken, int) else set(taken)):
            problems.append(f"cross_attention_dim is {taken}, but the condition has {width}")
        if problems:
            raise ConfigError(f"the UNet does not fit: its {'; its '.join(problems)}")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that diffusion runs on."""
        return self.first_stage.latent_channels

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent position, along each side; 1 for diffusion in pixels."""
        return self.first_stage.downsample_factor

    @property
    def latent_scaling(self) -> float | None:
        """The factor by which diffusion's x is a latent; None where it is the picture itself."""
        pixels = isinstance(self.first_stage, PixelSpace) and self.scaling_factor == 1
        return None if pixels else self.scaling_factor

    @property
    def components(self) -> dict[str, Any]:
        """Every part under the name of its folder."""
        return {
            "vqvae": self.first_stage,
            **self.conditioner.components(),
            "unet": self.unet,
            "scheduler": self.schedule,
        }

    @property
    def networks(self) -> list[torch.nn.Module]:
        """Every part with weights."""
        return [self.first_stage, self.conditioner, self.unet]

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def to(self, *args: Any, **kwargs: Any) -> LatentDiffusionPipeline:
        """Move or convert every network, as `torch.nn.Module.to`; returns self."""
        for network in self.networks:
            network.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to scaled latents, float32 (B, C, H / factor, W / factor).

        A KL first stage draws from its Gaussian with `generator`; a VQ one gives latents before quantisation.

        Raises:
            InputError: for anything else.
        """
        channels = self.first_stage.config.get("in_channels", 3)
        right = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == channels
        if not right or not images.is_floating_point():
            raise InputError(
                f"images are {described(images)}: give a float tensor (B, {channels}, H, W) in [-1, 1]"
            )
        check_range("images", images)
        check_generators(generator, len(images))
        self._check_size(*images.shape[-2:])
        output = self.first_stage.encode(images.to(self.device, self.dtype))
        if isinstance(self.first_stage, AutoencoderKL):
            latents = output.latent_dist.sample(generator)
        else:
            latents = output.latents
        return latents.float() * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to pictures, float32 (B, 3, H, W), about [-1, 1]; quantises for VQ."""
        latents = latents.to(self.device) / self.scaling_factor
        return self.first_stage.decode(latents.to(self.dtype)).sample.float()

    def denoiser(
        self,
        conditioning: Conditioning,
        null_conditioning: Conditioning | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
    ) -> Denoiser:
        """The UNet under a condition, for samplers: x (B, C, h, w), t int64 (B,) -> its output in x's dtype
        (of 2C channels where the schedule's variance is learned).

        See `fastldm.diffusion.guidance.classifier_free` for the two guidance arguments.
        """

        def model(x: Tensor, t: Tensor, context: Tensor | None, concat: Tensor | None) -> Tensor:
            return predict(self.unet, x.to(self.dtype), t, context, concat).to(x.dtype)

        return classifier_free(
            model,
            conditioning._asdict(),
            None if null_conditioning is None else null_conditioning._asdict(),
            guidance_scale,
            rescale=guidance_rescale,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        guidance_rescale: float = 0.0,
        sampler: str | None = None,
        progress: bool = True,
        karras: bool | None = None,
        gradient: Guide | Gradient | None = None,
        gradient_scale: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            prompt: what the conditioner prepares: caption(s), class label(s), or condition pictures.
            height, width: of the pictures; None = the size the UNet was made for, or the condition picture's.
            num_inference_steps, guidance_scale: None = the model's own defaults. A scale of 1 is no guidance,
                and 0 the null condition alone, an unconditional model.
            negative_prompt: what guidance leads away from, one or one per prompt; None = the null condition.
            num_images_per_prompt: the pictures of one prompt come one after another.
            eta: randomness of DDIM, 0 to 1.
            generator: one, or a list with one per picture: then a picture does not depend on its batch.
            latents: the first noise (B, C, height / factor, width / factor) instead of a drawn one.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": x}); may return a mapping
                whose "latents" replace x. A timestep between those of training is a float.
            guidance_rescale: strength in [0, 1] of the rescaling of Lin et al. 2023, section 3.4.
            sampler: "ddim", "ddpm", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m" or "unipc"; None =
                the model's own. "heun" evaluates the UNet 2 N - 1 times in N steps, "plms" N + 1 times.
            progress: show a progress bar.
            karras: noise levels spaced after Karras et al. 2022; not for "ddim", "ddpm" and "plms". None = as
                the model's own sampler has them, and False for another one.
            gradient: guidance by another model, on top of `guidance_scale`: `CLIPScorer.gradient(captions)`,
                `ClassifierGuide.gradient(labels)`, or any (x, t) -> gradient at x, for x (B, C, h, w). It
                moves the mean of "ddpm" and the noise of the other samplers (Dhariwal and Nichol 2021,
                algorithms 1 and 2).
            gradient_scale: multiplies the gradient; None = 1.

        Raises:
            InputError: for anything that cannot be used, before sampling starts. What has no effect is said
                in a warning.
        """
        steps = self.defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        scale = self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale
        sampler = sampler or self.sampler
        karras = (self.karras and sampler == self.sampler) if karras is None else karras
        check_call(
            output_type,
            sampler,
            guidance_scale=scale,
            guidance_rescale=guidance_rescale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            gradient=gradient,
            gradient_scale=gradient_scale,
            callback_on_step_end=callback_on_step_end,
        )
        levels = noise_levels(self.schedule, sampler, steps, karras=karras)

        with evaluating(self.networks):
            condition, null = self._prepare(prompt, negative_prompt)
            condition = condition.repeat_interleave(num_images_per_prompt, dim=0).to(self.device)
            conditioning = self.conditioner(condition)
            null_conditioning = None
            if scale != 1:
                null = null.repeat_interleave(num_images_per_prompt, dim=0).to(self.device)
                null_conditioning = self.conditioner(null)
            denoiser = self.denoiser(conditioning, null_conditioning, scale, guidance_rescale)
            shape = (
                len(condition),
                self.latent_channels,
                *self._latent_size(height, width, conditioning.concat),
            )
            if gradient is not None:
                prompts = len(condition) // num_images_per_prompt
                check_gradient(gradient, shape, self.latent_scaling, self.schedule, prompts, self.first_stage)
            x = walk_down(
                sampler,
                denoiser,
                first_noise(shape, generator, latents, self.device),
                self.schedule,
                levels,
                eta=eta,
                generator=generator,
                gradient=gradient,
                gradient_scale=1.0 if gradient_scale is None else gradient_scale,
                callback=step_callback(self, callback_on_step_end),
                progress=progress,
            )
            images = x if output_type == "latent" else as_output(self.decode(x), output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _prepare(self, prompt: Any, negative_prompt: Any) -> tuple[Tensor, Tensor]:
        """The prepared conditions and what guidance leads away from, (B, ...) both."""
        condition = self.conditioner.prepare(prompt)
        if len(condition) == 0:
            raise InputError("there is no prompt; give at least one")
        if negative_prompt is None:
            return condition, self.conditioner.null_like(condition)
        try:
            negative = self.conditioner.prepare(negative_prompt)
        except InputError as error:
            raise InputError(f"negative_prompt: {error}") from None
        if len(negative) not in (1, len(condition)) or negative.shape[1:] != condition.shape[1:]:
            raise InputError(
                f"negative prompts {tuple(negative.shape)} for prompts {tuple(condition.shape)}: "
                "give one, or one per prompt"
            )
        return condition, negative.expand_as(condition)

    def _latent_size(self, height: int | None, width: int | None, concat: Tensor | None) -> tuple[int, int]:
        factor = self.downsample_factor
        own = self.unet.config.sample_size
        if concat is not None:
            own = tuple(concat.shape[-2:])
        if own is None and (height is None or width is None):
            raise InputError("the model states no size of its own; give height and width")
        rows, columns = (own, own) if own is None or isinstance(own, int) else own
        height = rows * factor if height is None else height
        width = columns * factor if width is None else width
        self._check_size(height, width)
        size = height // factor, width // factor
        if concat is not None and size != own:
            raise InputError(
                f"height={height}, width={width} do not fit the condition, "
                f"which is for {own[0] * factor} x {own[1] * factor}"
            )
        return size

    def _check_size(self, height: int, width: int) -> None:
        factor = self.downsample_factor
        if not (is_count(height) and is_count(width)) or height % factor or width % factor:
            raise InputError(f"height={height!r}, width={width!r}: use multiples of {factor}")

    def save_pretrained(
        self, path: str | os.PathLike, *, variant: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the folder of the pipeline, all or nothing. `variant`, `dtype`: as `Model.save_pretrained`.

        A text-conditioned one on latents is laid out as diffusers' LDMTextToImagePipeline, which loads it,
        and makes the same pictures where the first stage shrinks by 8 and the text window is 77: that class
        assumes both.
        The scheduler is written as diffusers' class of the sampler, and what that does not know beside it.
        """
        pixels = isinstance(self.first_stage, PixelSpace)
        of_the_peer = isinstance(self.conditioner, TextConditioner) and not pixels
        scheduler, lost = folders.scheduler_config(self.schedule, self.sampler, self.karras)
        index = {
            "_class_name": "LDMTextToImagePipeline" if of_the_peer else type(self).__name__,
            # diffusers skips what begins with an underscore.
            "_defaults": self.defaults,
            **({folders.lost_fields("scheduler"): lost} if lost else {}),
        }
        with folders.writing_pipeline(path, index) as folder:
            for name, part in self.components.items():
                library, class_name = "diffusers", type(part).__name__
                if isinstance(part, NoiseSchedule):
                    class_name = scheduler["_class_name"]
                    folders.write_scheduler(folder / name, scheduler)
                elif isinstance(part, Tokenizer):
                    library, class_name = "transformers", "PreTrainedTokenizerFast"
                    part.save_pretrained(folder / name)
                else:
                    part.save_pretrained(folder / name, variant=variant, dtype=dtype)
                if isinstance(part, LDMBertModel):
                    library = "latent_diffusion"
                elif name == "conditioner" or isinstance(part, PixelSpace):
                    library = "fastldm"
                index[name] = [library, class_name]
            self._write_scaling_factor(folder / "vqvae" / "config.json")

    def _write_scaling_factor(self, file: Path) -> None:
        # diffusers' pipelines read the factor from the first stage.
        config = {**read_json(file), "scaling_factor": self.scaling_factor}
        write_json(file, config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
    ) -> LatentDiffusionPipeline:
        """Load a pipeline folder: ours, or that of diffusers' LDMTextToImagePipeline.

        Its sampler is that of the scheduler's class, on Karras' noise levels where the scheduler is.

        Args:
            path: a folder, the name of a shipped model ("shapes"), or a name on the hub. A folder goes first.
            torch_dtype: of the parameters; None = float32.
            variant: as `Model.from_pretrained`.

        Raises:
            CheckpointError: if a part is missing, is of another architecture, or does not fit the others.
        """
        folder = folders.find_pipeline(path)
        index = folders.read_index(folder)
        how = {"torch_dtype": torch_dtype, "variant": variant}
        try:
            first_stage = folders.load_part(folder, index, FIRST_STAGE_PARTS, FIRST_STAGES, how)
            if folders.part_class(index, "conditioner"):
                conditioner = folders.load_part(folder, index, ("conditioner",), _CONDITIONERS, how)
            else:
                encoder = folders.load_part(folder, index, ("bert",), {"LDMBertModel": LDMBertModel}, how)
                window = encoder.config.max_position_embeddings
                tokenizer = Tokenizer.from_pretrained(folder, subfolder="tokenizer", max_length=window)
                conditioner = TextConditioner(encoder, tokenizer).eval()
            unets = {"UNet2DConditionModel": UNet2DConditionModel}
            unet = folders.load_part(folder, index, ("unet",), unets, how)
            schedule, scheduler = folders.read_scheduler(folder, index)
            sampler, karras = sampler_of(scheduler)
            return cls(
                first_stage,
                conditioner,
                unet,
                schedule,
                sampler=sampler,
                karras=karras,
                defaults=index.get("_defaults"),
            )
        except ConfigError as error:
            raise CheckpointError(f"{folder}: {error}") from error
