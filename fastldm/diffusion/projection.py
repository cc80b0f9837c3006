"""What is known of the clean sample, told to any sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fastldm.diffusion.guidance import Denoiser
from fastldm.diffusion.predictions import to_eps, to_x0
from fastldm.diffusion.samplers.walk import bound
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.diffusion.variance import split_variance


def projected(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    project: Callable[[Tensor], Tensor] = lambda x0: x0,
    *,
    as_noise: bool = False,
) -> tuple[Denoiser, NoiseSchedule]:
    """The same denoiser predicting project(x0), and the schedule, of prediction_type "sample", that says so.

    x0 is first brought into the schedule's range (`clip_sample`, `thresholding`). Whatever a sampler makes of
    the prediction then agrees with it: DDIM's noise too is what the projected x0 leaves of x_t, as in
    guided-diffusion, while `sample_ddim` alone goes on with the noise of the x0 before it was clipped.

    Args:
        denoiser: of the schedule's `prediction_type` and `variance_type`; a learned variance stays as it is.
        project: x0 (B, C, ...) -> the same shape, such as the known part of a picture put in its place.
        as_noise: predict the noise that project(x0) leaves instead, and say "epsilon": for PLMS, which
            combines predictions of several steps as if they were noise. It costs digits of x0 at high noise.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        output, v = split_variance(denoiser(x, t), x, schedule)
        alpha_bar = schedule.alpha_bar(x, t)
        x0 = project(bound(to_x0(output, x, alpha_bar, schedule.prediction_type), schedule))
        new = (to_eps(x0, x, alpha_bar, "sample") if as_noise else x0).to(output.dtype)
        return new if v is None else torch.cat([new, v], dim=1)

    return predict, dataclasses.replace(schedule, prediction_type="epsilon" if as_noise else "sample")
