"""What a call of every system that makes pictures does alike: checks, noise, the walk, the pictures' form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastldm.checks import described, is_count, is_number, plain_number
from fastldm.diffusion.guidance import Denoiser, Gradient, finite, fraction, gradient_guided
from fastldm.diffusion.samplers import DRAWING, SAMPLERS, Generators, NoiseLevels, check_generators, randn
from fastldm.diffusion.scheduler_config import takes_karras
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import ConfigError, InputError
from fastldm.models.outputs import Output
from fastldm.pictures import to_pil

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# callback(pipeline, step, timestep, {"latents": x}) -> a mapping whose "latents" replace x, or None.
StepCallback = Callable[..., Mapping[str, Tensor] | None]


@dataclass
class ImagePipelineOutput(Output):
    """images: PIL images, numpy (B, H, W, 3) or tensor (B, 3, H, W), float32 in [0, 1], or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


def check_sampler(sampler: str, karras: bool) -> None:
    """ConfigError unless a model can have this sampler as its default."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler={sampler!r} is not offered; use one of {', '.join(SAMPLERS)}")
    if karras and not takes_karras(sampler):
        others = ", ".join(filter(takes_karras, SAMPLERS))
        raise ConfigError(f"karras=True as the default of sampler {sampler!r}; it can be that of {others}")


def with_defaults(known: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a call uses by default: `known`, and in its place what a model was given.

    Raises:
        ConfigError: for a name that is not known, or values of num_inference_steps and guidance_scale that no
            call can use.
    """
    if unknown := sorted(set(given or {}) - set(known)):
        raise ConfigError(f"unknown default(s) {', '.join(unknown)}; known: {', '.join(known)}")
    # What comes from numpy or torch is stored as plain numbers, which JSON knows.
    given = {name: plain_number(value) for name, value in (given or {}).items()}
    defaults = {**known, **given}
    steps, scale = defaults["num_inference_steps"], defaults["guidance_scale"]
    if not is_count(steps):
        raise ConfigError(f"the default num_inference_steps must be a whole number from 1, got {steps!r}")
    if not is_number(scale):
        raise ConfigError(f"the default guidance_scale must be a finite number, got {scale!r}")
    return defaults


def check_call(
    output_type: str,
    sampler: str,
    *,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    negative_prompt: Any = None,
    num_images_per_prompt: int = 1,
    eta: float = 0.0,
    gradient: Any = None,
    gradient_scale: float | None = None,
    callback_on_step_end: Any = None,
) -> None:
    """InputError for an argument of a call that cannot be used; warns of one that changes nothing.

    A pipeline's decorated `__call__` calls it, or the warnings name another line than the user's.
    """
    finite("guidance_scale", guidance_scale)
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type={output_type!r} is not offered; use one of {', '.join(OUTPUT_TYPES)}")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler={sampler!r} is not offered; use one of {', '.join(SAMPLERS)}")
    fraction("guidance_rescale", guidance_rescale)
    if fraction("eta", eta) and sampler != "ddim":
        raise InputError(
            f"eta={eta!r} with sampler {sampler!r}: it is 0 to 1 for 'ddim', and 0 for any other"
        )
    if not is_count(num_images_per_prompt):
        raise InputError(f"num_images_per_prompt={num_images_per_prompt!r}: ask for a whole number from 1")
    if gradient_scale is not None:
        finite("gradient_scale", gradient_scale)
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise InputError(
            f"callback_on_step_end is {described(callback_on_step_end)}: give a function of (pipeline, step, "
            "timestep, tensors)"
        )
    unguided = {"negative_prompt": negative_prompt is not None, "guidance_rescale": guidance_rescale}
    idle = [f"{name} has no effect at guidance_scale=1" for name, given in unguided.items() if given]
    idle = idle if guidance_scale == 1 else []
    if gradient is None and gradient_scale is not None:
        idle.append("gradient_scale has no effect without a gradient")
    for what in idle:
        warnings.warn(what, stacklevel=4)


def first_noise(
    shape: tuple[int, ...], generator: Generators, latents: Tensor | None, device: torch.device
) -> Tensor:
    """The noise that a walk starts from, float32 of `shape`: `latents` if given, else drawn."""
    check_generators(generator, shape[0])
    if latents is None:
        return randn(shape, generator, device=device)
    if not isinstance(latents, Tensor) or not latents.is_floating_point() or tuple(latents.shape) != shape:
        raise InputError(f"latents are {described(latents)}; this call needs a float tensor {shape}")
    if not bool(latents.isfinite().all()):
        raise InputError("latents hold NaN or infinity; give noise, such as torch.randn makes")
    return latents.to(device, torch.float32)


def walk_down(
    sampler: str,
    denoiser: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    levels: NoiseLevels,
    *,
    eta: float = 0.0,
    generator: Generators = None,
    gradient: Gradient | None = None,
    gradient_scale: float = 1.0,
    callback: Callable[[int, float, Tensor, Tensor], Tensor | None] | None = None,
    progress: bool = True,
) -> Tensor:
    """From noise x to the sample by a sampler of `SAMPLERS`, guided by a gradient if there is one.

    It moves the mean of "ddpm" and the noise of the other samplers (Dhariwal and Nichol 2021, algorithms 1
    and 2). Warns of a sample that is not finite.
    """
    # DDPM has a mean to move; for any other sampler guidance is a change of the noise.
    gradient = None if gradient is None else _of_the_shape_of_x(gradient)
    by_mean = gradient is not None and sampler == "ddpm"
    if gradient is not None and not by_mean:
        denoiser = gradient_guided(denoiser, gradient, gradient_scale, schedule)
    x = SAMPLERS[sampler](
        denoiser,
        x,
        schedule,
        levels.timesteps,
        callback=callback,
        progress=progress,
        **({} if levels.sigmas is None else {"sigmas": levels.sigmas}),
        **({"generator": generator} if sampler in DRAWING else {}),
        **({"eta": eta} if sampler == "ddim" else {}),
        **({"guidance": gradient, "guidance_scale": gradient_scale} if by_mean else {}),
    )
    # In 8 bits they are black, or what a codebook makes of them.
    if not bool(x.isfinite().all()):
        warnings.warn(
            "the samples hold NaN or infinity: look at weights, dtype (float16 ends at 65504) and gradient",
            stacklevel=2,
        )
    return x


def step_callback(
    pipeline: Any, callback_on_step_end: StepCallback | None, *, first_step: int = 0
) -> Callable[[int, float, Tensor, Tensor], Tensor | None] | None:
    """A sampler's callback that calls a user's, whose steps are counted from `first_step`.

    Raises:
        InputError: on a call, if the user's gives something else than `StepCallback` says.
    """
    if callback_on_step_end is None:
        return None

    def callback(i: int, t: float, x: Tensor, x0: Tensor) -> Tensor | None:
        changed = callback_on_step_end(pipeline, first_step + i, t, {"latents": x})
        if changed is None:
            return None
        known = isinstance(changed, Mapping) and changed.keys() <= {"latents"}
        found = changed.get("latents", x) if known else None
        if not isinstance(found, Tensor) or found.shape != x.shape or not found.is_floating_point():
            given = dict(changed) if isinstance(changed, Mapping) else changed
            raise InputError(
                f"callback_on_step_end gave {_shown(given)} at step {first_step + i}: it must give None or "
                f'{{"latents": a float tensor {tuple(x.shape)}}}'
            )
        return found.to(x)

    return callback


def as_output(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as "pil", "np" or "pt"."""
    if output_type == "pil":
        return to_pil(images)
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


@contextmanager
def evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """No dropout while sampling, also in the middle of training."""
    training = [network for network in networks if network.training]
    try:
        for network in training:
            network.eval()
        yield
    finally:
        for network in training:
            network.train()


def _shown(given: Any) -> str:
    if not isinstance(given, dict):
        return described(given)
    return f"{{{', '.join(f'{key!r}: {described(value)}' for key, value in given.items())}}}"


def _of_the_shape_of_x(gradient: Gradient) -> Gradient:
    """The same gradient, which may not be broadcast."""

    def checked(x: Tensor, t: Tensor) -> Tensor:
        found = gradient(x, t)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the gradient is {given} at x {tuple(x.shape)}: it must have the shape of x")
        return found

    return checked
