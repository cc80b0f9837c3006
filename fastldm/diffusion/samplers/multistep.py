"""Samplers that use the predictions of earlier steps: DPM-Solver++ 2M and UniPC.

Both solve the ODE exactly in its linear part and work on predicted x0, in the half log-SNR
lambda = -log(sigma). x is in the scale of the schedule, and a step to sigma 0 gives the predicted x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastldm.diffusion.guidance import Denoiser
from fastldm.diffusion.samplers.euler import check_fall, predicted_x0, towards
from fastldm.diffusion.samplers.levels import resolve
from fastldm.diffusion.samplers.walk import Callback, SamplerStep, Timesteps, evaluate, walk
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import InputError

# A predicted x0 and the noise level at which it was predicted.
Prediction = tuple[Tensor, float]
# With fewer steps than this the last one is of first order (`lower_order_final` of Lu et al.'s code).
_FEW_STEPS = 15


def dpmpp_2m_step(
    model_output: Tensor,
    sigma: float,
    next_sigma: float,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    previous: Prediction | None = None,
) -> SamplerStep:
    """One step of DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Args:
        previous: `pred_original_sample` of the step before and its sigma. Without it, and for a step to 0,
            the step is of first order.
    """
    x0 = predicted_x0(model_output, sigma, x, schedule)
    return SamplerStep(_second_order((x0, sigma), previous, next_sigma, x), x0)


def unipc_correct(x0: Tensor, sigma: float, x: Tensor, last: Prediction, before: Prediction | None) -> Tensor:
    """UniC: a better x at `sigma` once x0 is predicted there (Zhao et al. 2023, algorithm 1, B2(h)).

    Args:
        x0: predicted at `sigma`.
        x: the (corrected) sample at the noise level of `last`.
        last, before: the predictions one and two steps ago; without `before`, of order 1 instead of 2.
    """
    last_x0, last_sigma = last
    base = towards(last_x0, last_sigma, sigma, x)
    h = math.log(last_sigma / sigma)
    # e^-h - 1 and the next two terms of the exponential's series, as the paper's psi functions.
    first = math.expm1(-h)
    if before is None:
        correction = 0.5 * (x0 - last_x0)
    else:
        ratio = math.log(last_sigma / before[1]) / h
        second = -first / h - 1
        b1, b2 = second / first, 2 * (-second / h - 0.5) / first
        weight = (b1 - b2) / (1 - ratio)
        correction = weight / ratio * (before[0] - last_x0) + (b1 - weight) * (x0 - last_x0)
    return base - (1 + sigma**2) ** -0.5 * first * correction


def sample_dpmpp_2m(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by DPM-Solver++ 2M, one evaluation per step.

    The first step is of first order, and so is the last one where it goes to 0 or is one of fewer than 15.

    Args:
        timesteps: (N,), falling; whole or fractional, which the denoiser gets as int64 or float32.
        sigmas: (N + 1,), falling: the noise level at each timestep and at the end; None = the schedule's,
            linear in between, and 0. `noise_levels` makes both, also with Karras spacing.
    """
    steps, levels = resolve(timesteps, sigmas, schedule)
    previous: Prediction | None = None

    def step(i: int, x: Tensor) -> SamplerStep:
        nonlocal previous
        output = evaluate(denoiser, x, steps[i])
        if i + 1 == len(steps) < _FEW_STEPS:
            previous = None
        result = dpmpp_2m_step(output, levels[i], levels[i + 1], x, schedule, previous=previous)
        previous = result.pred_original_sample, levels[i]
        return result

    return walk(step, x, steps, callback, progress)


def sample_unipc(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by UniPC of order 2 with B2(h), one evaluation per step.

    Zhao et al. 2023, algorithms 1 and 2: each x is predicted, the denoiser evaluated there, and x corrected
    by that before the next prediction. The first and last prediction are of first order. Where a callback
    returns another x, that one is not corrected; what it writes into x itself, the correction overwrites.
    Arguments as in `sample_dpmpp_2m`.
    """
    steps, levels = resolve(timesteps, sigmas, schedule)
    history: list[Prediction] = []
    last_x = predicted = x

    def step(i: int, x: Tensor) -> SamplerStep:
        nonlocal last_x, predicted
        x0 = predicted_x0(evaluate(denoiser, x, steps[i]), levels[i], x, schedule)
        if history and x is predicted:
            before = history[-2] if len(history) > 1 else None
            x = unipc_correct(x0, levels[i], last_x, history[-1], before)
        previous = history[-1] if history and i + 1 < len(steps) else None
        history[:] = [*history[-1:], (x0, levels[i])]
        last_x, predicted = x, _second_order(history[-1], previous, levels[i + 1], x)
        return SamplerStep(predicted, x0)

    return walk(step, x, steps, callback, progress)


def _second_order(here: Prediction, previous: Prediction | None, next_sigma: float, x: Tensor) -> Tensor:
    """The exponential step with x0 extrapolated linearly in lambda to the middle of the step."""
    x0, sigma = here
    check_fall(sigma, next_sigma)
    if previous is not None and next_sigma > 0:
        previous_x0, previous_sigma = previous
        if not previous_sigma > sigma:
            raise InputError(f"the step before was at sigma {previous_sigma}: it must be above {sigma}")
        ratio = math.log(sigma / next_sigma) / math.log(previous_sigma / sigma)
        x0 = x0 + 0.5 * ratio * (x0 - previous_x0)
    return towards(x0, sigma, next_sigma, x)
