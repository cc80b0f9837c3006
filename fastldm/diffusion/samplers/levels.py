"""Where a walk stands: the timesteps that a denoiser is told, and the noise levels sigma of x there.

sigma_t = sqrt((1 - abar_t) / abar_t), the noise-to-signal ratio (Karras et al. 2022, table 1): x in the scale
of the schedule is (x0 + sigma noise) / sqrt(1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastldm.checks import is_count
from fastldm.diffusion.samplers.walk import Timesteps, falling_sigmas, falling_timesteps
from fastldm.diffusion.schedules import TIMESTEP_SPACINGS, NoiseSchedule, check_leading
from fastldm.errors import InputError

# diffusers' scheduler of each stands on timesteps of its own: see `noise_levels`.
WHOLE_TIMESTEPS = ("ddim", "ddpm", "plms")
FRACTIONAL_TIMESTEPS = ("euler", "euler_ancestral", "heun")
MULTISTEP = ("dpmpp_2m", "unipc")
WITH_KARRAS = FRACTIONAL_TIMESTEPS + MULTISTEP


class NoiseLevels(NamedTuple):
    """timesteps: (N,), int64 or, where fractional, float32. sigmas: float32 (N + 1,), falling, the last 0; or
    None for a sampler that has the noise levels from the timesteps."""

    timesteps: Tensor
    sigmas: Tensor | None


def train_sigmas(schedule: NoiseSchedule) -> Tensor:
    """sigma of every timestep of training, float32 (T,). At zero SNR, where it is infinite, 4096."""
    alpha_bar = schedule.alphas_cumprod
    alpha_bar = torch.where(alpha_bar == 0, torch.full_like(alpha_bar, 2.0**-24), alpha_bar)
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def karras_sigmas(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Tensor:
    """`count` noise levels from sigma_max to sigma_min, float64 (Karras et al. 2022, eq. 5), without the 0.

    Raises:
        InputError: unless 0 < sigma_min < sigma_max, count >= 1 and rho > 0.
    """
    if not 0 < sigma_min < sigma_max < float("inf") or not is_count(count) or not 0 < rho < float("inf"):
        raise InputError(
            f"sigma_max={sigma_max}, sigma_min={sigma_min}, count={count}, rho={rho}: "
            "need 0 < sigma_min < sigma_max, a whole count from 1 and rho > 0"
        )
    ramp = torch.linspace(0, 1, count, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def noise_levels(
    schedule: NoiseSchedule,
    sampler: str,
    num_inference_steps: int,
    *,
    spacing: str | None = None,
    karras: bool = False,
) -> NoiseLevels:
    """The N levels on which diffusers' scheduler of this sampler stands.

    "ddim", "ddpm", "plms": `schedule.timesteps`. "euler", "euler_ancestral", "heun": the same, but "linspace"
    is not rounded. "dpmpp_2m", "unipc": N of N + 1, the last of which is left to the clean end.

    Args:
        sampler: a name of `SAMPLERS`.
        spacing: "leading", "trailing" or "linspace"; None = the schedule's own.
        karras: noise levels by `karras_sigmas` instead, between those of the first and last timestep ("euler"
            and its kin) or of all of training ("dpmpp_2m", "unipc"), and the timesteps whose log sigma is
            nearest: fractional for the former, rounded for the latter.

    Raises:
        InputError: for a number of steps that the schedule does not have, or an argument that is not offered.
    """
    spacing = schedule.timestep_spacing if spacing is None else spacing
    count, total = num_inference_steps, schedule.num_train_timesteps
    if not isinstance(karras, bool):
        raise InputError(f"karras={karras!r}: give True or False")
    if sampler in WHOLE_TIMESTEPS:
        if karras:
            others = ", ".join(WITH_KARRAS)
            raise InputError(f"karras=True with sampler {sampler!r}: Karras levels are for {others}")
        return NoiseLevels(schedule.timesteps(count, spacing), None)
    if sampler in FRACTIONAL_TIMESTEPS:
        timesteps = schedule.timesteps(count, spacing)
        if spacing == "linspace":
            timesteps = torch.from_numpy(np.linspace(0, total - 1, count)[::-1].astype(np.float32))
    elif sampler in MULTISTEP:
        timesteps = _without_the_last(schedule, count, spacing)
    else:
        known = ", ".join(WHOLE_TIMESTEPS + WITH_KARRAS)
        raise InputError(f"sampler={sampler!r} is not offered; use one of {known}")
    of_training = train_sigmas(schedule).double()
    sigmas = _interpolated(schedule, timesteps)
    if karras:
        within = sigmas if sampler in FRACTIONAL_TIMESTEPS else of_training.flip(0)
        if count > 1 or sampler in MULTISTEP:
            sigmas = karras_sigmas(within[0].item(), within[-1].item(), count)
        positions = np.interp(sigmas.log().numpy(), of_training.log().numpy(), np.arange(total))
        timesteps = torch.from_numpy(positions)
        timesteps = timesteps.round().long() if sampler in MULTISTEP else timesteps.float()
    return NoiseLevels(timesteps, torch.cat([sigmas, sigmas.new_zeros(1)]).float())


def resolve(
    timesteps: Timesteps, sigmas: Tensor | Sequence[float] | None, schedule: NoiseSchedule
) -> tuple[list[float], list[float]]:
    """Checked timesteps (N) and noise levels (N + 1): without `sigmas`, the schedule's and then 0.

    Timesteps may repeat where sigmas are given: Karras levels can lie closer than the timesteps of training.
    """
    steps = falling_timesteps(timesteps, schedule, strictly=sigmas is None)
    if sigmas is None:
        sigmas = [*_interpolated(schedule, torch.tensor(steps)).float().tolist(), 0.0]
    return steps, falling_sigmas(sigmas, len(steps))


def _interpolated(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    sigmas = train_sigmas(schedule).numpy()
    return torch.from_numpy(np.interp(timesteps.double().numpy(), np.arange(len(sigmas)), sigmas))


def _without_the_last(schedule: NoiseSchedule, count: int, spacing: str) -> Tensor:
    total = schedule.num_train_timesteps
    if not is_count(count) or count >= total:
        raise InputError(
            f"num_inference_steps={count!r}: the model was trained on {total} steps; use 1 to {total - 1}"
        )
    if spacing == "trailing":
        return schedule.timesteps(count, spacing)
    if spacing == "leading":
        steps = torch.arange(count, 0, -1) * (total // (count + 1)) + schedule.steps_offset
        check_leading(int(steps[0]), count, schedule.steps_offset, total)
        return steps
    if spacing == "linspace":
        return torch.from_numpy(np.linspace(0, total - 1, count + 1).round()[:0:-1].astype(np.int64))
    raise InputError(f"spacing={spacing!r} is not offered; use one of {', '.join(TIMESTEP_SPACINGS)}")
