"""diffusers' `scheduler_config.json`: the classes whose file is read and written, and what each field means.

A class has fields that `NoiseSchedule` has too, and settings of its sampler, of which only the values that
our sampler works by are taken. Fields of other classes, which diffusers carries along when one scheduler is
made from another's config, have no effect there and are passed over here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastldm.checks import did_you_mean
from fastldm.errors import ConfigError


class _Anything:
    """Accepts every value, of a setting that changes nothing."""

    def __contains__(self, value: Any) -> bool:
        return True


_ANY = _Anything()
_COMMON = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
_CLIP = ("clip_sample", "clip_sample_range")
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_ZERO_SNR = ("rescale_betas_zero_snr",)
# Settings of 2022 that any class may come with.
_OLD = {"tensor_format": ("pt",), "timestep_values": (None,), "skip_prk_steps": _ANY}
_KARRAS = {
    "use_karras_sigmas": (False, True),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
}
_FLOW = {
    "use_flow_sigmas": (False,),
    "flow_shift": _ANY,
    "use_dynamic_shifting": (False,),
    "time_shift_type": _ANY,
}


@dataclass(frozen=True)
class _Scheduler:
    """One of diffusers' classes.

    sampler: ours of the same steps; fields: those of `NoiseSchedule`; defaults: where they are not its own;
    settings: the values taken of any other field.
    """

    sampler: str
    fields: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Collection] = field(default_factory=dict)


_LINSPACE = {"timestep_spacing": "linspace"}
_CLASSES = {
    "DDIMScheduler": _Scheduler(
        "ddim",
        (*_COMMON, *_CLIP, *_THRESHOLD, *_ZERO_SNR, "set_alpha_to_one"),
        {"clip_sample": True},
    ),
    "DDPMScheduler": _Scheduler(
        "ddpm",
        (*_COMMON, *_CLIP, *_THRESHOLD, *_ZERO_SNR, "variance_type"),
        {"clip_sample": True},
    ),
    "PNDMScheduler": _Scheduler(
        "plms",
        (*_COMMON, "set_alpha_to_one"),
        {"set_alpha_to_one": False, "skip_prk_steps": False},
        {"skip_prk_steps": (True,)},
    ),
    "EulerDiscreteScheduler": _Scheduler(
        "euler",
        (*_COMMON, *_ZERO_SNR),
        _LINSPACE,
        {
            **_KARRAS,
            "interpolation_type": ("linear",),
            "sigma_min": (None,),
            "sigma_max": (None,),
            "timestep_type": ("discrete",),
            "final_sigmas_type": ("zero",),
        },
    ),
    "EulerAncestralDiscreteScheduler": _Scheduler("euler_ancestral", (*_COMMON, *_ZERO_SNR), _LINSPACE),
    "HeunDiscreteScheduler": _Scheduler(
        "heun",
        (*_COMMON, *_CLIP),
        {**_LINSPACE, "beta_start": 0.00085, "beta_end": 0.012},
        _KARRAS,
    ),
    "DPMSolverMultistepScheduler": _Scheduler(
        "dpmpp_2m",
        (*_COMMON, *_THRESHOLD, *_ZERO_SNR),
        _LINSPACE,
        {
            **_KARRAS,
            **_FLOW,
            "solver_order": (2,),
            "algorithm_type": ("dpmsolver++",),
            "solver_type": ("midpoint",),
            # The last step goes to 0, and is of first order for that.
            "lower_order_final": _ANY,
            "euler_at_final": _ANY,
            "final_sigmas_type": ("zero",),
            "use_lu_lambdas": (False,),
            "lambda_min_clipped": (-float("inf"),),
            "variance_type": (None, "fixed_small", "fixed_large", "learned_range"),
        },
    ),
    "UniPCMultistepScheduler": _Scheduler(
        "unipc",
        (*_COMMON, *_THRESHOLD, *_ZERO_SNR),
        _LINSPACE,
        {
            **_KARRAS,
            **_FLOW,
            "solver_order": (2,),
            "predict_x0": (True,),
            "solver_type": ("bh2",),
            "lower_order_final": (True,),
            "disable_corrector": ([], ()),
            "solver_p": (None,),
            "sigma_min": (None,),
            "sigma_max": (None,),
            "final_sigmas_type": ("zero",),
            "shift_terminal": (None,),
        },
    ),
}
_KNOWN = {*_OLD, *(name for found in _CLASSES.values() for name in (*found.fields, *found.settings))}


def schedule_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `NoiseSchedule` that a file gives; absent ones as its class has them by default.

    A file that names no class is one of DDIMScheduler, and its variance_type counts.

    Raises:
        ConfigError: for a class that is not offered, a field that no class has, or a setting that the
            sampler does not work by.
    """
    class_name = config.get("_class_name", "DDIMScheduler")
    scheduler = _scheduler(class_name)
    named = "_class_name" in config
    own = scheduler.fields if named else (*scheduler.fields, "variance_type")
    settings = {**_OLD, **scheduler.settings}
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    known = _KNOWN if named else {*own, *settings}
    if unknown := sorted(set(given) - known):
        accepted = f"known: {', '.join(sorted({*own, *settings}))}"
        hint = did_you_mean(unknown[0], {*own, *settings}, accepted)
        raise ConfigError(f"unknown scheduler field(s) {', '.join(unknown)}; {hint}")
    values = {**scheduler.defaults, **given}
    for name, accepted in settings.items():
        if name in values and values[name] not in accepted:
            raise ConfigError(
                f"{class_name} with {name}={values[name]!r} is not offered; "
                f"use {' or '.join(map(repr, accepted))}"
            )
    # It says what the model gives, whatever the class does with it.
    if values.get("variance_type") == "learned_range":
        own = {*own, "variance_type"}
    return {name: values[name] for name in own if name in values}


def config_of(schedule: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """A file of the class, from all fields of a `NoiseSchedule`; those the class does not have are left out.

    Raises:
        ConfigError: for a class that is not offered.
    """
    scheduler = _scheduler(class_name)
    fields = {name: schedule[name] for name in scheduler.fields}
    if schedule["variance_type"] == "learned_range":
        fields["variance_type"] = "learned_range"
    wanted = {
        name: accepted[0]
        for name, accepted in scheduler.settings.items()
        if name in scheduler.defaults and scheduler.defaults[name] not in accepted
    }
    return {"_class_name": class_name, **fields, **wanted}


def class_of(sampler: str) -> str:
    """diffusers' class that steps as our sampler does."""
    return next(name for name, scheduler in _CLASSES.items() if scheduler.sampler == sampler)


def sampler_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """The sampler that a file names by its class, and whether on Karras' noise levels."""
    scheduler = _scheduler(config.get("_class_name", "DDIMScheduler"))
    return scheduler.sampler, takes_karras(scheduler.sampler) and config.get("use_karras_sigmas", False)


def takes_karras(sampler: str) -> bool:
    """Whether diffusers' class of the sampler can say that it steps on Karras' noise levels."""
    return "use_karras_sigmas" in _CLASSES[class_of(sampler)].settings


def _scheduler(class_name: str) -> _Scheduler:
    if class_name not in _CLASSES:
        raise ConfigError(f"scheduler class {class_name} is not offered; use {' or '.join(_CLASSES)}")
    return _CLASSES[class_name]
