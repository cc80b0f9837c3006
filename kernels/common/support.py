"""Where Triton kernels can run at all."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(x: Tensor) -> str | None:
    """Why no kernel takes this tensor: its dtype, or a device that needs the interpreter."""
    if x.dtype not in DTYPES:
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreted):
        return f"needs tensors on a CUDA device, got {x.device}"
    return None
