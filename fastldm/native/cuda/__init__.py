"""The CUDA C++ kernels of `csrc/cuda` as a backend, on GPUs of capability 8.0 and up.

An operation's module here (`attention.py`, `group_norm.py`, `vq.py`) has functions, named as `_OPS` says:

    implementation() -> Implementation    checks arguments, makes outputs, calls torch.ops.fastldm_cuda
    key(direction, args) -> dict          what measurements of such a call are kept under (tables.py)

"auto" takes a kernel only where a table says that it was measured to be the fastest: `slower` is answered
here, for every operation alike.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch

from fastldm.errors import UnsupportedError
from fastldm.implementation import Implementation
from fastldm.native.cuda import tables
from fastldm.native.library import load_cuda

# Module, prefix of its functions.
_OPS = {
    "attention": ("attention", ""),
    "group_norm": ("group_norm", ""),
    "vq_nearest": ("vq", "nearest_"),
    "vq_ema_update": ("vq", "ema_update_"),
}


def implementation(op: str) -> Implementation:
    """Raises UnsupportedError where the kernels are not built, not written, or no GPU can run them."""
    load_cuda()
    name, prefix = _OPS[op]
    module = _module(name)
    if not hasattr(module, f"{prefix}implementation"):
        raise UnsupportedError(f"no CUDA C++ kernels of {op} are written")
    if not torch.cuda.is_available():
        raise UnsupportedError("needs a CUDA GPU")
    found, key = (getattr(module, prefix + part) for part in ("implementation", "key"))
    return only_where_measured(op, found(), key)


def _module(name: str) -> ModuleType | None:
    full_name = f"{__name__}.{name}"
    return importlib.import_module(full_name) if importlib.util.find_spec(full_name) else None


def only_where_measured(op: str, found: Implementation, key: Callable[[str, tuple], dict]) -> Implementation:
    """`found`, which "auto" passes by except for calls that a table names."""

    def slower(direction: str) -> Callable[..., str | None]:
        def objection(*args) -> str | None:
            return tables.objection(op, direction, key(direction, args), args[0].device)

        return objection

    return dataclasses.replace(found, slower=slower("forward"), slower_backward=slower("backward"))
