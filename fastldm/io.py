"""Writing files so that a reader, or a run killed half-way, never sees half a file.

Everything is written under a temporary name in the same folder, flushed to disk and then renamed, which
POSIX and Windows both do in one step. On any failure the temporary is removed and what was there before is
untouched.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path to write; on leaving without an exception it becomes `path`.

    The folder of `path` must exist. Errors (`OSError`, or whatever the body raises) leave `path` as it was.
    """
    path = Path(path)
    temporary = _sibling(path, "tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private, whatever the umask says
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` in one step: it then holds the old content or all of the new."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    """Write `values` as JSON in one step; numbers of numpy and torch, and other kinds of mappings and
    sequences, as the plain ones they stand for."""
    atomic_write(path, json.dumps(values, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"JSON holds no {type(value).__name__}")


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; on leaving without an exception it becomes `path`.

    A folder already at `path` is replaced as a whole. No system call swaps two folders portably, so it is
    first renamed to `.<name>.old`; a run killed between the two renames leaves it there, and the next call
    puts it back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    temporary = _sibling(path, "tmp")
    temporary.mkdir()
    try:
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            if entry.is_file():
                entry.chmod(mode)
            _flush(entry)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _flush(path.parent)


def _sibling(path: Path, suffix: str) -> Path:
    """A fresh hidden name beside `path`: renaming is one step only within a file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{suffix}")


def _flush(path: Path) -> None:
    """Force a file's data, or a folder's names, to disk before anything depends on them."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder to flush it
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
