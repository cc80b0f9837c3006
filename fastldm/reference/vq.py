"""Nearest code and codebook statistics, written out in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.implementation import Implementation

_MAX_ELEMENTS = 1 << 18  # distances held at once: 2 MB


def squared_distance(z: Tensor, codes: Tensor) -> Tensor:
    """sum_d (z_d - code_d)^2 over the last dimension of two float64 tensors that broadcast.

    Added in the order of d, each square rounded before it is added: the order decides which of two codes at
        the same real
    distance comes out nearer, so all backends keep to this one.
    """
    total = (z[..., 0] - codes[..., 0]).square()
    for d in range(1, z.shape[-1]):
        total += (z[..., d] - codes[..., d]).square()
    return total


def vq_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k `squared_distance(z, codebook[k])`; z (..., D), codebook (K, D), result int64 (...).

    The lowest index wins a tie. A row with NaN or infinity in z has no nearest code and gets 0.
    """
    flat, codes = z.reshape(-1, z.shape[-1]), codebook.double()
    rows = max(1, _MAX_ELEMENTS // codes.shape[0])
    indices = [
        squared_distance(chunk.double().unsqueeze(1), codes).argmin(dim=-1) for chunk in flat.split(rows)
    ]
    return torch.cat(indices).reshape(z.shape[:-1])


def vq_ema_update(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """counts (K,) int64 and sums (K, D) float64: how many rows of z fell on each code, and their sum."""
    flat, index = z.reshape(-1, z.shape[-1]), indices.reshape(-1)
    counts = torch.zeros(num_codes, dtype=torch.int64, device=z.device)
    counts.index_add_(0, index, torch.ones_like(index))
    sums = torch.zeros(num_codes, z.shape[-1], dtype=torch.float64, device=z.device)
    return counts, sums.index_add_(0, index, flat.double())


def _ema_update(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts, sums = vq_ema_update(z, indices, num_codes)
    return counts, sums.float()


def _on_cpu_only(z: Tensor, indices: Tensor, num_codes: int) -> str | None:
    return None if z.device.type == "cpu" else "index_add_ adds in no fixed order outside the CPU"


NEAREST = Implementation(forward=vq_nearest)
EMA_UPDATE = Implementation(forward=_ema_update, supports=_on_cpu_only)
