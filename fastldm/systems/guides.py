"""Guides: gradients that know what their model was trained on, so that they guide nothing else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastldm.checks import described, is_number, with_article
from fastldm.diffusion.guidance import Gradient
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError, InputError
from fastldm.io import write_json
from fastldm.models.weights import read_json
from fastldm.systems import folders

_LATENTS = "latents.json"


@dataclass(frozen=True)
class Latents:
    """Which latents a model takes in the place of pictures.

    Attributes:
        scaling_factor: multiplies those of the first stage.
        first_stage_sha256: of the file of its weights in training; a record alone, since the same weights in
            another dtype or format have another hash.
        fingerprint: by which they are known again, see `fingerprint`; None in folders from before it was
            kept.
    """

    scaling_factor: float
    first_stage_sha256: str | None = None
    fingerprint: tuple[float, ...] | None = None

    def check(self, first_stage: nn.Module) -> None:
        """InputError for those of another first stage; warns where it is not known whose they are."""
        if self.fingerprint is None:
            if self.first_stage_sha256 is not None:
                warnings.warn(
                    "the guide's folder has no fingerprint of its first stage, so that was not compared with "
                    "this pipeline's; train the guide again to have it checked",
                    stacklevel=2,
                )
            return
        one, other = (torch.tensor(x) for x in (self.fingerprint, fingerprint(first_stage)))
        if one.shape != other.shape or not (one - other).norm() <= _SAME_LATENTS * one.norm():
            raise InputError(
                "the guide was trained on latents of another first stage than this pipeline's; train it with "
                "first_stage.path the pipeline's folder"
            )


# Relative. In bfloat16 the shipped first stage's differ by 0.003, and those of fresh weights by more than 1.
_SAME_LATENTS = 0.1


@torch.no_grad()
def fingerprint(first_stage: nn.Module) -> tuple[float, ...]:
    """The latents, unscaled, of one fixed small picture: alike in every dtype, other for other weights.

    Args:
        first_stage: VQModel, AutoencoderKL (of which the mean counts) or PixelSpace, in evaluation mode.
    """
    side = 4 * first_stage.downsample_factor
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    channels = first_stage.config.get("in_channels", 3)
    angles = [2.4 * channel for channel in range(channels)]
    waves = [torch.sin(5 * (rows * math.sin(a) + columns * math.cos(a)) + a) for a in angles]
    parameters = list(first_stage.parameters())
    picture = torch.stack(waves)[None]
    if parameters:
        picture = picture.to(parameters[0].device, parameters[0].dtype)
    encoded = first_stage.encode(picture)
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    return tuple(float(f"{value:.4g}") for value in latents.float().flatten().tolist())


@dataclass(frozen=True, eq=False)
class GuideSpace:
    """The x that a guiding model was trained on.

    Attributes:
        shape: (C, H, W).
        latents: which ones x are; None = pictures in [-1, 1].
        schedule: of the noise in x_t; None for a model that saw no noise, which then guides at any.
    """

    shape: tuple[int, int, int]
    latents: Latents | None
    schedule: NoiseSchedule | None

    def check(
        self,
        shape: tuple[int, ...],
        scaling: float | None,
        schedule: NoiseSchedule,
        first_stage: nn.Module | None = None,
    ) -> None:
        """InputError unless a pipeline diffuses such x; warns where that cannot be told.

        Args:
            shape: (B, C, H, W) of its x.
            scaling: its `latent_scaling`, None for pictures.
            schedule: its noise.
            first_stage: its own, where it diffuses latents.
        """
        own = None if self.latents is None else self.latents.scaling_factor
        if tuple(shape[1:]) != self.shape or (own is None) != (scaling is None):
            on = "first_stage.path the pipeline's folder"
            if scaling is None:
                on = f"noised=true, data.size={shape[-1]} and the pipeline's schedule, without first_stage"
            raise InputError(
                f"the guide was trained on {_kind(own)} {self.shape}, but this call diffuses "
                f"{_kind(scaling)} {tuple(shape[1:])}; train one with {on}"
            )
        if own is not None and not math.isclose(own, scaling, rel_tol=1e-4):
            raise InputError(
                f"the guide was trained on latents times {own:g}, but those of this pipeline are times "
                f"{scaling:g}: another first stage; train one on them"
            )
        if own is not None and first_stage is not None:
            self.latents.check(first_stage)
        if self.schedule is not None and not _same_noise(self.schedule, schedule):
            raise InputError(
                "the guide was trained on the noise of another schedule than this pipeline's; train it on "
                "that of the pipeline's scheduler_config.json"
            )

    def check_takes_pictures(self, model: str) -> None:
        """InputError for a `model` (what it is called in messages) whose x are latents."""
        if self.latents is not None:
            raise InputError(
                f"this {model} takes latents {self.shape}, not pictures; give those of the pipeline that it "
                "was trained to guide: `pipeline.encode(fastldm.pictures.from_pil(pictures, size))`"
            )

    def check_x(self, x: Any) -> None:
        """InputError unless x is a floating tensor (B, *shape) of at least one sample."""
        if (
            not isinstance(x, Tensor)
            or x.ndim != 4
            or tuple(x.shape[1:]) != self.shape
            or not (len(x) and x.is_floating_point())
        ):
            kind = "pictures in [-1, 1]" if self.latents is None else "scaled latents"
            shape = ", ".join(map(str, self.shape))
            raise InputError(f"x is {described(x)}, but the model takes {kind}, float (B, {shape})")

    def checked_timestep(self, timestep: Any, samples: int) -> Tensor | None:
        """The timestep of so many samples as a tensor (1,) or (B,); None for a model that saw no noise.

        Raises:
            InputError: for one outside the schedule or none where there is a schedule, for one where there is
                none, and for another number of them.
        """
        if self.schedule is None:
            if timestep is not None:
                raise InputError(
                    f"timestep={timestep!r:.60}, but this model was trained on x without noise; leave it out"
                )
            return None
        accepted = f"0 (no noise) to {self.schedule.num_train_timesteps - 1}, one or one per sample"
        if timestep is None:
            raise InputError(f"this model was trained on noised x; give its timestep, {accepted}")
        array = isinstance(timestep, Tensor | np.ndarray)
        given = timestep.reshape(-1).tolist() if array else timestep
        steps = [given] if isinstance(given, Real) or not isinstance(given, Sequence) else given
        last = self.schedule.num_train_timesteps - 1
        if not all(is_number(t) and 0 <= t <= last for t in steps):
            raise InputError(f"timestep={given!r:.60}: give {accepted}")
        if len(steps) not in (1, samples):
            raise InputError(f"{len(steps)} timesteps for {samples} samples: give {accepted}")
        return torch.as_tensor(timestep).reshape(-1)

    def save(self, folder: Path) -> None:
        """Write `latents.json` and `scheduler_config.json`, as far as there is something to say."""
        if self.latents is not None:
            write_json(folder / _LATENTS, asdict(self.latents))
        if self.schedule is not None:
            config = self.schedule.to_config("DDPMScheduler")
            write_json(folder / folders.SCHEDULER, config)


def read_latents(folder: Path) -> Latents | None:
    """What `GuideSpace.save` wrote of the latents; None for a model of pictures."""
    file = folder / _LATENTS
    if not file.is_file():
        return None
    config = read_json(file)
    scaling, sha256 = config.get("scaling_factor"), config.get("first_stage_sha256")
    if not is_number(scaling) or not isinstance(sha256, str | None):
        raise CheckpointError(f"{file} must hold a number scaling_factor and a first_stage_sha256")
    seen = config.get("fingerprint")
    if seen is not None and not (isinstance(seen, list) and seen and all(map(is_number, seen))):
        raise CheckpointError(f"{file} must hold a list of numbers as its fingerprint, or none")
    return Latents(float(scaling), sha256, None if seen is None else tuple(seen))


def read_schedule(folder: Path) -> NoiseSchedule | None:
    """What `GuideSpace.save` wrote of the noise; None for a model that saw none."""
    file = folder / folders.SCHEDULER
    return NoiseSchedule.from_config(read_json(file)) if file.is_file() else None


class Guide:
    """(x, t) -> the gradient at x of log p(condition | x_t): a `Gradient` for any sampler, of any batch.

    Where x has n times as many samples as there are conditions, each condition is that of n samples one after
    another, as a pipeline orders the pictures of one prompt.

    Args:
        bind: the gradient for one condition per sample, (B, ...).
        conditions: (B, ...), features of captions or labels.
        space: what the model was trained on.
    """

    def __init__(self, bind: Callable[[Tensor], Gradient], conditions: Tensor, space: GuideSpace) -> None:
        self.space = space
        self._bind = bind
        self._conditions = conditions

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.space.check_x(x)
        self._check_count(len(x))
        # A sampler's timesteps lie where x does; to read those of a GPU would wait for it at every step.
        if self.space.schedule is not None and not (isinstance(t, Tensor) and t.device.type != "cpu"):
            self.space.checked_timestep(t, len(x))
        repeats = len(x) // len(self._conditions)
        return self._bind(self._conditions.repeat_interleave(repeats, dim=0))(x, t)

    def check(
        self,
        shape: tuple[int, ...],
        scaling: float | None,
        schedule: NoiseSchedule,
        prompts: int,
        first_stage: nn.Module | None = None,
    ) -> None:
        """InputError unless it can guide such x, a batch (B, C, H, W) of so many prompts. See
        `GuideSpace.check`."""
        if len(self._conditions) not in (1, prompts):
            raise self._wrong_count(f"{prompts} prompts")
        self.space.check(shape, scaling, schedule, first_stage)

    def _check_count(self, samples: int) -> None:
        if len(self._conditions) == 0 or samples % len(self._conditions):
            raise self._wrong_count(f"{samples} pictures")

    def _wrong_count(self, what: str) -> InputError:
        given = len(self._conditions)
        return InputError(f"the guide has {given} captions or labels for {what}: give one, or one per prompt")


def check_gradient(
    gradient: Any,
    shape: tuple[int, ...],
    scaling: float | None,
    schedule: NoiseSchedule,
    prompts: int,
    first_stage: nn.Module | None = None,
) -> None:
    """InputError unless a pipeline's `gradient` is a Guide that fits (see `Guide.check`) or some function."""
    if isinstance(gradient, Guide):
        gradient.check(shape, scaling, schedule, prompts, first_stage)
    elif not callable(gradient):
        raise InputError(
            f"gradient is {with_article(type(gradient).__name__)}: give what CLIPScorer.gradient(captions) "
            "or ClassifierGuide.gradient(labels) returns, or a function (x, t) -> gradient at x"
        )


def _kind(scaling: float | None) -> str:
    return "pictures" if scaling is None else "latents"


def _same_noise(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    a, b = one.alphas_cumprod, other.alphas_cumprod
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=1e-6))
