"""Noise schedules of discrete-time diffusion: q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I).

A schedule carries the fields of diffusers' `scheduler_config.json`, so the file of a DDPM or DDIM scheduler
reads and writes without loss, and that of another one but for its sampler's settings. Betas and their
products are made in float32, as diffusers makes them, so that the numbers agree to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastldm.checks import is_count, is_fraction, is_number
from fastldm.diffusion import predictions, scheduler_config
from fastldm.errors import ConfigError, InputError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


def cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> Tensor:
    """Betas, float32 (T,), of abar(t) = cos^2((t + .008) / 1.008 pi / 2) (Nichol, Dhariwal 2021, eq. 17)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = num_train_timesteps
    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float32)


def check_threshold(ratio: float, max_value: float, error: type[Exception]) -> None:
    """`error` unless they are arguments of `fastldm.diffusion.dynamic_threshold`."""
    if not is_fraction(ratio) or not is_number(max_value) or not max_value > 0:
        raise error(
            f"dynamic thresholding with ratio={ratio!r}, max_value={max_value!r}: use a ratio in [0, 1] and "
            "a max_value above 0"
        )


def check_leading(first: int, count: int, offset: int, total: int) -> None:
    """InputError where the first of `count` "leading" timesteps is not one of the `total` of training."""
    if first >= total:
        raise InputError(
            f"num_inference_steps={count} with steps_offset={offset} asks for timestep {first}; the last "
            f"trained one is {total - 1}: use fewer steps or steps_offset=0"
        )


def rescale_to_zero_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that abar_T = 0 and abar_1 stays (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True, eq=False, kw_only=True)
class NoiseSchedule:
    """A noise schedule and how a sampler walks it. Fields as in diffusers' schedulers.

    `clip_sample` is off by default, unlike diffusers: latents are not bounded by 1.

    `variance_type` is that of DDPM's steps: the posterior's ("fixed_small"), beta ("fixed_large"), or one in
    between that the denoiser gives in as many channels again ("learned_range"). diffusers' "learned" is not
    offered: there it is the variance itself, and in Nichol and Dhariwal's code its logarithm.

    Attributes:
        betas: float32 (T,).
        alphas_cumprod: float32 (T,), abar_t = prod_{s <= t} (1 - beta_s).
        final_alpha_cumprod: float32 scalar, the abar that DDIM's last step goes to: 1, or abar_0 where
            `set_alpha_to_one` is false (as CompVis trained).

    Raises:
        ConfigError: for a field value that is not offered, or for epsilon prediction at zero terminal SNR.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    variance_type: str = "fixed_small"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    rescale_betas_zero_snr: bool = False
    betas: Tensor = field(init=False, repr=False)
    alphas_cumprod: Tensor = field(init=False, repr=False)
    final_alpha_cumprod: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, accepted in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", predictions.PREDICTION_TYPES),
            ("timestep_spacing", TIMESTEP_SPACINGS),
            ("variance_type", VARIANCE_TYPES),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not offered; use one of {', '.join(accepted)}"
                )
        if not is_count(self.num_train_timesteps):
            raise ConfigError(f"num_train_timesteps={self.num_train_timesteps!r}: give a whole number from 1")
        if self.steps_offset != 0 and not is_count(self.steps_offset):
            raise ConfigError(f"steps_offset={self.steps_offset!r}: give a whole number from 0")
        if self.thresholding:
            check_threshold(self.dynamic_thresholding_ratio, self.sample_max_value, ConfigError)
        if self.clip_sample and not self.clip_sample_range > 0:
            raise ConfigError(f"clip_sample_range={self.clip_sample_range}: use a number above 0")
        if self.trained_betas is None and not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end}: need 0 < beta_start <= beta_end < 1"
            )
        betas = self._make_betas()
        if self.rescale_betas_zero_snr:
            betas = rescale_to_zero_snr(betas)
        alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        if not bool(alphas_cumprod.isfinite().all()):
            raise ConfigError(
                f"the noise of {self.num_train_timesteps} timesteps cannot be rescaled to zero SNR: that "
                "needs two timesteps, the first of less noise"
            )
        if self.prediction_type == "epsilon" and bool((alphas_cumprod == 0).any()):
            raise ConfigError(
                "prediction_type='epsilon' with zero SNR (rescale_betas_zero_snr=True, or trained_betas to "
                "1): the noise at zero SNR holds no picture; use 'v_prediction' or 'sample'"
            )
        final = torch.tensor(1.0) if self.set_alpha_to_one else alphas_cumprod[0]
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "final_alpha_cumprod", final)

    def _make_betas(self) -> Tensor:
        steps, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            if len(self.trained_betas) != steps:
                raise ConfigError(
                    f"trained_betas has {len(self.trained_betas)} values, num_train_timesteps is {steps}"
                )
            betas = torch.tensor([float(beta) for beta in self.trained_betas], dtype=torch.float32)
            if not bool(((betas >= 0) & (betas <= 1)).all()):
                raise ConfigError("trained_betas has values that are no variances; give numbers from 0 to 1")
            return betas
        if self.beta_schedule == "linear":
            return torch.linspace(start, end, steps, dtype=torch.float32)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        return cosine_betas(steps)

    @classmethod
    def linear(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        **settings: Any,
    ) -> NoiseSchedule:
        """Betas linear in t (Ho et al. 2020)."""
        return cls(
            beta_schedule="linear",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            **settings,
        )

    @classmethod
    def scaled_linear(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        **settings: Any,
    ) -> NoiseSchedule:
        """Square roots of the betas linear in t: what CompVis' latent diffusion calls "linear"."""
        return cls(
            beta_schedule="scaled_linear",
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            **settings,
        )

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, **settings: Any) -> NoiseSchedule:
        """Cosine abar with betas capped at 0.999 (Nichol and Dhariwal 2021)."""
        return cls(beta_schedule="squaredcos_cap_v2", num_train_timesteps=num_train_timesteps, **settings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """From the `scheduler_config.json` of diffusers' class of any sampler here, or a part of its fields.

        Absent fields take diffusers' defaults. Without `_class_name` it is a DDIMScheduler's.

        Raises:
            ConfigError: for another scheduler class, a field that it does not have, or a setting of it that
                the sampler here does not work by, such as solver_order=3.
        """
        given = scheduler_config.schedule_fields(config)
        try:
            return cls(**given)
        except (TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"no noise schedule can be built from these fields: {reason}") from error

    def to_config(self, class_name: str = "DDIMScheduler") -> dict[str, Any]:
        """The fields of `scheduler_config.json` for a class of diffusers', without those it does not have.

        variance_type "learned_range" is among them for every class: it says what the model gives.
        """
        return scheduler_config.config_of(self.to_fields(), class_name)

    def to_fields(self) -> dict[str, Any]:
        """All fields as plain values; `from_config` makes the same schedule of them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if self.trained_betas is not None:
            values["trained_betas"] = [float(beta) for beta in self.trained_betas]
        return values

    def output_channels(self, channels: int) -> int:
        """Those of a denoiser's output for x of `channels`: twice as many with a learned variance."""
        return 2 * channels if self.variance_type == "learned_range" else channels

    def alpha_bar(self, like: Tensor, t: Tensor) -> Tensor:
        """abar_t, shaped to broadcast against `like` (B, ...), in at least float32.

        t (B,) int64, or float for timesteps in between, where sigma = sqrt(1 / abar - 1) is linear in t.
        """
        last = self.num_train_timesteps - 1
        # Those of a GPU are not read, which would wait for it, nor those of a graph that is being compiled.
        readable = t.device.type == "cpu" and t.numel() > 0 and not torch.compiler.is_compiling()
        if readable and not 0 <= t.min() <= t.max() <= last:
            raise InputError(f"timesteps {t.min()} to {t.max()}: each must be in 0 to {last}")
        alphas_cumprod = self.alphas_cumprod.to(t.device)
        if t.is_floating_point():
            below = t.floor().long()
            above = (below + 1).clamp(max=self.num_train_timesteps - 1)
            low, high = ((1 / alphas_cumprod[i].double() - 1) ** 0.5 for i in (below, above))
            weight = t.double() - below
            # At zero SNR sigma is infinite, and 0 times that is not a number.
            sigma = torch.where(weight > 0, torch.lerp(low, high, weight), low)
            alpha_bar = 1 / (1 + sigma**2)
        else:
            alpha_bar = alphas_cumprod[t]
        alpha_bar = alpha_bar.to(like.device, torch.promote_types(like.dtype, torch.float32))
        return alpha_bar.reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise. x0, noise (B, ...), t int64 (B,) -> x0's dtype."""
        predictions.same_shape("noise", noise, x0)
        alpha_bar = self.alpha_bar(x0, t)
        return (alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise).to(x0.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v_t = sqrt(abar_t) noise - sqrt(1 - abar_t) x0 (Salimans and Ho 2022). Shapes as in `add_noise`."""
        return predictions.target(x0, noise, self.alpha_bar(x0, t), "v_prediction")

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser must output at (x_t, t) under `prediction_type`. Shapes as in `add_noise`."""
        return predictions.target(x0, noise, self.alpha_bar(x0, t), self.prediction_type)

    def timesteps(
        self, num_inference_steps: int, spacing: str | None = None, steps_offset: int | None = None
    ) -> Tensor:
        """The timesteps a sampler visits, int64 (num_inference_steps,), falling.

        Args:
            spacing: "leading" (CompVis), "trailing" or "linspace" (Lin et al. 2023, table 2); None = our own.
            steps_offset: added to "leading" timesteps; None = our own.
        """
        total, count = self.num_train_timesteps, num_inference_steps
        spacing = self.timestep_spacing if spacing is None else spacing
        offset = self.steps_offset if steps_offset is None else steps_offset
        if not is_count(count) or count > total:
            raise InputError(
                f"num_inference_steps={count!r}: the model was trained on {total} steps; use 1 to {total}"
            )
        if spacing == "leading":
            steps = np.arange(count)[::-1] * (total // count) + offset
            check_leading(steps[0], count, offset, total)
        elif spacing == "trailing":
            # Rounding in arange can append one more value below the last step: cut it off.
            steps = np.round(np.arange(total, 0, -total / count))[:count] - 1
        elif spacing == "linspace":
            steps = np.linspace(0, total - 1, count).round()[::-1]
        else:
            raise InputError(f"spacing={spacing!r} is not offered; use one of {', '.join(TIMESTEP_SPACINGS)}")
        return torch.from_numpy(steps.astype(np.int64))

    def sections(self, counts: Sequence[int]) -> Tensor:
        """Timesteps that lie closer where it matters: int64 (sum of counts,), falling.

        The schedule is cut into len(counts) equal parts, the first at the clean end, and part i is walked in
        counts[i] even steps from its first to its last timestep (Nichol and Dhariwal 2021, section 4, and the
        respacing "10,10,3,2,2" of their code).

        Raises:
            InputError: for no parts, or a part with more steps than timesteps, or none.
        """
        total = self.num_train_timesteps
        size, longer = divmod(total, max(1, len(counts)))
        steps, start = [], 0
        for i, count in enumerate(counts):
            length = size + (i < longer)
            if not 1 <= count <= length:
                raise InputError(
                    f"counts={list(counts)}: part {i + 1} has {length} of the {total} timesteps; use 1 to "
                    f"{length} steps"
                )
            stride = (length - 1) / (count - 1) if count > 1 else 0
            steps += [start + round(stride * j) for j in range(count)]
            start += length
        if not steps:
            raise InputError("counts is empty: give the number of steps of each part, such as [10, 10, 5]")
        return torch.tensor(steps[::-1])
