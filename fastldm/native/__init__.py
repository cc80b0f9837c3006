"""The backends made of fastldm's own kernels: `cpu` and `cuda` (compiled extension), and `triton` in a module
of its own.

Each function takes an operation's name and returns its Implementation, or raises UnsupportedError saying why
not.
"""

from __future__ import annotations

import importlib
from typing import NoReturn

from fastldm.errors import UnsupportedError
from fastldm.implementation import Implementation

_CPU = {
    "attention": "fastldm.native.attention:implementation",
    "group_norm": "fastldm.native.group_norm:implementation",
    "vq_nearest": "fastldm.native.vq:nearest",
    "vq_ema_update": "fastldm.native.vq:ema_update",
}


def cpu(op: str) -> Implementation:
    importlib.import_module("fastldm.native.library").load()
    module, function = _CPU[op].split(":")
    return getattr(importlib.import_module(module), function)()


def cuda(op: str) -> NoReturn:
    raise UnsupportedError("no CUDA C++ kernels in this version")
