"""What all Triton kernels share."""

from __future__ import annotations

import importlib.util

import torch


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None where one can.

    Never imports Triton: that costs most of a second, and `fastldm env` only wants the answer.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return "Triton needs a GPU, and PyTorch sees none"
    return None
