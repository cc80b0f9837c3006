"""Configurations of the kernels of this package, by heuristics and by measured tables.

Keys: `dim`, the codes and rows of the problem as powers of two, which is as much as the best choice hangs
on.
"""

from __future__ import annotations

from typing import NamedTuple

from ..common import tables
from ..common.launch import next_power_of_two
from ..common.target import Target

OP = "vq"
# The most dimensions that `search_few.py` is for.
FEW = 16


class FewConfig(NamedTuple):
    """A program has `rows`, takes `lanes` codes at a time, `unroll` such steps between two jumps, and notes
    the least of `depth` steps."""

    rows: int
    lanes: int
    depth: int
    unroll: int
    num_warps: int


def key_few(dim: int, num_codes: int, num_rows: int) -> dict[str, int]:
    return {"dim": dim, "codes": _class_of(num_codes), "rows": _class_of(num_rows)}


def _class_of(count: int) -> int:
    return min(max(next_power_of_two(count), 256), 65536)


def few(dim: int, num_codes: int, num_rows: int, target: Target) -> FewConfig:
    key = key_few(dim, num_codes, num_rows)

    def heuristic() -> FewConfig:
        return _few(key)

    return tables.choose(
        OP, "search_few", key, target, FewConfig, heuristic, lambda: candidates("search_few", key, target)
    )


def _few(key: dict[str, int]) -> FewConfig:
    """32 lanes, so that the warps divide the rows, and each loaded code serves all rows of a thread.

    A thread with r rows holds r (dim + 4) numbers over the loop: r is 16 up to 4 dimensions, then 8.
    """
    rows_per_warp = 16 if key["dim"] <= 4 else 8
    depth = 16 if key["dim"] <= 8 and key["codes"] > 512 else 8
    return FewConfig(64, 32, depth, 2, 64 // rows_per_warp)


class ManyConfig(NamedTuple):
    """A program has `rows`, and takes `codes` and `block_d` dimensions at a time."""

    rows: int
    codes: int
    block_d: int
    num_warps: int
    num_stages: int


def key_many(dim: int, num_codes: int, num_rows: int) -> dict[str, int]:
    return {
        "dim": max(next_power_of_two(dim), 32),
        "codes": _class_of(num_codes),
        "rows": _class_of(num_rows),
    }


def many(dim: int, num_codes: int, num_rows: int, target: Target) -> ManyConfig:
    key = key_many(dim, num_codes, num_rows)

    def heuristic() -> ManyConfig:
        return _many(key, target)

    return tables.choose(
        OP, "search_many", key, target, ManyConfig, heuristic, lambda: candidates("search_many", key, target)
    )


def _many(key: dict[str, int], target: Target) -> ManyConfig:
    """All dimensions at once where that has room, so that the rows are split into halves but once.

    Where tensor cores read shared memory (sm_90, sm_100): up to 256 dimensions; 128 rows, as with fewer the
    second level cache cannot deliver the codes in time. Elsewhere the halves of the rows stand in registers:
    up to 128.
    """
    dim = key["dim"]
    if 90 <= target.capability < 120:
        if dim > 256:
            return ManyConfig(64, 64, 64, 8, 2)
        return ManyConfig(128, 64 if dim <= 128 else 32, dim, 8, 3 if dim <= 64 else 2)
    if dim > 128:
        return ManyConfig(64, 128 if dim <= 256 else 64, 32, 8, 2)
    return ManyConfig(64, 64, dim, 8, 2) if dim <= 64 else ManyConfig(64, 32, dim, 4, 2)


class FinishConfig(NamedTuple):
    """A program has `rows`. Of an open row it takes `ranked` codes at a time, of `together` open rows
    `together_ranked`."""

    rows: int
    ranked: int
    together: int
    together_ranked: int
    num_warps: int


def key_finish(dim: int, num_rows: int) -> dict[str, int]:
    return {"dim": next_power_of_two(dim), "rows": _class_of(num_rows)}


def finish(dim: int, num_rows: int, target: Target) -> FinishConfig:
    key = key_finish(dim, num_rows)

    def heuristic() -> FinishConfig:
        return _finish(key)

    return tables.choose(
        OP, "finish", key, target, FinishConfig, heuristic, lambda: candidates("finish", key, target)
    )


def _finish(key: dict[str, int]) -> FinishConfig:
    """Many programs for few rows, as open rows wait for one another. In few dimensions each row takes a look
    at some codes, in many only the open ones do."""
    if key["dim"] <= FEW:
        return FinishConfig(64 if key["rows"] > 16384 else 32, 512, 8, 128, 4)
    return FinishConfig(256 if key["rows"] > 16384 else 32, 1024, 16, 256, 8)


class EmaConfig(NamedTuple):
    """`unit` rows for a program, taken `block_r` at a time, and `block_d` components of them."""

    unit: int
    block_r: int
    block_d: int
    num_warps: int


def key_ema_update(dim: int, num_codes: int, num_rows: int) -> dict[str, int]:
    return {"dim": next_power_of_two(dim), "codes": _class_of(num_codes), "rows": _class_of(num_rows)}


def ema_update(dim: int, num_codes: int, num_rows: int, target: Target) -> EmaConfig:
    key = key_ema_update(dim, num_codes, num_rows)

    def heuristic() -> EmaConfig:
        return _ema_update(key)

    return tables.choose(
        OP, "ema_update", key, target, EmaConfig, heuristic, lambda: candidates("ema_update", key, target)
    )


def _ema_update(key: dict[str, int]) -> EmaConfig:
    """A tile of about 1024 numbers and two units for the rows that a code has on average, within 128 and
    1024."""
    block_d = min(key["dim"], 128)
    block_r = max(8, min(1024 // block_d, 64))
    average = max(1, key["rows"] // key["codes"])
    return EmaConfig(min(max(2 * average, 128), 1024), block_r, block_d, 1 if block_d < 32 else 2)


def candidates(kernel: str, key: dict[str, int], target: Target) -> list[NamedTuple]:
    """The configurations worth timing for `kernel`, that of the heuristic first."""
    if kernel == "search_few":
        rows_per_warp = (8, 16) if key["dim"] <= 8 else (4, 8)
        found = [
            FewConfig(rows * warps, lanes, depth, unroll, warps)
            for rows in rows_per_warp
            for warps in (4, 8)
            for lanes in (32, 64)
            for depth in (8, 16)
            for unroll in (1, 2, 4)
        ]
        return _first(_few(key), found)
    if kernel == "search_many":
        found = [
            ManyConfig(rows, codes, block_d, warps, stages)
            for rows in (64, 128)
            for codes in (32, 64, 128)
            for block_d in sorted({32, 64, min(key["dim"], 256)})
            for warps in (4, 8)
            for stages in (1, 2, 3)
            if 4 * block_d * (rows + stages * codes) <= target.shared_memory
        ]
        return _first(_many(key, target), found)
    if kernel == "finish":
        found = [
            FinishConfig(rows, ranked, together, 1024 // together * warps // 4, warps)
            for rows in (32, 64, 128, 256)
            for ranked in (512, 1024)
            for together in (4, 8, 16)
            for warps in (4, 8)
        ]
        return _first(_finish(key), found)
    if kernel == "ema_update":
        block_d = min(key["dim"], 128)
        found = [
            EmaConfig(unit, block_r, block_d, warps)
            for unit in (64, 128, 256, 512, 1024)
            for block_r in (8, 16, 32, 64)
            for warps in (1, 2, 4)
        ]
        return _first(_ema_update(key), found)
    raise ValueError(f"vq has no kernel {kernel!r}")


def _first(preferred: NamedTuple, found: list[NamedTuple]) -> list[NamedTuple]:
    return [preferred, *(config for config in found if config != preferred)]
