"""Classifier-free guidance (Ho and Salimans 2022): condition dropout in training, extrapolation after."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastldm.errors import InputError

Conditions = Mapping[str, Tensor | None]
Denoiser = Callable[[Tensor, Tensor], Tensor]


def classifier_free(
    model: Callable[..., Tensor],
    conditions: Conditions,
    null_conditions: Conditions | None,
    scale: float,
    *,
    rescale: float = 0.0,
) -> Denoiser:
    """Bind `model(x, t, **conditions)` to a denoiser (x, t) -> e_u + scale (e_c - e_u).

    Both halves run as one batch of 2B in the order [unconditional, conditional]. At scale 1 the formula is
    e_c, and the unconditional half is not computed.

    Args:
        conditions, null_conditions: keyword arguments of the model, tensors (B, ...) or None; same keys,
            same shapes.
        rescale: strength in [0, 1] of `rescale_guidance`; 0 = off.

    Raises:
        InputError: if `rescale` is outside [0, 1], or a scale other than 1 comes without null conditions.
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance_rescale={rescale}: use a value between 0 and 1")
    if scale == 1:
        return lambda x, t: model(x, t, **conditions)
    if null_conditions is None:
        raise InputError(f"guidance scale {scale} needs null conditions; give them, or use scale 1")
    both = {
        key: None if value is None else torch.cat([null_conditions[key], value])
        for key, value in conditions.items()
    }

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        unconditional, conditional = model(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return rescale_guidance(guided, conditional, rescale) if rescale > 0 else guided

    return denoiser


def rescale_guidance(guided: Tensor, conditional: Tensor, strength: float) -> Tensor:
    """Bring the guided output back to the conditional one's standard deviation, per sample.

    Lin et al. 2023, section 3.4, eq. 15 and 16: strength 0 leaves `guided`, 1 replaces it. Shapes (B, ...).
    """
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return strength * (guided * ratio) + (1 - strength) * guided


def drop_condition(
    condition: Tensor, null: Tensor, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Replace each sample's condition by the null one, independently, with `probability`.

    Args:
        condition: prepared conditions (B, ...): token ids, labels or pictures.
        null: the null condition, broadcastable to `condition`.
        generator: on any device; the draws are made on its device (the CPU's default one if None).
    """
    device = generator.device if generator is not None else "cpu"
    draws = torch.rand(condition.shape[0], generator=generator, device=device)
    drop = (draws < probability).to(condition.device).reshape(-1, *[1] * (condition.ndim - 1))
    return torch.where(drop, null.to(condition.device), condition)
