"""One of GLIDE's two diffusions: a network, the noise it was trained on, and how the two are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastldm.checks import is_count
from fastldm.diffusion.guidance import Gradient, classifier_free
from fastldm.diffusion.projection import projected
from fastldm.diffusion.samplers import MULTISTEP, NoiseLevels, noise_levels
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import ConfigError, InputError
from fastldm.models.glide import GlideTextOutput, GlideUNet
from fastldm.systems.inpainting import Known
from fastldm.systems.sampling import walk_down

FAST27 = "fast27"
"""The 27 timesteps on which glide-text2im enlarges pictures by DDIM."""

_PUBLISHED = {"variance_type": "learned_range", "clip_sample": True, "timestep_spacing": "linspace"}
BASE_NOISE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", **_PUBLISHED}
"""Fields of `NoiseSchedule` for the published base networks."""
UPSAMPLER_NOISE: dict[str, Any] = {"beta_schedule": "linear", **_PUBLISHED}
"""Fields of `NoiseSchedule` for the published upsamplers."""
PUBLISHED_LOW_RES = 64
"""Side of the pictures that these enlarge."""


@dataclass(frozen=True)
class GlideStage:
    """A GlideUNet and its noise schedule.

    Attributes:
        low_res: side of the small pictures that an upsampler was trained to enlarge; None = not known.

    Raises:
        ConfigError: if the two do not fit each other.
    """

    unet: GlideUNet
    schedule: NoiseSchedule
    low_res: int | None = None

    def __post_init__(self) -> None:
        config, learned = self.unet.config, self.schedule.variance_type == "learned_range"
        if config.learn_sigma != learned:
            raise ConfigError(
                f"learn_sigma={config.learn_sigma} with variance_type={self.schedule.variance_type!r}: a "
                "network that gives the variance goes with 'learned_range', any other with another type"
            )
        if config.out_channels != config.in_channels:
            raise ConfigError(
                f"in_channels={config.in_channels} and out_channels={config.out_channels} must be the same: "
                "the network's output is noise of its input"
            )
        if self.low_res is not None and not (config.super_res and is_count(self.low_res)):
            raise ConfigError(
                f"low_res={self.low_res!r} with super_res={config.super_res}: it is the side of the pictures "
                "that an upsampler enlarges, in pixels"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures it makes."""
        config = self.unet.config
        return config.in_channels, config.image_size, config.image_size

    def levels(
        self, sampler: str, steps: int | str, *, karras: bool = False, name: str = "num_inference_steps"
    ) -> NoiseLevels:
        """Where a walk of so many steps, or of "fast27", stands; see `noise_levels`. `name` is that
        of the argument in messages.

        Raises:
            InputError: for what the schedule or the sampler does not have.
        """
        if sampler == "plms" and bool(self.schedule.alphas_cumprod[-1] == 0):
            raise InputError(
                "sampler 'plms' with a schedule that ends at zero SNR: it combines predicted noise, "
                "which holds no picture there; use another sampler, such as 'ddim'"
            )
        if steps != FAST27:
            most = self.schedule.num_train_timesteps - (sampler in MULTISTEP)
            if not is_count(steps) or steps > most:
                raise InputError(f"{name}={steps!r}: use 1 to {most}, a whole number, or {FAST27!r}")
            return noise_levels(self.schedule, sampler, steps, karras=karras)
        if karras:
            raise InputError(
                f"karras=True with {name}={FAST27!r}, which are timesteps of their own; use a number"
            )
        timesteps = self.schedule.sections((10, 10, 3, 2, 2))
        # glide-text2im: DDIM makes artefacts from the noisiest ones.
        timesteps[0] = self.schedule.num_train_timesteps - 3
        return NoiseLevels(timesteps, None)

    def read(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Texts as `GlideTokenizer` gives them, read once: what `sample` takes as `texts`."""
        mask = mask.to(self.unet.device) if self.unet.config.xf_padding else None
        read = self.unet.encode_text(tokens.to(self.unet.device), mask)
        return {"xf_proj": read.xf_proj, "xf_out": read.xf_out}

    def sample(
        self,
        x: Tensor,
        texts: dict[str, Tensor],
        null_texts: dict[str, Tensor] | None,
        guidance_scale: float,
        sampler: str,
        levels: NoiseLevels,
        *,
        low_res: Tensor | None = None,
        known: Known | None = None,
        gradient: Gradient | None = None,
        **walk: Any,
    ) -> Tensor:
        """From noise x (B, C, H, W), float32, to pictures in [-1, 1].

        Args:
            texts, null_texts: of `read`, one per picture; see `classifier_free`.
            low_res: (B, C, h, w), for an upsampler.
            known: what the network is shown, if it inpaints, and what stands in the predicted picture at each
                step and in the last, whatever network it is.
            gradient: see `walk_down`; it moves nothing that is known.
            walk: further arguments of `walk_down`.
        """
        dtype = self.unet.dtype
        pictures = {} if low_res is None else {"low_res": low_res.to(dtype)}
        if known is not None:
            known = Known(known.image.expand_as(x), known.mask.expand(len(x), -1, -1, -1))
            gradient = None if gradient is None else _only_where(gradient, ~known.mask)
            if self.unet.config.inpaint:
                pictures |= {"inpaint_image": known.image.to(dtype), "inpaint_mask": known.mask.to(dtype)}

        def model(x: Tensor, t: Tensor, xf_proj: Tensor, xf_out: Tensor, **pictures: Tensor) -> Tensor:
            text = GlideTextOutput(xf_proj=xf_proj, xf_out=xf_out)
            return self.unet(x.to(dtype), t, text=text, **pictures).sample.to(x.dtype)

        null = None if null_texts is None else {**null_texts, **pictures}
        denoiser = classifier_free(model, {**texts, **pictures}, null, guidance_scale)
        put_back = (lambda x0: x0) if known is None else known.into
        denoiser, schedule = projected(denoiser, self.schedule, put_back, as_noise=sampler == "plms")
        x = walk_down(sampler, denoiser, x, schedule, levels, gradient=gradient, **walk)
        return put_back(x.clamp(-1, 1))


def _only_where(gradient: Gradient, mask: Tensor) -> Gradient:
    return lambda x, t: torch.where(mask, gradient(x, t), 0)
