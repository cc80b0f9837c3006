"""Samplers: plain functions that walk a denoiser down a list of timesteps.

`denoiser(x, t)` takes x (B, ...) and t int64 (B,) and gives what the schedule's prediction type names. One
step goes from a timestep to the next of the list; the last one goes to the clean sample. (diffusers' DDIM
steps down by T // num_inference_steps instead: the same for "leading" spacing, and for "trailing" where that
number divides T.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fastldm.diffusion.guidance import Denoiser
from fastldm.diffusion.predictions import to_eps, to_x0
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import InputError

Generators = torch.Generator | Sequence[torch.Generator] | None
# callback(step, timestep, x after the step, predicted x0) -> a replacement for x, or None to go on.
Callback = Callable[[int, int, Tensor, Tensor], Tensor | None]


class SamplerStep(NamedTuple):
    """prev_sample: x at the next timestep of the walk; pred_original_sample: the x0 this step believed in."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normal noise of `shape` (B, ...).

    A list of generators, one per sample, makes each sample's noise its own, whatever the batch it stands in.
    The draw happens on the generator's device, so that a CPU generator gives the same numbers everywhere.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise InputError(
            f"{len(generator)} generators for a batch of {shape[0]}: give one per sample, or a single one"
        )
    rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.cat(rows).to(device)


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
    alpha_bar = schedule.alphas_cumprod[t]
    prev_alpha_bar = schedule.alphas_cumprod[prev_t] if prev_t >= 0 else schedule.final_alpha_cumprod
    x0 = _bound(to_x0(model_output, x, alpha_bar, schedule.prediction_type), schedule)
    eps = to_eps(model_output, x, alpha_bar, schedule.prediction_type)
    sigma = eta * ((1 - prev_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / prev_alpha_bar)) ** 0.5
    # At zero SNR and eta 1 the difference is 0, which rounding can make negative.
    prev = prev_alpha_bar**0.5 * x0 + (1 - prev_alpha_bar - sigma**2).clamp(min=0) ** 0.5 * eps
    if eta > 0:
        prev = prev + sigma * noise
    return SamplerStep(prev, x0)


def ddpm_step(
    model_output: Tensor,
    t: int,
    prev_t: int,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    noise: Tensor | None = None,
) -> SamplerStep:
    """One ancestral step from `t` to `prev_t` (Ho et al. 2020, eq. 6 and 7). prev_t < 0 = the clean end.

    Args:
        noise: shaped like x, times the standard deviation of the schedule's `variance_type`; None = the mean.
    """
    alpha_bar = schedule.alphas_cumprod[t]
    prev_alpha_bar = schedule.alphas_cumprod[prev_t] if prev_t >= 0 else torch.tensor(1.0)
    alpha = alpha_bar / prev_alpha_bar
    x0 = _bound(to_x0(model_output, x, alpha_bar, schedule.prediction_type), schedule)
    x0_weight = prev_alpha_bar**0.5 * (1 - alpha) / (1 - alpha_bar)
    x_weight = alpha**0.5 * (1 - prev_alpha_bar) / (1 - alpha_bar)
    prev = x0_weight * x0 + x_weight * x
    if noise is not None:
        small = ((1 - prev_alpha_bar) / (1 - alpha_bar) * (1 - alpha)).clamp(min=1e-20)
        variance = small if schedule.variance_type == "fixed_small" else 1 - alpha
        prev = prev + variance**0.5 * noise
    return SamplerStep(prev, x0)


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    eta: float = 0.0,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by DDIM; at eta 0 nothing is drawn."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta}: use a value between 0 (DDIM) and 1 (as random as DDPM)")

    def step(output: Tensor, t: int, prev_t: int, x: Tensor) -> SamplerStep:
        noise = randn(x.shape, generator, device=x.device, dtype=x.dtype) if eta > 0 else None
        return ddim_step(output, t, prev_t, x, schedule, eta=eta, noise=noise)

    return _walk(step, denoiser, x, timesteps, callback, progress)


def sample_ddpm(
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[int],
    *,
    generator: Generators = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Walk x (B, ...) from pure noise to the sample by ancestral sampling; the last step adds no noise."""

    def step(output: Tensor, t: int, prev_t: int, x: Tensor) -> SamplerStep:
        noise = randn(x.shape, generator, device=x.device, dtype=x.dtype) if prev_t >= 0 else None
        return ddpm_step(output, t, prev_t, x, schedule, noise=noise)

    return _walk(step, denoiser, x, timesteps, callback, progress)


SAMPLERS = {"ddim": sample_ddim, "ddpm": sample_ddpm}


def _walk(
    step: Callable[[Tensor, int, int, Tensor], SamplerStep],
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor | Sequence[int],
    callback: Callback | None,
    progress: bool,
) -> Tensor:
    steps = [int(t) for t in timesteps]
    for i, t in enumerate(tqdm(steps, desc="sampling", disable=not progress)):
        prev_t = steps[i + 1] if i + 1 < len(steps) else -1
        output = denoiser(x, torch.full((x.shape[0],), t, dtype=torch.int64, device=x.device))
        x, x0 = step(output, t, prev_t, x)
        if callback is not None:
            replacement = callback(i, t, x, x0)
            x = x if replacement is None else replacement
    return x


def _bound(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Keep the predicted x0 in range: dynamic thresholding (Saharia et al. 2022, section 2.3) or clipping."""
    if schedule.thresholding:
        flat = x0.float().flatten(1)
        limit = torch.quantile(flat.abs(), schedule.dynamic_thresholding_ratio, dim=1, keepdim=True)
        limit = limit.clamp(min=1, max=schedule.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).reshape(x0.shape).to(x0.dtype)
    if schedule.clip_sample:
        return x0.clamp(-schedule.clip_sample_range, schedule.clip_sample_range)
    return x0
