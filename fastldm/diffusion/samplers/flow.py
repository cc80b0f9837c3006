"""Flow matching (Lipman et al. 2023; Liu et al. 2023): x = (1 - sigma) x0 + sigma noise, sigma from 1 to 0.

The denoiser predicts the velocity noise - x0 and is told the timestep sigma * num_train_timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastldm.checks import is_count
from fastldm.diffusion.guidance import Denoiser
from fastldm.diffusion.predictions import same_shape
from fastldm.diffusion.samplers.walk import Callback, SamplerStep, evaluate, falling_sigmas, walk
from fastldm.errors import InputError


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1, for large pictures (Esser et al. 2024, eq. 23).

    shift s / (1 + (shift - 1) s); FLUX's mu is log(shift).
    """
    if not 0 < shift < math.inf:
        raise InputError(f"shift={shift}: give a number above 0; 1 changes nothing")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(num_inference_steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """The noise levels of N steps, float32 (N + 1,), the last 0, as diffusers' FlowMatchEuler has them.

    They are even between 1 and the shifted 1 / num_train_timesteps, and then shifted (both ends, as there).
    """
    if not is_count(num_inference_steps) or num_inference_steps > num_train_timesteps:
        raise InputError(f"num_inference_steps={num_inference_steps!r}: use 1 to {num_train_timesteps}")
    lowest = shift_sigmas(torch.tensor(1 / num_train_timesteps, dtype=torch.float64), shift).item()
    even = torch.linspace(1, lowest, num_inference_steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(even, shift), even.new_zeros(1)]).float()


def flow_euler_step(model_output: Tensor, sigma: float, next_sigma: float, x: Tensor) -> SamplerStep:
    """One Euler step along the predicted velocity noise - x0."""
    same_shape("denoiser", model_output, x)
    if not 0 <= next_sigma < sigma <= 1:
        raise InputError(f"a step from sigma {sigma} to {next_sigma}: need 1 >= sigma > next_sigma >= 0")
    return SamplerStep(x + (next_sigma - sigma) * model_output, x - sigma * model_output)


def sample_flow_euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    num_train_timesteps: int = 1000,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by Euler's method.

    Args:
        denoiser: (x, t) -> velocity (B, ...), t float32 (B,) = sigma * num_train_timesteps.
        sigmas: (N + 1,), falling from at most 1, the last usually 0: `flow_sigmas`.
    """
    levels = falling_sigmas(sigmas)
    if levels[0] > 1:
        raise InputError(f"the first sigma is {levels[0]:g}: flow matching goes from 1 to 0")
    steps = [sigma * num_train_timesteps for sigma in levels[:-1]]

    def step(i: int, x: Tensor) -> SamplerStep:
        return flow_euler_step(evaluate(denoiser, x, steps[i]), levels[i], levels[i + 1], x)

    return walk(step, x, steps, callback, progress)
