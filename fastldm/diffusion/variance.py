"""The variance of a reverse step: how a model that learns it gives it, and what it means.

Nichol and Dhariwal 2021, section 3.1: the model gives 2C channels for x of C, the prediction and then v,
which interpolates the logarithm of the variance between that of the posterior q(x_{t-1} | x_t, x_0) at v = -1
and beta_t at v = 1, the bounds between which the best variance lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.errors import InputError

# Beyond any variance of a schedule (1e-20 to 1), and far enough from the ends of float32 to square.
_LOG_LIMIT = 50.0


def split_variance(
    model_output: Tensor, x: Tensor, schedule: NoiseSchedule | None = None
) -> tuple[Tensor, Tensor | None]:
    """A model's output at x (B, C, ...) as its prediction (B, C, ...) and v (B, C, ...), or None without v.

    Args:
        model_output: (B, 2C, ...) under variance_type "learned_range", and (B, C, ...) under any other.
        schedule: the one of the model; None = either shape will do.

    Raises:
        InputError: for an output of another shape.
    """
    double = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if x.ndim > 1 else None
    learned = schedule is not None and schedule.variance_type == "learned_range"
    if model_output.shape == x.shape and not learned:
        return model_output, None
    if model_output.shape == double and (learned or schedule is None):
        prediction, v = model_output.chunk(2, dim=1)
        return prediction, v
    found = f"the denoiser gave {tuple(model_output.shape)} for x {tuple(x.shape)}"
    if schedule is None:
        raise InputError(f"{found}: it must keep the shape, or double the channels for a learned variance")
    wanted = double if learned else tuple(x.shape)
    raise InputError(
        f"{found}, but variance_type={schedule.variance_type!r} needs {wanted}; a learned variance goes with "
        "twice the channels and variance_type='learned_range', any other with the shape of x"
    )


def learned_log_variance(v: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """log of the variance that v stands for, in at least float32 (Nichol and Dhariwal 2021, eq. 15).

    v is not clipped to [-1, 1], as in the paper, but the result is to +-50: extreme v stays finite.

    Args:
        v: (B, C, ...).
        lowest, highest: the variances at v = -1 and v = 1, above 0, broadcastable to v.
    """
    share = v.to(torch.promote_types(v.dtype, torch.float32)) / 2 + 0.5
    log_variance = share * highest.log() + (1 - share) * lowest.log()
    return log_variance.clamp(-_LOG_LIMIT, _LOG_LIMIT)
