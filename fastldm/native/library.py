"""Loads the compiled extensions."""

from __future__ import annotations

import os
from functools import cache

import torch

from fastldm.errors import UnsupportedError
from fastldm.native import build_cuda
from fastldm.native.build import find_binary


@cache
def load():
    """The namespace of the CPU's operations; raises UnsupportedError saying why where there is none."""
    path = find_binary()
    if path is None:
        raise UnsupportedError("the C++ kernels are not built; run `fastldm build`")
    try:
        torch.ops.load_library(str(path))
        runnable = torch.ops.fastldm_cpu.runnable_isas().split()
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"{path} cannot be used: {reason}; run `fastldm build --force`") from error
    wanted = os.environ.get("FASTLDM_CPU_ISA")
    if wanted and wanted not in runnable:
        raise UnsupportedError(
            f"FASTLDM_CPU_ISA={wanted!r} is no instruction set of this machine; use one of: "
            f"{', '.join(runnable)}"
        )
    return torch.ops.fastldm_cpu


@cache
def load_cuda():
    """The namespace of the CUDA operations; raises UnsupportedError saying why where there is none.

    It needs no GPU: only launching a kernel does.
    """
    path = build_cuda.find_cuda_binary()
    if path is None:
        missing = build_cuda.missing()
        if missing is not None:
            raise UnsupportedError(f"the CUDA kernels are not built and cannot be: {missing}")
        raise UnsupportedError("the CUDA kernels are not built; run `fastldm build`")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"{path} cannot be used: {reason}; run `fastldm build --force`") from error
    return torch.ops.fastldm_cuda
