"""The optional packages of training, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastldm.errors import FastLDMError


def require(module: str) -> ModuleType:
    """Import a package of the extra `train`, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FastLDMError(
            f"training needs the package {module!r} ({error}); run: pip install 'fastldm[train]'"
        ) from error
