"""Where Triton kernels can run at all."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse(*tensors: Tensor) -> str | None:
    """In one line why no kernel takes one of the tensors: its dtype, or a device without Triton."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, not {tensor.dtype}"
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
            return f"runs on CUDA devices, not on {tensor.device.type}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in Python on the CPU. It decides when a kernel is defined, once."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
