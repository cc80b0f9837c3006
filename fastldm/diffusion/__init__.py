"""Diffusion over any denoiser: noise schedules, prediction types, samplers and guidance."""

from fastldm.diffusion.guidance import classifier_free, drop_condition, rescale_guidance
from fastldm.diffusion.samplers import ddim_step, ddpm_step, randn, sample_ddim, sample_ddpm
from fastldm.diffusion.schedules import NoiseSchedule

__all__ = [
    "NoiseSchedule",
    "classifier_free",
    "ddim_step",
    "ddpm_step",
    "drop_condition",
    "randn",
    "rescale_guidance",
    "sample_ddim",
    "sample_ddpm",
]
