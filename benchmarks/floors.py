"""What the machine can do, measured in the same rounds as the kernels: a copy, a matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.registry import Case, Work
from benchmarks.timing import wall_sampler


class Floor(NamedTuple):
    """Something to time and what it achieves: floating-point operations, or bytes read and written."""

    run: Callable[[], object]
    amount: float


def floor(work: Work, case: Case) -> Floor:
    """The floor that `work` is held against."""
    return _copy(work.copied, case.device) if work.floor == "copy" else _matmul(case.torch_dtype, case.device)


def _copy(size: int, device: str) -> Floor:
    """A copy into memory that is there already, of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return Floor(lambda: target.copy_(source), 2.0 * size)


def _matmul(dtype: torch.dtype, device: str) -> Floor:
    """A square product, large enough for its full rate."""
    side = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    runs = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and torch.backends.mkldnn.is_available() and dtype != torch.float16:
        # In float32 torch.mm is MKL's, which reaches half of oneDNN's rate on AMD.
        onednn = torch.ops.mkldnn
        packed = onednn._reorder_linear_weight(b.t().contiguous())
        runs.append(lambda: onednn._linear_pointwise(a, packed, None, "none", [], ""))
    return Floor(min(runs, key=_fastest), 2.0 * side**3)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    sample = wall_sampler(run)
    return min(sample(1) for _ in range(5))
