"""The backends made of fastldm's own kernels: `cpu` here, `triton` and `cuda` in modules of their own.

Each is a function from an operation's name to its Implementation; where it has none it raises
UnsupportedError saying why.
"""

from __future__ import annotations

import importlib

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
