"""Samplers on the timesteps of training: DDPM, DDIM and PLMS.

One step goes from a timestep to the next of the list; the last one goes to the clean sample. (diffusers' DDIM
and PNDM step down by T // num_inference_steps instead: the same for "leading" spacing, and for "trailing"
where that number divides T.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastldm.diffusion.guidance import Denoiser, Gradient, finite, fraction
from fastldm.diffusion.predictions import same_shape, to_eps, to_x0
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
    whole_timesteps,
)
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.diffusion.variance import learned_log_variance, split_variance
from fastldm.errors import InputError

# Adams-Bashforth of order 1 to 4: the weights of the outputs, newest first.
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ddim_step(
    model_output: Tensor,
    t: int,
    prev_t: int,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> SamplerStep:
    """One DDIM step from `t` to `prev_t` (Song et al. 2021, eq. 12 and 16). prev_t < 0 = the clean end.

    Args:
        eta: 0 = deterministic, 1 = as random as DDPM; `noise`, shaped like x, is needed when eta > 0.
    """
    _check_fall(t, prev_t, schedule)
    alpha_bar = schedule.alphas_cumprod[t]
    prev_alpha_bar = schedule.alphas_cumprod[prev_t] if prev_t >= 0 else schedule.final_alpha_cumprod
    prediction, _ = split_variance(model_output, x, schedule)
    x0 = bound(to_x0(prediction, x, alpha_bar, schedule.prediction_type), schedule)
    eps = to_eps(prediction, x, alpha_bar, schedule.prediction_type)
    sigma = eta * ((1 - prev_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / prev_alpha_bar)) ** 0.5
    # At zero SNR and eta 1 the difference is 0, which rounding can make negative.
    prev = prev_alpha_bar**0.5 * x0 + (1 - prev_alpha_bar - sigma**2).clamp(min=0) ** 0.5 * eps
    if eta > 0:
        prev = prev + sigma * needed_noise(noise, x)
    return SamplerStep(prev, x0)


def ddpm_step(
    model_output: Tensor,
    t: int,
    prev_t: int,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
    gradient: Tensor | None = None,
    last_t: int | None = None,
) -> SamplerStep:
    """One ancestral step from `t` to `prev_t` (Ho et al. 2020, eq. 6 and 7). prev_t < 0 = the clean end.

    Args:
        model_output: shaped like x; of twice its channels under variance_type "learned_range".
        noise: shaped like x, times the standard deviation of the schedule's `variance_type`; None = the mean.
        gradient: shaped like x, of a guiding log-probability and times its scale: the mean moves by variance
            times gradient (Dhariwal and Nichol 2021, algorithm 1).
        last_t: the timestep visited before `t`. The posterior of a step to the clean end has no variance, so
            there a learned range begins at that of the step from last_t to t; None = t + 1. Where there is no
            such step, the range is beta alone.
    """
    _check_fall(t, prev_t, schedule)
    alpha_bar = schedule.alphas_cumprod[t]
    prev_alpha_bar = schedule.alphas_cumprod[prev_t] if prev_t >= 0 else torch.tensor(1.0)
    alpha = alpha_bar / prev_alpha_bar
    prediction, v = split_variance(model_output, x, schedule)
    x0 = bound(to_x0(prediction, x, alpha_bar, schedule.prediction_type), schedule)
    x0_weight = prev_alpha_bar**0.5 * (1 - alpha) / (1 - alpha_bar)
    x_weight = alpha**0.5 * (1 - prev_alpha_bar) / (1 - alpha_bar)
    prev = x0_weight * x0 + x_weight * x
    if v is not None:
        last_t = t + 1 if last_t is None else last_t
        if prev_t >= 0:
            lowest = _posterior_variance(t, prev_t, schedule)
        elif last_t < schedule.num_train_timesteps:
            lowest = _posterior_variance(last_t, t, schedule)
        else:
            lowest = 1 - alpha
        variance = learned_log_variance(v, lowest, 1 - alpha).exp()
    elif schedule.variance_type == "fixed_large":
        variance = 1 - alpha
    else:
        variance = _posterior_variance(t, prev_t, schedule)
    if gradient is not None:
        prev = prev + (variance * same_shape("gradient", gradient, x)).to(x.dtype)
    if noise is not None:
        prev = prev + (variance**0.5 * needed_noise(noise, x)).to(x.dtype)
    return SamplerStep(prev, x0)


def plms_step(
    model_outputs: Sequence[Tensor], t: int, prev_t: int, x: Tensor, schedule: NoiseSchedule
) -> SamplerStep:
    """One pseudo linear multistep step from `t` to `prev_t` (Liu et al. 2022, section 3).

    Args:
        model_outputs: those of this and up to three earlier steps, newest last. They are combined as they are
            (noise or velocity), as diffusers' PNDMScheduler combines them.
    """
    newest_first = list(reversed(model_outputs))[: len(_ADAMS_BASHFORTH)]
    if not newest_first:
        raise InputError("plms_step needs the model's output at this step: model_outputs is empty")
    weights = _ADAMS_BASHFORTH[len(newest_first) - 1]
    combined = sum(weight * output for weight, output in zip(weights, newest_first))
    return ddim_step(combined, t, prev_t, x, schedule)


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by DDIM; at eta 0 nothing is drawn, at 1 as much as by
    DDPM."""
    eta = fraction("eta", eta)
    steps = whole_timesteps(timesteps, schedule)

    def step(i: int, x: Tensor) -> SamplerStep:
        output = evaluate(denoiser, x, steps[i])
        noise = randn(x.shape, generator, device=x.device, dtype=x.dtype) if eta > 0 else None
        return ddim_step(output, steps[i], _next(steps, i), x, schedule, eta=eta, noise=noise)

    return walk(step, x, steps, callback, progress)


def sample_ddpm(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    guidance: Gradient | None = None,
    guidance_scale: float = 1.0,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by ancestral sampling; the last step adds no noise.

    Args:
        guidance: (x, t) -> the gradient of a guiding log-probability at x, such as `classifier_gradient` and
            `clip_gradient` give; each mean moves by guidance_scale * variance * gradient.
    """
    guidance_scale = finite("guidance_scale", guidance_scale)
    steps = whole_timesteps(timesteps, schedule)

    def step(i: int, x: Tensor) -> SamplerStep:
        prev_t = _next(steps, i)
        output = evaluate(denoiser, x, steps[i])
        gradient = None
        if guidance is not None:
            gradient = guidance_scale * same_shape("guidance", evaluate(guidance, x, steps[i]), x)
        noise = randn(x.shape, generator, device=x.device, dtype=x.dtype) if prev_t >= 0 else None
        last_t = steps[i - 1] if i > 0 else None
        return ddpm_step(output, steps[i], prev_t, x, schedule, noise=noise, gradient=gradient, last_t=last_t)

    return walk(step, x, steps, callback, progress)


def sample_plms(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by PLMS (Liu et al. 2022, without the Runge-Kutta start).

    The first step evaluates the denoiser at both its ends and takes the mean (Heun), so N steps cost N + 1
    evaluations; a single step is one of DDIM.
    """
    steps = whole_timesteps(timesteps, schedule)
    outputs: list[Tensor] = []

    def step(i: int, x: Tensor) -> SamplerStep:
        t, prev_t = steps[i], _next(steps, i)
        outputs.append(evaluate(denoiser, x, t))
        del outputs[:-4]
        if i == 0 and prev_t >= 0:
            ahead = plms_step(outputs, t, prev_t, x, schedule).prev_sample
            mean = (outputs[-1] + evaluate(denoiser, ahead, prev_t)) / 2
            return ddim_step(mean, t, prev_t, x, schedule)
        return plms_step(outputs, t, prev_t, x, schedule)

    return walk(step, x, steps, callback, progress)


def _check_fall(t: int, prev_t: int, schedule: NoiseSchedule) -> None:
    last = schedule.num_train_timesteps - 1
    if not 0 <= t <= last or prev_t >= t:
        raise InputError(
            f"a step from timestep {t} to {prev_t}: the first must be in 0 to {last}, and the second below it"
        )


def _posterior_variance(t: int, prev_t: int, schedule: NoiseSchedule) -> Tensor:
    """That of q(x_prev_t | x_t, x_0), a float32 scalar of at least 1e-20 (Ho et al. 2020, eq. 7)."""
    alpha_bar = schedule.alphas_cumprod[t]
    prev_alpha_bar = schedule.alphas_cumprod[prev_t] if prev_t >= 0 else torch.tensor(1.0)
    return ((1 - prev_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / prev_alpha_bar)).clamp(min=1e-20)


def _next(steps: Sequence[int], i: int) -> int:
    return steps[i + 1] if i + 1 < len(steps) else -1
