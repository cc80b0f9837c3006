"""The codebook operations on the compiled CPU kernels (csrc/cpu/vq.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastldm.implementation import Implementation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reason_against(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"takes float32, bfloat16 and float16, not {tensor.dtype}"
        if tensor.device.type != "cpu":
            return f"runs on the CPU, not on {tensor.device.type}"
    return None


def _supports_ema_update(z: Tensor, indices: Tensor, num_codes: int) -> str | None:
    return _reason_against(z)


def nearest() -> Implementation:
    kernel = torch.ops.fastldm_cpu.vq_nearest.default

    def forward(z: Tensor, codebook: Tensor) -> Tensor:
        indices = torch.empty(z.shape[:-1], dtype=torch.int64)
        kernel(z.contiguous(), codebook.contiguous(), indices)
        return indices

    return Implementation(forward=forward, supports=_reason_against)


def ema_update() -> Implementation:
    kernel = torch.ops.fastldm_cpu.vq_ema_update.default

    def forward(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
        counts = torch.empty(num_codes, dtype=torch.int64)
        sums = torch.empty(num_codes, z.shape[-1], dtype=torch.float32)
        kernel(z.contiguous(), indices.contiguous(), counts, sums)
        return counts, sums

    return Implementation(forward=forward, supports=_supports_ema_update)
