"""Losses of diffusion training: L_simple, the terms of the variational bound, and the hybrid of both.

Ho et al. 2020; Nichol and Dhariwal 2021, section 3.1; Hang et al. 2023 for Min-SNR weights. All give one
number per sample, so that the mean over a batch of uniform t is the loss. Each is computed in float32, or in
float64 where x0 is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastldm.checks import is_number
from fastldm.diffusion.predictions import same_shape, to_x0
from fastldm.diffusion.schedules import NoiseSchedule
from fastldm.diffusion.variance import learned_log_variance, split_variance
from fastldm.errors import InputError

# Half the distance of two values of an 8-bit picture in [-1, 1], and how near the ends count as the ends.
_HALF_BIN = 1 / 255
_END = 0.999


def simple_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    snr_gamma: float | None = None,
) -> Tensor:
    """The mean squared error of the prediction (Ho et al. 2020, eq. 14), (B,); not of a learned variance.

    Args:
        model_output: at x_t and t, (B, C, ...), or (B, 2C, ...) under variance_type "learned_range".
        x0, noise: (B, C, ...), of which x_t is made: `schedule.add_noise(x0, noise, t)`.
        t: int64 (B,).
        snr_gamma: gamma of the Min-SNR weights, which make the loss min(SNR, gamma) ||x0 - x0_hat||^2 for
            every prediction type; None = no weights. At zero SNR, that of "sample" and "v_prediction" is 0.

    Raises:
        InputError: for noise of another shape than x0, or a gamma that is not above 0.
    """
    dtype = _at_least_float32(x0)
    if snr_gamma is not None and not (is_number(snr_gamma) and snr_gamma > 0):
        raise InputError(
            f"snr_gamma={snr_gamma!r}: give a number above 0, such as 5.0, or None for no weights"
        )
    prediction, _ = split_variance(model_output, x0, schedule)
    same_shape("noise", noise, x0)
    target = schedule.training_target(x0, noise, t)
    loss = (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)
    return loss if snr_gamma is None else loss * _min_snr_weights(schedule, t, snr_gamma).to(loss.dtype)


def vlb_terms(model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """L_t of the variational bound in bits per dimension, (B,); their sum over all t and `vlb_prior` bounds
    -log2 p(x0) per dimension.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and -log p(x_0 | x_1) of 8-bit values in [-1, 1]
    for t = 0 (Ho et al. 2020, eq. 5 and 13). Latents are not 8-bit values: there t = 0 still rewards the
    right variance, as in DiT, but the sum is no likelihood. The predicted x0 is not clipped. At t = 0, where
    the posterior has no variance, that of t = 1 stands for it (Nichol and Dhariwal's code).

    Args:
        model_output: at x_t and t, of the shape that the schedule's variance_type needs.
        x0, x_t: (B, C, ...).
        t: int64 (B,).
    """
    dtype = _at_least_float32(x0)
    x0, x_t, model_output = (tensor.to(dtype) for tensor in (x0, x_t, model_output))
    prediction, v = split_variance(model_output, x0, schedule)
    lowest, beta, x0_weight = (
        table.to(t.device, dtype)[t].reshape(-1, *[1] * (x0.ndim - 1)) for table in _posterior(schedule)
    )
    first = (t == 0).reshape(beta.shape)
    if v is not None:
        log_variance = learned_log_variance(v, lowest, beta)
    elif schedule.variance_type == "fixed_large":
        log_variance = torch.where(first, lowest, beta).log()
    else:
        log_variance = lowest.log()

    # Both means give x_t the same weight, so they differ by x0's alone, and at t = 0 they are x0's.
    error = x0 - to_x0(prediction, x_t, schedule.alpha_bar(x0, t), schedule.prediction_type)
    wider = log_variance - lowest.log()
    squared = (x0_weight * error).square() * (-log_variance).exp()
    divergence = 0.5 * (wider + torch.expm1(-wider) + squared)
    nats = torch.where(first, -_discretised_log_likelihood(x0, error, log_variance), divergence)
    return nats.flatten(1).mean(dim=1) / math.log(2)


def vlb_prior(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """L_T of the bound, KL(q(x_T | x_0) || N(0, 1)), in bits per dimension, (B,); it learns nothing."""
    alpha_bar = schedule.alphas_cumprod[-1].to(x0.device, _at_least_float32(x0))
    nats = 0.5 * (alpha_bar * x0.to(alpha_bar.dtype).square() - alpha_bar - torch.log1p(-alpha_bar))
    return nats.flatten(1).mean(dim=1) / math.log(2)


def hybrid_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    vlb_weight: float = 1e-3,
    snr_gamma: float | None = None,
) -> Tensor:
    """L_simple + vlb_weight L_vlb, (B,) (Nichol and Dhariwal 2021, eq. 16); L_vlb trains the variance alone.

    L_vlb is the sum of L_t over all T timesteps, so L_t at one t drawn uniformly counts T times. With the
    paper's weight of 1e-3 its factor is the T / 1000 of guided-diffusion's RESCALED_MSE.

    Arguments as in `simple_loss`; model_output (B, 2C, ...).

    Raises:
        InputError: for a schedule of another variance_type than "learned_range".
    """
    if schedule.variance_type != "learned_range":
        raise InputError(
            f"the hybrid loss with variance_type={schedule.variance_type!r}: no variance is learned; use "
            "simple_loss, or variance_type='learned_range'"
        )
    x_t = schedule.add_noise(x0, noise, t)
    prediction, v = split_variance(model_output, x0, schedule)
    of_variance = torch.cat([prediction.detach(), v], dim=1)
    bound = schedule.num_train_timesteps * vlb_terms(of_variance, x0, x_t, t, schedule)
    return simple_loss(model_output, x0, noise, t, schedule, snr_gamma=snr_gamma) + vlb_weight * bound


def _posterior(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """For every t, float64 (T,): the posterior's variance, beta_t, and x0's weight in the posterior's mean.

    The variance at t = 0 is that at t = 1.
    """
    beta = schedule.betas.double()
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    variance = beta * (1 - previous) / (1 - alpha_bar)
    variance[0] = variance[1] if len(beta) > 1 else beta[0]
    return variance, beta, beta * previous.sqrt() / (1 - alpha_bar)


def _discretised_log_likelihood(x0: Tensor, error: Tensor, log_variance: Tensor) -> Tensor:
    """log of a Gaussian's mass in the bin of each 8-bit value x0, which is `error` above the mean.

    The bins at both ends reach to infinity.
    """
    scale = (-0.5 * log_variance).exp()
    z, half = -error.abs() * scale, _HALF_BIN * scale
    # The bin's mirror image in the lower tail has the same mass, and there both its edges keep their digits.
    high, low = _log_cdf(z + half), _log_cdf(z - half)
    inside = high + torch.log(-torch.expm1((low - high).clamp(max=-1e-3)))
    # Where the density hardly changes within the bin, the edges are too near to be told apart.
    density = math.log(2 * _HALF_BIN / math.sqrt(2 * math.pi)) - 0.5 * (log_variance + z.square())
    inside = torch.where(half * (1 - z) < 5e-3, density, inside)
    at_ends = _log_cdf(half + torch.where(x0 < 0, error, -error) * scale)
    return torch.where(x0.abs() > _END, at_ends, inside)


def _log_cdf(z: Tensor) -> Tensor:
    """log Phi(z). The gradient of torch's own, exp(-z^2 / 2 - log Phi(z)), is wrong or NaN far from 0."""
    below, above = z.clamp(max=0) / -math.sqrt(2), z.clamp(min=0) / math.sqrt(2)
    lower_tail = torch.log(torch.special.erfcx(below) / 2) - below.square()
    return torch.where(z < 0, lower_tail, torch.log1p(-torch.erfc(above) / 2))


def _min_snr_weights(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor:
    """(B,): what makes min(SNR, gamma) ||x0 - x0_hat||^2 of each prediction type's squared error."""
    alpha_bar = schedule.alphas_cumprod.to(t.device)[t]
    snr = alpha_bar / (1 - alpha_bar)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    weights = snr.clamp(max=gamma)
    if schedule.prediction_type == "v_prediction":
        return weights / (snr + 1)
    return weights


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
