"""Guidance of any denoiser: classifier-free, by a classifier's or CLIP's gradient, and what tames it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from fastldm.checks import described, is_fraction, is_number, plain_number
from fastldm.diffusion.predictions import same_shape
from fastldm.diffusion.schedules import NoiseSchedule, check_threshold
from fastldm.diffusion.variance import split_variance
from fastldm.errors import InputError

Conditions = Mapping[str, Tensor | None]
# (x, t) -> the model's output at x (B, ...) and timesteps t (B,).
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (x, t) -> the gradient at x of a log-probability, shaped like x.
Gradient = Callable[[Tensor, Tensor], Tensor]


def classifier_free(
    model: Callable[..., Tensor],
    conditions: Conditions,
    null_conditions: Conditions | None,
    scale: float,
    *,
    rescale: float = 0.0,
) -> Denoiser:
    """Bind `model(x, t, **conditions)` to a denoiser (x, t) -> e_u + scale (e_c - e_u).

    Ho and Salimans 2022, eq. 6, whose w is scale - 1. The output may be noise, x0 or velocity: each is the
    same affine function of the noise in both halves, so guiding one guides all alike. Both halves run as one
    batch of 2B in the order [unconditional, conditional]. At scale 1 the formula is e_c, and the
    unconditional half is not computed. A learned variance, of twice the channels of x, is the conditional
    half's.

    Args:
        conditions, null_conditions: keyword arguments of the model, tensors (B, ...) or None; same keys,
            same shapes.
        rescale: strength in [0, 1] of `rescale_guidance`; 0 = off.

    Raises:
        InputError: if `scale` is not finite, `rescale` is outside [0, 1], a scale other than 1 comes without
            null conditions, or the two kinds of conditions do not match.
    """
    scale = finite("guidance scale", scale)
    rescale = fraction("guidance_rescale", rescale)
    if scale == 1:
        return lambda x, t: model(x, t, **conditions)
    if null_conditions is None:
        raise InputError(f"guidance scale {scale} needs null conditions; give them, or use scale 1")
    for name in sorted({*conditions, *null_conditions}):
        found, null = (_shape(kind.get(name)) for kind in (conditions, null_conditions))
        if found != null:
            raise InputError(f"condition {name!r} is {found}, but its null condition {null}: give them alike")
    both = {
        key: None if value is None else torch.cat([null_conditions[key], value])
        for key, value in conditions.items()
    }

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        doubled = torch.cat([x, x])
        output, v = split_variance(model(doubled, torch.cat([t, t]), **both), doubled)
        unconditional, conditional = output.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        guided = rescale_guidance(guided, conditional, rescale) if rescale > 0 else guided
        return guided if v is None else torch.cat([guided, v.chunk(2)[1]], dim=1)

    return denoiser


def rescale_guidance(guided: Tensor, conditional: Tensor, strength: float) -> Tensor:
    """Bring the guided output back to the conditional one's standard deviation, per sample.

    Lin et al. 2023, section 3.4, eq. 15 and 16: strength 0 leaves `guided`, 1 replaces it. Shapes (B, ...).
    An output without deviation, such as that of a network which starts at zero, stays as it is.

    Raises:
        InputError: for a strength outside [0, 1].
    """
    strength = fraction("strength", strength)
    dims = tuple(range(1, guided.ndim))
    wanted, own = (output.std(dim=dims, keepdim=True) for output in (conditional, guided))
    ratio = torch.where(own > 0, wanted / own, 1)
    return strength * (guided * ratio) + (1 - strength) * guided


def dynamic_threshold(x0: Tensor, ratio: float = 0.995, max_value: float = 1.0) -> Tensor:
    """Clip each x0 (B, ...) to a quantile of its own |x0|, and divide by it (Saharia et al. 2022, 2.3).

    Args:
        ratio: the quantile, in [0, 1].
        max_value: the largest number that a sample is clipped to and divided by, above 0. The smallest is 1
            where that is larger, so that a sample within [-1, 1] stays as it is.

    Raises:
        InputError: for a ratio or max_value outside its range.
    """
    check_threshold(ratio, max_value, InputError)
    if x0.ndim < 2:
        raise InputError(f"x0 is {described(x0)}: give (B, ...), of which each sample is clipped by itself")
    flat = x0.flatten(1).to(torch.promote_types(x0.dtype, torch.float32))
    limit = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=max_value)
    return (flat.clamp(-limit, limit) / limit).reshape(x0.shape).to(x0.dtype)


def score_gradient(score: Callable[[Tensor, Tensor], Tensor]) -> Gradient:
    """(x, t) -> the gradient at x of score(x, t), (B,), one number per sample.

    Works under `torch.no_grad` and `torch.inference_mode`, where samplers run; the result carries no graph.

    Raises:
        InputError: on a call, if the score is not (B,) or does not depend on x.
    """

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            value = score(x, t.clone())
            if value.shape != x.shape[:1]:
                raise InputError(
                    f"the score is {tuple(value.shape)}: give one number per sample, ({len(x)},)"
                )
            found = None
            if value.requires_grad:
                (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
            if found is None:
                raise InputError(
                    "the score does not depend on x: compute it from x, without detach or no_grad"
                )
        return found

    return gradient


def classifier_gradient(classifier: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Gradient:
    """(x, t) -> the gradient of log p(label | x_t) (Dhariwal and Nichol 2021, section 4.1).

    Args:
        classifier: (x, t) -> logits (B, classes), of noisy x.
        labels: int64 (B,).

    Raises:
        InputError: for labels that are not whole numbers; on a call, for as many as x does not have samples,
            or for one the classifier does not know.
    """
    numbers = isinstance(labels, Tensor) and labels.dtype != torch.bool
    if not numbers or labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise InputError(f"labels are {described(labels)}: give an int64 tensor (B,)")
    with torch.inference_mode(False):
        labels = labels.clone()
    # Read once: at every step it would wait for a GPU.
    lowest, highest = (labels.min().item(), labels.max().item()) if len(labels) else (0, 0)

    def log_probability(x: Tensor, t: Tensor) -> Tensor:
        logits = classifier(x, t)
        if logits.ndim != 2 or len(labels) != len(logits):
            raise InputError(
                f"logits {tuple(logits.shape)} for {len(labels)} labels: the classifier must give "
                "(B, classes), and there must be one label per sample"
            )
        if lowest < 0 or highest >= logits.shape[1]:
            raise InputError(
                f"labels {lowest} to {highest} for {logits.shape[1]} classes: use 0 to {logits.shape[1] - 1}"
            )
        index = labels.to(logits.device, torch.int64)[:, None]
        return logits.log_softmax(dim=1).gather(1, index)[:, 0]

    return score_gradient(log_probability)


def clip_gradient(
    image_encoder: Callable[[Tensor, Tensor], Tensor], text_features: Tensor, logit_scale: float | Tensor
) -> Gradient:
    """(x, t) -> the gradient of exp(logit_scale) f(x_t) . g(caption), both normalised.

    CLIP guidance: Nichol et al. 2022 (GLIDE), section 2.4.

    Args:
        image_encoder: (x, t) -> features (B, E), of noisy x ("noised CLIP").
        text_features: (B, E), or (1, E) for one caption.
        logit_scale: the logarithm of the temperature's inverse, as CLIP's checkpoints hold it.

    Raises:
        InputError: for a logit_scale that is not finite; on a call, for features of other shapes.
    """
    factor = math.exp(finite("logit_scale", logit_scale))
    with torch.inference_mode(False):
        text = F.normalize(text_features.detach().clone(), dim=-1)

    def similarity(x: Tensor, t: Tensor) -> Tensor:
        image = F.normalize(image_encoder(x, t), dim=-1)
        if text.ndim != 2 or image.shape != (len(x), text.shape[1]) or len(text) not in (1, len(x)):
            raise InputError(
                f"image features {tuple(image.shape)}, text features {tuple(text.shape)}: need (B, E) of one "
                f"width for the {len(x)} samples, or text features (1, E)"
            )
        return factor * (image * text.to(image.device, image.dtype)).sum(dim=-1)

    return score_gradient(similarity)


def gradient_guided(
    denoiser: Denoiser, gradient: Gradient, scale: float, schedule: NoiseSchedule
) -> Denoiser:
    """A denoiser whose noise is eps - scale sqrt(1 - abar_t) gradient(x, t): guidance for any sampler.

    The score form of Dhariwal and Nichol 2021, algorithm 2, as for DDIM. For x0 and velocity it is what that
    change of the noise makes of them. For DDPM's mean form, give `sample_ddpm` the gradient instead.

    At zero SNR, where a rescaled schedule ends, x_t is noise alone: no probability given x_t depends on it,
    so there is nothing to follow, and x0 is no function of x_t and the noise. That timestep is not guided.

    Args:
        denoiser: of the schedule's `prediction_type` and `variance_type`; a learned variance stays as it is.
        gradient: `classifier_gradient`, `clip_gradient`, or any other.

    Raises:
        InputError: if `scale` is not finite.
    """
    scale = finite("guidance scale", scale)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar(x, t)
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        factor = {
            "epsilon": -sigma,
            "sample": sigma**2 / alpha,
            "v_prediction": -sigma / alpha,
        }[schedule.prediction_type]
        factor = torch.where(alpha_bar > 0, factor, 0)
        output, v = split_variance(denoiser(x, t), x, schedule)
        moved = output + (scale * factor * same_shape("gradient", gradient(x, t), x)).to(output.dtype)
        return moved if v is None else torch.cat([moved, v], dim=1)

    return guided


def drop_condition(
    condition: Tensor, null: Tensor, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each sample's condition by the null one, independently, with `probability`.

    Args:
        condition: prepared conditions (B, ...): token ids, labels or pictures.
        null: the null condition, broadcastable to `condition`.
        generator: on any device; the draws are made on its device (the CPU's default one if None).

    Raises:
        InputError: for a probability outside [0, 1].
    """
    probability = fraction("probability", probability)
    device = generator.device if generator is not None else "cpu"
    draws = torch.rand(condition.shape[0], generator=generator, device=device)
    drop = (draws < probability).to(condition.device).reshape(-1, *[1] * (condition.ndim - 1))
    return torch.where(drop, null.to(condition.device), condition)


def finite(name: str, value: float | Tensor) -> float:
    """`value` as a float; InputError unless it is a finite number, or a tensor or an array of one."""
    number = plain_number(value)
    if not is_number(number):
        raise InputError(f"{name}={number!r}: give a finite number, such as 2.0")
    return float(number)


def fraction(name: str, value: float | Tensor) -> float:
    """`value` as a float; InputError unless it is a number from 0 to 1, or a tensor or an array of one."""
    number = plain_number(value)
    if not is_fraction(number):
        raise InputError(f"{name}={number!r}: use a value between 0 and 1")
    return float(number)


def _shape(condition: Tensor | None) -> tuple[int, ...] | None:
    return None if condition is None else tuple(condition.shape)
