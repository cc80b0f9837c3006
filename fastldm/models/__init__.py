"""Networks over `fastldm.nn`; each loads on first use."""

from __future__ import annotations

import importlib

_NAMES = {
    "Model": "fastldm.models.base",
    "UNet2DConditionModel": "fastldm.models.unet",
    "UNet2DConditionOutput": "fastldm.models.unet",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
