"""Guides: gradients that know what their model was trained on, so that they guide nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastldm.diffusion.guidance import Gradient
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import CheckpointError, InputError
from fastldm.io import atomic_write
from fastldm.models.weights import read_json
from fastldm.systems import folders

_LATENTS = "latents.json"


@dataclass(frozen=True)
class Latents:
    """Which latents a model takes in the place of pictures.

    Attributes:
        scaling_factor: multiplies those of the first stage.
        first_stage_sha256: of its weights in training; a record alone, since another dtype has another hash.
    """

    scaling_factor: float
    first_stage_sha256: str | None = None


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

    def check(self, shape: tuple[int, ...], scaling: float | None, schedule: NoiseSchedule) -> None:
        """InputError unless a pipeline diffuses such x.

        Args:
            shape: (B, C, H, W) of its x.
            scaling: its `latent_scaling`, None for pictures.
            schedule: its noise.
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
        if self.schedule is not None and not _same_noise(self.schedule, schedule):
            raise InputError(
                "the guide was trained on the noise of another schedule than this pipeline's; train it on "
                "that of the pipeline's scheduler_config.json"
            )

    def save(self, folder: Path) -> None:
        """Write `latents.json` and `scheduler_config.json`, as far as there is something to say."""
        if self.latents is not None:
            atomic_write(folder / _LATENTS, json.dumps(asdict(self.latents), indent=2) + "\n")
        if self.schedule is not None:
            config = self.schedule.to_config("DDPMScheduler")
            atomic_write(folder / folders.SCHEDULER, json.dumps(config, indent=2) + "\n")


def read_latents(folder: Path) -> Latents | None:
    """What `GuideSpace.save` wrote of the latents; None for a model of pictures."""
    file = folder / _LATENTS
    if not file.is_file():
        return None
    config = read_json(file)
    scaling, sha256 = config.get("scaling_factor"), config.get("first_stage_sha256")
    if not isinstance(scaling, (int, float)) or not isinstance(sha256, str | None):
        raise CheckpointError(f"{file} must hold a number scaling_factor and a first_stage_sha256")
    return Latents(float(scaling), sha256)


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
        self._check_count(len(x))
        repeats = len(x) // len(self._conditions)
        return self._bind(self._conditions.repeat_interleave(repeats, dim=0))(x, t)

    def check(
        self, shape: tuple[int, ...], scaling: float | None, schedule: NoiseSchedule, prompts: int
    ) -> None:
        """InputError unless it can guide such x, a batch (B, C, H, W) of so many prompts. See
        `GuideSpace.check`."""
        if len(self._conditions) not in (1, prompts):
            raise self._wrong_count(f"{prompts} prompts")
        self.space.check(shape, scaling, schedule)

    def _check_count(self, samples: int) -> None:
        if len(self._conditions) == 0 or samples % len(self._conditions):
            raise self._wrong_count(f"{samples} pictures")

    def _wrong_count(self, what: str) -> InputError:
        given = len(self._conditions)
        return InputError(f"the guide has {given} captions or labels for {what}: give one, or one per prompt")


def check_gradient(
    gradient: Any, shape: tuple[int, ...], scaling: float | None, schedule: NoiseSchedule, prompts: int
) -> None:
    """InputError unless a pipeline's `gradient` is a Guide that fits (see `Guide.check`) or some function."""
    if isinstance(gradient, Guide):
        gradient.check(shape, scaling, schedule, prompts)
    elif not callable(gradient):
        raise InputError(
            f"gradient is a {type(gradient).__name__}: give what CLIPScorer.gradient(captions) or "
            "ClassifierGuide.gradient(labels) returns, or a function (x, t) -> gradient at x"
        )


def _kind(scaling: float | None) -> str:
    return "pictures" if scaling is None else "latents"


def _same_noise(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    a, b = one.alphas_cumprod, other.alphas_cumprod
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=1e-6))
