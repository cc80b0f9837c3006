"""The backends made of fastldm's own kernels: `cpu` and `cuda` (compiled extension) and `triton`.

Each function takes an operation's name and returns its Implementation, or raises UnsupportedError saying why
not.
"""

from __future__ import annotations

from typing import NoReturn

from fastldm.errors import UnsupportedError


def cpu(op: str) -> NoReturn:
    raise UnsupportedError("no C++ CPU kernels in this version")


def triton(op: str) -> NoReturn:
    raise UnsupportedError("no Triton kernels in this version")


def cuda(op: str) -> NoReturn:
    raise UnsupportedError("no CUDA C++ kernels in this version")
