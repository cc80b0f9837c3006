"""Seeded inputs. Every function is a pure function of its arguments on one machine."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.testing.shapes import AttentionShape, GroupNormShape, VQShape

ATTENTION_LAYOUTS = ("contiguous", "heads-last", "packed")
MASKS = ("none", "bool", "bool-broadcast", "padding", "float", "float32-row")
VQ_KINDS = ("normal", "offset", "vqgan-init", "trained", "duplicates", "ties")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_inputs(
    shape: AttentionShape, dtype: torch.dtype, *, layout: str = "contiguous", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient of the output.

    Layouts: "contiguous" (B, H, S, D); "heads-last", views of (B, S, H, D) as a transformer makes them;
    "packed", views into a larger projection, dense nowhere.
    """
    generator = _generator(seed)
    made = []
    for length in (shape.queries, shape.keys, shape.keys, shape.queries):
        if layout == "contiguous":
            x = torch.randn(shape.batch, shape.heads, length, shape.head_dim, generator=generator).to(dtype)
        else:
            width = shape.head_dim if layout == "heads-last" else 3 * shape.head_dim
            x = torch.randn(shape.batch, length, shape.heads, width, generator=generator).to(dtype)
            x = x[..., : shape.head_dim].transpose(1, 2)
        made.append(x)
    return tuple(made)


def attention_mask(shape: AttentionShape, kind: str, *, seed: int = 0) -> Tensor | None:
    """A mask of one of `MASKS`. "bool...", "padding" and "float" have rows with every key masked."""
    generator = _generator(seed)
    batch, heads, queries, keys, _ = shape
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.arange(batch) * keys // max(1, batch)
        return (torch.arange(keys) < lengths[:, None])[:, None, None, :]
    full = (batch, 1, queries, keys) if kind == "bool-broadcast" else (batch, heads, queries, keys)
    allowed = torch.rand(full, generator=generator) > 0.3
    allowed[:, :, queries // 2] = False
    if kind.startswith("bool"):
        return allowed
    if kind == "float":
        bias = torch.randn(full, generator=generator)
        return bias.masked_fill(~allowed, -torch.inf)
    return torch.randn(1, 1, 1, keys, generator=generator)


def group_norm_inputs(
    shape: GroupNormShape,
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    parameter_dtype: torch.dtype | None = None,
    mean: float = 0.5,
    std: float = 1.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """x, weight, bias, channel_bias, scale, shift and a gradient `grad`.

    Layouts: "contiguous"; "channels-last" (also the one for 3-D and 5-D); "transposed", the two last
        dimensions swapped.
    """
    generator = _generator(seed)
    batch, channels = shape.shape[:2]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def laid_out(x: Tensor) -> Tensor:
        if layout == "channels-last" and x.dim() > 2:
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if layout == "transposed" else x

    parameters = {
        "weight": 1.0 + 0.3 * normal(channels),
        "bias": 0.3 * normal(channels),
        "channel_bias": normal(batch, channels),
        "scale": 0.3 * normal(batch, channels),
        "shift": 0.3 * normal(batch, channels),
    }
    return {
        "x": laid_out((mean + std * normal(*shape.shape)).to(dtype)),
        "grad": laid_out(normal(*shape.shape).to(dtype)),
        **{name: value.to(parameter_dtype or dtype) for name, value in parameters.items()},
    }


def vq_inputs(
    count: int, shape: VQShape, dtype: torch.dtype = torch.float32, *, kind: str = "normal", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """z (count, D) and codebook (K, D).

    Kinds: "normal"; "offset", both around 10; "vqgan-init", codes U(-1/K, 1/K); "trained", z near codes;
        "duplicates", every
    code twice; "ties", small integers, so many codes are at exactly the same distance.
    """
    generator = _generator(seed)
    num_codes, dim = shape
    z = torch.randn(count, dim, generator=generator)
    codes = torch.randn(num_codes, dim, generator=generator)
    if kind == "offset":
        z, codes = z + 10.0, codes + 10.0
    elif kind == "vqgan-init":
        codes = (2.0 * torch.rand(num_codes, dim, generator=generator) - 1.0) / num_codes
    elif kind == "trained":
        z = codes[torch.randint(num_codes, (count,), generator=generator)] + 0.1 * z
    elif kind == "duplicates":
        codes = codes[torch.arange(num_codes) // 2]
    elif kind == "ties":
        z, codes = z.round(), codes.round()
    return z.to(dtype), codes.to(dtype)
