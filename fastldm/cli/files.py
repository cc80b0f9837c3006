"""Output files of the commands: refused before the work starts, written in one step after it."""

from __future__ import annotations

import os
from pathlib import Path

from fastldm.errors import InputError


def check_writable(path: Path) -> None:
    """Raise InputError where `path` cannot be written, so that no work is lost on a typing error."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"cannot write {path}: permission denied; give another path")


def write_file(path: Path, data: bytes) -> None:
    from fastldm.io import atomic_write

    try:
        atomic_write(path, data)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
