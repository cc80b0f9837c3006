"""fastldm: latent diffusion on fused kernels, each checked against a plain PyTorch reference.

Public names load on first use, so `import fastldm` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastldm._version import __version__

if TYPE_CHECKING:
    from fastldm import (
        diffusion,
        evaluation,
        integrations,
        models,
        nn,
        ops,
        reference,
        systems,
        testing,
        training,
    )
    from fastldm.dispatch import record, use_backend
    from fastldm.integrations import applied, apply, revert, verify, warmup
    from fastldm.memory import keep_freed_memory
    from fastldm.nn import pack_weights
    from fastldm.ops import explain
    from fastldm.systems.latent_diffusion import LatentDiffusionPipeline

_SUBMODULES = {
    "diffusion",
    "evaluation",
    "integrations",
    "models",
    "nn",
    "ops",
    "reference",
    "systems",
    "testing",
    "training",
}
_NAMES = {
    "LatentDiffusionPipeline": "fastldm.systems.latent_diffusion",
    "applied": "fastldm.integrations",
    "apply": "fastldm.integrations",
    "explain": "fastldm.ops",
    "keep_freed_memory": "fastldm.memory",
    "pack_weights": "fastldm.nn",
    "record": "fastldm.dispatch",
    "revert": "fastldm.integrations",
    "use_backend": "fastldm.dispatch",
    "verify": "fastldm.integrations",
    "warmup": "fastldm.integrations",
}

__all__ = [
    "LatentDiffusionPipeline",
    "__version__",
    "applied",
    "apply",
    "diffusion",
    "evaluation",
    "explain",
    "integrations",
    "keep_freed_memory",
    "models",
    "nn",
    "ops",
    "pack_weights",
    "record",
    "reference",
    "revert",
    "systems",
    "testing",
    "training",
    "use_backend",
    "verify",
    "warmup",
]


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastldm.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
