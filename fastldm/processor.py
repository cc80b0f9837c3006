"""What the choice between our kernels and PyTorch's has to know of the processor."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


@cache
def mkl_is_slow() -> bool:
    """Whether PyTorch's matrix products in float32 run at half of the processor's rate, as MKL's do on AMD.

    On 2 Zen 5 cores 220 GFLOP/s, where oneDNN reaches 500 and attention of our own 440; on 2 cores of a Xeon
    both reach 350 (benchmarks/results).
    """
    return torch.backends.mkl.is_available() and "GenuineIntel" not in _vendor()


def _vendor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    return text.partition("vendor_id")[2].partition("\n")[0]
