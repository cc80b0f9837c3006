"""Optional packages, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastldm.errors import FastLDMError


def require(module: str, extra: str = "train") -> ModuleType:
    """Import a package of an extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FastLDMError(
            f"this needs the package {module!r} ({error}); run: pip install 'fastldm[{extra}]'"
        ) from error
