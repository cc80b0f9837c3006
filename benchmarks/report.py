"""Rows as a table on the terminal and as a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.measure import Row
from fastldm.errors import InputError
from fastldm.io import atomic_write
from fastldm.text import as_table

SCHEMA = 1
_HEAD = ("schema", "command", "started", "machine", "versions", "git", "allocator", "complete", "rows")


def header(command: str, device: str, allocator: str) -> dict:
    """Everything of a document but its rows."""
    return {
        "schema": SCHEMA,
        "command": command,
        "started": machine.now(),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "git": machine.revision(),
        "allocator": allocator,
    }


def write(path: str | os.PathLike, head: dict, rows: Iterable[dict], *, complete: bool) -> None:
    """Writes header and rows in one step. Raises InputError where that cannot be."""
    document = {**head, "complete": complete, "rows": list(rows)}
    try:
        atomic_write(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str | os.PathLike) -> dict:
    """A document that `write` wrote. Raises InputError for any other file."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not set(_HEAD) <= document.keys():
        raise InputError(f"{path} is not a result of this suite; give a file that `run --out` wrote")
    if document["schema"] != SCHEMA:
        raise InputError(f"{path} has schema {document['schema']}, this suite reads {SCHEMA}; measure again")
    return document


def table(rows: Sequence[Row]) -> str:
    """The rows of one case, the fastest first, with the floor they are held against."""
    first = rows[0]
    dims = " ".join("x".join(map(str, shape)) for shape in first.dims.values())
    title = f"{first.op} {first.shape} ({dims}) {first.dtype} {first.layout} {first.direction}"
    floor = ""
    if first.floor_rate is not None:
        rate = _rate(first.floor_rate, first.floor)
        floor = f"; floor: {first.floor} {rate} in {duration(first.floor_seconds)}"
    lines = [f"{title}, {first.threads} threads{floor}"]
    lines += aligned(
        [("provider", "median", "quartiles", "rate", "to floor", "to best rival", "error", "memory", "")]
        + [_cells(row) for row in sorted(rows, key=lambda r: (r.seconds is None, r.seconds))]
    )
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.seconds is None:
        remark = f"not reported, WRONG: {row.fault}" if row.fault else f"did not run: {row.refused}"
        return (row.provider, "", "", "", "", "", error, "", remark)
    return (
        row.provider,
        duration(row.seconds),
        f"{duration(row.low)}..{duration(row.high)}",
        _rate(row.rate, row.floor),
        _to_floor(row),
        "" if row.ratio is None else f"{row.ratio:.2f}x {row.best_rival}",
        error,
        "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.1f} MB",
        f"WRONG: {row.fault}" if row.fault else "SLOWER THAN TORCH" if row.slower_than_torch else "",
    )


def _to_floor(row: Row) -> str:
    """Of the matrix product's rate, or in copies of the tensor."""
    if row.floor == "matmul":
        return f"{row.rate / row.floor_rate:.0%}"
    return f"{_digits(row.seconds / row.floor_seconds)} copies"


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells in columns, two spaces apart, after two spaces."""
    return [f"  {line}" for line in as_table(rows).splitlines()]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{_digits(seconds / size)} {unit}"


def _rate(rate: float, floor: str) -> str:
    return f"{_digits(rate / 1e9)} {'GFLOP/s' if floor == 'matmul' else 'GB/s'}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def findings(rows: Sequence[Row]) -> list[str]:
    """What a reader must not miss, a line each: results that are wrong, and where "auto" falls behind."""
    lines = []
    for row in rows:
        case = f"{row.op} {row.shape} {row.dtype} {row.layout} {row.direction}"
        if row.ours and row.fault:
            lines.append(f"WRONG: {row.provider} {case}: {row.fault}")
        if row.slower_than_torch:
            lines.append(f"auto is slower than PyTorch by more than 3% and 15 us: {case}")
    return lines
