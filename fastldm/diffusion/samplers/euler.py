"""Samplers on noise levels sigma, after Karras et al. 2022: Euler, Euler ancestral, Heun.

x stays in the scale of the schedule, sqrt(abar) x0 + sqrt(1 - abar) noise, as the denoiser wants it, and so
starts as normal noise. (diffusers' Euler and Heun schedulers carry x sqrt(1 + sigma^2) instead, and for
"trailing" and "linspace" start it at sigma_max times the noise.) A step to sigma 0 gives the predicted x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastldm.diffusion.guidance import Denoiser
from fastldm.diffusion.predictions import to_x0
from fastldm.diffusion.samplers.levels import resolve
from fastldm.diffusion.samplers.walk import (
    Callback,
    Generators,
    SamplerStep,
    Timesteps,
    bound,
    evaluate,
    needed_noise,
    randn,
    walk,
)
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.diffusion.variance import split_variance
from fastldm.errors import InputError


def predicted_x0(model_output: Tensor, sigma: float, x: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The clean sample that `model_output` at x with noise level `sigma` stands for, in its bounds."""
    prediction, _ = split_variance(model_output, x, schedule)
    return bound(to_x0(prediction, x, 1 / (1 + sigma**2), schedule.prediction_type), schedule)


def check_fall(sigma: float, next_sigma: float) -> None:
    if not 0 <= next_sigma < sigma < math.inf:
        raise InputError(
            f"a step from sigma {sigma} to {next_sigma}: sigma must be finite, and next_sigma in [0, sigma)"
        )


def towards(x0: Tensor, sigma: float, next_sigma: float, x: Tensor) -> Tensor:
    """x at `next_sigma` on the straight line from x at `sigma` to x0: the step of first order.

    That is DDIM at eta 0, Euler's step, and DPM-Solver++ of order 1 (Lu et al. 2022, arXiv 2211.01095).
    """
    check_fall(sigma, next_sigma)
    ratio, scale = next_sigma / sigma, _scale(next_sigma)
    return scale / _scale(sigma) * ratio * x + scale * (1 - ratio) * x0


def euler_step(
    model_output: Tensor, sigma: float, next_sigma: float, x: Tensor, schedule: NoiseSchedule
) -> SamplerStep:
    """One Euler step of the probability flow ODE (Karras et al. 2022, algorithm 1 without lines 6 to 8)."""
    x0 = predicted_x0(model_output, sigma, x, schedule)
    return SamplerStep(towards(x0, sigma, next_sigma, x), x0)


def euler_ancestral_step(
    model_output: Tensor,
    sigma: float,
    next_sigma: float,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
) -> SamplerStep:
    """An Euler step to below `next_sigma`, and noise, shaped like x, back up to it (k-diffusion's sampler).

    The noise has the variance of DDPM's posterior, sigma'^2 (sigma^2 - sigma'^2) / sigma^2 (Song et al. 2021,
    eq. 16 at eta 1). No noise is needed for a step to 0.
    """
    check_fall(sigma, next_sigma)
    x0 = predicted_x0(model_output, sigma, x, schedule)
    up = next_sigma * max(0.0, 1 - (next_sigma / sigma) ** 2) ** 0.5
    down = next_sigma**2 / sigma
    prev = _scale(next_sigma) / _scale(down) * towards(x0, sigma, down, x)
    if next_sigma > 0:
        prev = prev + _scale(next_sigma) * up * needed_noise(noise, x)
    return SamplerStep(prev, x0)


def heun_step(
    model_output: Tensor,
    next_output: Tensor,
    sigma: float,
    next_sigma: float,
    x: Tensor,
    schedule: NoiseSchedule,
) -> SamplerStep:
    """One Heun step: the mean of the slopes at both ends (Karras et al. 2022, algorithm 1, lines 4 to 8).

    Args:
        next_output: the denoiser's at the Euler step from x; `next_sigma` is above 0.
    """
    if next_sigma == 0:
        raise InputError("a Heun step needs the slope at next_sigma, which 0 does not have: use euler_step")
    x0 = predicted_x0(model_output, sigma, x, schedule)
    ahead = towards(x0, sigma, next_sigma, x)
    next_x0 = predicted_x0(next_output, next_sigma, ahead, schedule)
    # Euler's step and half the change of the slope, both at the scale of next_sigma: x / scale(sigma) itself
    # is beyond float16 where the noise is strong.
    scale = _scale(next_sigma)
    slope = scale / (_scale(sigma) * sigma) * x - scale / sigma * x0
    next_slope = (ahead - scale * next_x0) / next_sigma
    return SamplerStep(ahead + (next_sigma - sigma) / 2 * (next_slope - slope), next_x0)


def sample_euler(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by Euler's method.

    Args:
        timesteps: (N,), falling; whole or fractional, which the denoiser gets as int64 or float32.
        sigmas: (N + 1,), falling: the noise level at each timestep and at the end; None = the schedule's,
            linear in between, and 0. `noise_levels` makes both.
    """
    steps, levels = resolve(timesteps, sigmas, schedule)

    def step(i: int, x: Tensor) -> SamplerStep:
        return euler_step(evaluate(denoiser, x, steps[i]), levels[i], levels[i + 1], x, schedule)

    return walk(step, x, steps, callback, progress)


def sample_euler_ancestral(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """As `sample_euler`, with fresh noise after each step that does not end at sigma 0."""
    steps, levels = resolve(timesteps, sigmas, schedule)

    def step(i: int, x: Tensor) -> SamplerStep:
        output = evaluate(denoiser, x, steps[i])
        draws = levels[i + 1] > 0
        noise = randn(x.shape, generator, device=x.device, dtype=x.dtype) if draws else None
        return euler_ancestral_step(output, levels[i], levels[i + 1], x, schedule, noise=noise)

    return walk(step, x, steps, callback, progress)


def sample_heun(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """As `sample_euler`, by Heun's method: N steps cost 2 N - 1 evaluations, the last being one of Euler."""
    steps, levels = resolve(timesteps, sigmas, schedule)

    def step(i: int, x: Tensor) -> SamplerStep:
        output = evaluate(denoiser, x, steps[i])
        euler = euler_step(output, levels[i], levels[i + 1], x, schedule)
        if i + 1 == len(steps):
            return euler
        next_output = evaluate(denoiser, euler.prev_sample, steps[i + 1])
        return heun_step(output, next_output, levels[i], levels[i + 1], x, schedule)

    return walk(step, x, steps, callback, progress)


def _scale(sigma: float) -> float:
    """sqrt(abar) at noise level sigma."""
    return (1 + sigma**2) ** -0.5
