"""What all samplers share: noise, the walk down the noise levels, and the checks before it starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastldm.checks import described
from fastldm.diffusion.guidance import Denoiser, Gradient, dynamic_threshold
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import InputError

Generators = torch.Generator | Sequence[torch.Generator] | None
# callback(step, timestep, x after the step, predicted x0) -> a replacement for x, or None to go on.
Callback = Callable[[int, float, Tensor, Tensor], Tensor | None]
Timesteps = Tensor | Sequence[float]


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

    Raises:
        InputError: see `check_generators`.
    """
    check_generators(generator, shape[0])
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
    rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.cat(rows).to(device)


def check_generators(generator: Generators, samples: int) -> None:
    """InputError unless it is one generator, one for each of so many samples, or None."""
    if generator is None or isinstance(generator, torch.Generator):
        return
    each = list(generator) if isinstance(generator, Sequence) else [generator]
    if wrong := [g for g in each if not isinstance(g, torch.Generator)]:
        raise InputError(
            f"generator: {described(wrong[0])} is none; give torch.Generator().manual_seed(0), or a list of "
            "them"
        )
    if len(each) != samples:
        raise InputError(
            f"{len(each)} generators for a batch of {samples}: give one, or one for each of its samples"
        )


def evaluate(function: Denoiser | Gradient, x: Tensor, t: float) -> Tensor:
    """function(x, t) in x's dtype, at timestep t: int64 (B,) for a whole one, float32 (B,) for a fractional
    one."""
    dtype = torch.int64 if isinstance(t, int) else torch.float32
    output = function(x, torch.full((x.shape[0],), t, dtype=dtype, device=x.device))
    if not isinstance(output, Tensor):
        raise InputError(f"the function at x and t gave {described(output)}; it must give a tensor")
    return output.to(x.dtype)


def walk(
    step: Callable[[int, Tensor], SamplerStep],
    x: Tensor,
    timesteps: Sequence[float],
    callback: Callback | None,
    progress: bool,
) -> Tensor:
    """Apply step(i, x) for every timestep, in order."""
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}: give noise in a floating dtype, such as float32")
    for i, t in enumerate(tqdm(timesteps, desc="sampling", disable=not progress)):
        x, x0 = step(i, x)
        if callback is not None:
            replacement = callback(i, t, x, x0)
            x = x if replacement is None else replacement
    return x


def whole_timesteps(timesteps: Timesteps, schedule: NoiseSchedule) -> list[int]:
    """The timesteps as a list, for a sampler that only knows those of training."""
    steps = falling_timesteps(timesteps, schedule)
    if any(t != int(t) for t in steps):
        raise InputError(f"timesteps {_shown(steps)} are fractional: this sampler takes whole ones")
    return [int(t) for t in steps]


def falling_timesteps(timesteps: Timesteps, schedule: NoiseSchedule, *, strictly: bool = True) -> list[float]:
    """The timesteps as a list of int or float.

    Raises:
        InputError: if there is none, one is outside 0 ... num_train_timesteps - 1, or they do not fall.
    """
    steps = _numbers("timesteps", timesteps)
    last = schedule.num_train_timesteps - 1
    if not steps:
        raise InputError("there are no timesteps: give at least one, such as schedule.timesteps(50)")
    if not all(0 <= t <= last for t in steps):
        raise InputError(f"timesteps {_shown(steps)}: each must be in 0 to {last}")
    if any(b > a or (strictly and b == a) for a, b in itertools.pairwise(steps)):
        raise InputError(f"timesteps {_shown(steps)} must fall: give them from noise to sample")
    return steps


def falling_sigmas(sigmas: Tensor | Sequence[float], count: int | None = None) -> list[float]:
    """The noise levels of `count` steps, one more than that, as a list of floats.

    Raises:
        InputError: for a wrong number of them, one that is not finite or below 0, or ones that do not fall.
    """
    levels = [float(sigma) for sigma in _numbers("sigmas", sigmas)]
    if len(levels) < 2 or (count is not None and len(levels) != count + 1):
        wanted = "at least 2" if count is None else f"{count + 1} for {count} timesteps"
        raise InputError(f"{len(levels)} sigmas: give {wanted}, the last being where the walk ends (0)")
    if not all(0 <= sigma < math.inf for sigma in levels):
        raise InputError(f"sigmas {_shown(levels)}: each must be finite and not below 0")
    if any(b >= a for a, b in itertools.pairwise(levels)):
        raise InputError(f"sigmas {_shown(levels)} must fall: give them from noise to sample")
    return levels


def needed_noise(noise: Tensor | None, x: Tensor) -> Tensor:
    """`noise`, which this step cannot do without."""
    if noise is None or noise.shape != x.shape:
        found = "none" if noise is None else tuple(noise.shape)
        raise InputError(f"noise: got {found}; this step needs normal noise shaped like x, {tuple(x.shape)}")
    return noise


def bound(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Keep the predicted x0 in range, by dynamic thresholding or clipping, as the schedule says."""
    if schedule.thresholding:
        return dynamic_threshold(x0, schedule.dynamic_thresholding_ratio, schedule.sample_max_value)
    if schedule.clip_sample:
        return x0.clamp(-schedule.clip_sample_range, schedule.clip_sample_range)
    return x0


def _numbers(name: str, values: Tensor | Sequence[float]) -> list[float]:
    """One row of numbers as a list of int and float."""
    row = values.tolist() if isinstance(values, Tensor | np.ndarray) and values.ndim == 1 else values
    if isinstance(row, Sequence):
        row = [v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for v in row]
    if not isinstance(row, Sequence) or not all(isinstance(v, Real) for v in row):
        raise InputError(f"{name} are {described(values)}: give numbers in one row, (N,)")
    return [int(v) if isinstance(v, Integral) else float(v) for v in row]


def _shown(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values[:6])
    return f"{text}, ..." if len(values) > 6 else text
