"""The codebook operations on the CUDA C++ kernels (csrc/cuda/vq_*)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.implementation import Implementation
from fastldm.kernels.common.launch import next_power_of_two
from fastldm.kernels.common.rows import Rows, rows_of
from fastldm.native.cuda.support import refuse
from fastldm.native.library import load_cuda

_MAX_DIM = 4096
_MAX_CODES = 1 << 28
_MAX_SUM_DIM = 32 * 65535  # blocks along y


def nearest_implementation() -> Implementation:
    return Implementation(forward=_nearest, supports=_supports_nearest)


def nearest_key(direction: str, args: tuple) -> dict[str, str | int]:
    z, codebook = args
    return _key(z, codebook.shape[0])


def ema_update_implementation() -> Implementation:
    return Implementation(forward=_ema_update, supports=_supports_ema_update)


def ema_update_key(direction: str, args: tuple) -> dict[str, str | int]:
    z, _, num_codes = args
    return _key(z, num_codes)


def _key(z: Tensor, num_codes: int) -> dict[str, str | int]:
    """Codes and rows as powers of two from 256 to 65536."""
    dim = z.shape[-1]
    dtype = str(z.dtype).removeprefix("torch.")
    codes, rows = (min(max(next_power_of_two(count), 256), 65536) for count in (num_codes, z.numel() // dim))
    return {"dtype": dtype, "dim": dim, "codes": codes, "rows": rows}


def _supports_nearest(z: Tensor, codebook: Tensor) -> str | None:
    if z.shape[-1] > _MAX_DIM:
        return f"takes up to {_MAX_DIM} dimensions, not {z.shape[-1]}"
    if codebook.shape[0] > _MAX_CODES:
        return f"takes up to 2^28 codes, not {codebook.shape[0]}"
    return refuse(z, codebook)


def _supports_ema_update(z: Tensor, indices: Tensor, num_codes: int) -> str | None:
    if num_codes > _MAX_CODES:
        return f"takes up to 2^28 codes, not {num_codes}"
    if z.shape[-1] > _MAX_SUM_DIM:
        return f"takes up to {_MAX_SUM_DIM} dimensions, not {z.shape[-1]}"
    return refuse(z)


def _layout(rows: Rows) -> tuple[int, int, int, int, int]:
    return rows.count, rows.inner, rows.stride_outer, rows.stride_inner, rows.stride_dim


def _nearest(z: Tensor, codebook: Tensor) -> Tensor:
    kernels, rows = load_cuda(), rows_of(z)
    index = torch.empty(z.shape[:-1], dtype=torch.int64, device=z.device)
    size = kernels.vq_nearest_memory(rows.tensor, rows.count, codebook)
    memory = torch.empty(size, dtype=torch.uint8, device=z.device)
    kernels.vq_nearest(rows.tensor, *_layout(rows), codebook, memory, index)
    return index


def _ema_update(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    kernels, rows = load_cuda(), rows_of(z)
    ordered, order, starts = sorted_by_code(indices, num_codes)
    sums = torch.empty(num_codes, rows.dim, dtype=torch.float32, device=z.device)
    size = kernels.vq_ema_update_memory(rows.count, num_codes, rows.dim)
    memory = torch.empty(size, dtype=torch.uint8, device=z.device)
    kernels.vq_ema_update(rows.tensor, *_layout(rows), ordered, order, starts, memory, sums)
    return starts.diff(), sums


def sorted_by_code(indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ordered, order, starts): the codes (N,) int32 in order, equal ones as they stood; which rows have
    them; and where those of each code begin (K + 1,)."""
    # What is no code stays none in 32 bits.
    codes = indices.reshape(-1).clamp(-1, num_codes).int()
    ordered, order = torch.sort(codes, stable=True)
    limits = torch.arange(num_codes + 1, dtype=torch.int32, device=indices.device)
    return ordered, order, torch.searchsorted(ordered, limits)
