"""Where the CUDA C++ kernels can run at all."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = 80


@cache
def capability_of(device: torch.device) -> int:
    """As in sm_90: 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def refuse(*tensors: Tensor) -> str | None:
    """In one line why no kernel takes one of the tensors: its dtype, or where it is."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, not {tensor.dtype}"
        if tensor.device.type != "cuda":
            return f"runs on CUDA devices, not on {tensor.device.type}"
    capability = capability_of(tensors[0].device)
    if capability < OLDEST:
        return f"needs a GPU of capability 8.0, not {capability // 10}.{capability % 10}"
    return None
