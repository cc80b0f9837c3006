"""What a denoiser predicts: the noise, the clean sample or the velocity, and how one gives the others.

All functions take abar_t as a number, or as a tensor that broadcasts against the samples ((B, 1, 1, 1)).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastldm.checks import described
from fastldm.errors import ConfigError, InputError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def target(x0: Tensor, noise: Tensor, alpha_bar: Tensor | float, prediction_type: str) -> Tensor:
    """The training target for x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, in x0's dtype."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return (alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0).to(x0.dtype)
    raise _unknown(prediction_type)


def to_x0(model_output: Tensor, x_t: Tensor, alpha_bar: Tensor | float, prediction_type: str) -> Tensor:
    """The clean sample that `model_output` at x_t stands for. Infinite for epsilon at abar = 0 (zero SNR)."""
    if prediction_type == "epsilon":
        return (x_t - (1 - alpha_bar) ** 0.5 * model_output) / alpha_bar**0.5
    if prediction_type == "sample":
        return model_output
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * model_output
    raise _unknown(prediction_type)


def to_eps(model_output: Tensor, x_t: Tensor, alpha_bar: Tensor | float, prediction_type: str) -> Tensor:
    """The noise that `model_output` at x_t stands for."""
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "sample":
        return (x_t - alpha_bar**0.5 * model_output) / (1 - alpha_bar) ** 0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * model_output + (1 - alpha_bar) ** 0.5 * x_t
    raise _unknown(prediction_type)


def same_shape(name: str, value: Any, x: Any) -> Any:
    """`value`; InputError unless it is a tensor of the shape of x. `name`: what it is, or who made it."""
    if getattr(value, "shape", None) != x.shape:
        found = tuple(value.shape) if hasattr(value, "shape") else described(value)
        raise InputError(f"{name}: {found} for x {tuple(x.shape)}; the shapes must be the same")
    return value


def _unknown(prediction_type: str) -> ConfigError:
    return ConfigError(
        f"prediction_type={prediction_type!r} is not offered; use one of {', '.join(PREDICTION_TYPES)}"
    )
