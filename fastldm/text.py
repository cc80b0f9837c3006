"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def as_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of equal length, their columns aligned."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
