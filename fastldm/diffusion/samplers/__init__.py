"""Samplers: plain functions that walk a denoiser down the noise levels.

`denoiser(x, t)` takes x (B, ...) and t (B,) and gives what the schedule's prediction type names, shaped like
x. Under variance_type "learned_range" it gives twice the channels: the DDPM sampler uses both halves, every
other one the first. t is int64, or float32 for a walk on fractional timesteps. x keeps its dtype and device
throughout. NaN in a sample stays in that sample and does not stop the walk.
"""

from collections.abc import Callable

from torch import Tensor

from fastldm.diffusion.samplers.ddpm import (
    ddim_step,
    ddpm_step,
    plms_step,
    sample_ddim,
    sample_ddpm,
    sample_plms,
)
from fastldm.diffusion.samplers.euler import (
    euler_ancestral_step,
    euler_step,
    heun_step,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)
from fastldm.diffusion.samplers.flow import flow_euler_step, flow_sigmas, sample_flow_euler, shift_sigmas
from fastldm.diffusion.samplers.levels import MULTISTEP, NoiseLevels, karras_sigmas, noise_levels
from fastldm.diffusion.samplers.multistep import dpmpp_2m_step, sample_dpmpp_2m, sample_unipc, unipc_correct
from fastldm.diffusion.samplers.walk import Callback, Generators, SamplerStep, check_generators, randn

# Called as sample(denoiser, x, schedule, timesteps, ...).
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "plms": sample_plms,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
}
# Those that draw noise on the way, and so take a generator.
DRAWING = ("ddim", "ddpm", "euler_ancestral")

__all__ = [
    "DRAWING",
    "MULTISTEP",
    "SAMPLERS",
    "Callback",
    "Generators",
    "NoiseLevels",
    "SamplerStep",
    "check_generators",
    "ddim_step",
    "ddpm_step",
    "dpmpp_2m_step",
    "euler_ancestral_step",
    "euler_step",
    "flow_euler_step",
    "flow_sigmas",
    "heun_step",
    "karras_sigmas",
    "noise_levels",
    "plms_step",
    "randn",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_flow_euler",
    "sample_heun",
    "sample_plms",
    "sample_unipc",
    "shift_sigmas",
    "unipc_correct",
]
