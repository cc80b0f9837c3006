"""Memory of the process: kept between calls while timing, given back while peaks are measured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastldm.memory import keep_freed_memory

# From glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def reuse() -> str:
    """Let freed memory serve the next call, and say in words whether that could be set.

    Otherwise every large result is mapped and zeroed anew, which takes longer than the kernels themselves.
    """
    if keep_freed_memory():
        return "freed memory is kept for the next call (glibc M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)"
    return "the C library's own way with freed memory"


def peak_extra(run: Callable[[], Sequence[Tensor]], device: str) -> int | None:
    """Bytes that one call holds at most, beyond what was there before and beyond its results.

    On the CPU from the high-water mark of resident pages, good to about 0.3 MB; None where the system has
    none. What a library keeps since an earlier call is not seen.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - _size(results))
    if not keep_freed_memory():
        return None
    with _returned_memory():
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return None
        before = _status("VmRSS")
        results = run()
        return max(0, _status("VmHWM") - before - _size(results))


@contextmanager
def _returned_memory() -> Iterator[None]:
    """Freed memory goes back to the system at once, so that resident pages are memory in use."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 1 << 16)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        keep_freed_memory()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def _size(results: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in results)
