from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..common import tables
from ..common.launch import ceil_div
from ..common.target import Target
from .problem import Problem, pieces

OP = "attention"


def is_wide(problem: Problem) -> bool:
    return problem.head_dim > 256


def is_short(problem: Problem, direction: str) -> bool:
    width = sum(pieces(problem.head_dim))
    if problem.dtype == "float32":
        return problem.keys <= 128 and width <= 64
    return problem.keys <= 128 and width <= 192


class ForwardConfig(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_key(problem: Problem) -> dict:
    return {"head_dim": problem.head_dim, "dtype": problem.dtype}


def forward(problem: Problem, target: Target) -> ForwardConfig:
    def heuristic() -> ForwardConfig:
        width = sum(pieces(problem.head_dim))
        if problem.dtype == "float32":
            return ForwardConfig(32, 32, 4, 1)
        if width <= 96:
            return ForwardConfig(128, 128, 8, 3)
        return ForwardConfig(128, 64, 8, 2)

    return tables.choose(OP, "forward", forward_key(problem), target, ForwardConfig, heuristic)


def splits(problem: Problem, target: Target, config: ForwardConfig) -> int:
    programs = ceil_div(problem.queries, config.block_m) * problem.batch * problem.heads
    key_tiles = ceil_div(problem.keys, config.block_n)
    return max(1, min(target.multiprocessors // programs, problem.keys // 512, 8, key_tiles))


class BackwardConfig(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def passes(problem: Problem) -> tuple[tuple[bool, bool], ...]:
    """(dk, dv) that one program holds together, per launch."""
    return ((True, True),) if problem.head_dim <= 128 else ((True, False), (False, True))


def backward(kernel: str, problem: Problem, target: Target) -> BackwardConfig:
    def heuristic() -> BackwardConfig:
        if kernel == "statistics":
            return BackwardConfig(16, 16, 4, 1) if problem.head_dim > 256 else BackwardConfig(32, 32, 4, 1)
        if problem.dtype == "float32":
            return BackwardConfig(32, 32, 4, 1)
        return BackwardConfig(64, 128, 8, 2) if kernel == "keys" else BackwardConfig(128, 64, 8, 2)

    return tables.choose(OP, f"backward-{kernel}", forward_key(problem), target, BackwardConfig, heuristic)


class ShortConfig(NamedTuple):
    """BLOCK_M queries a step; all keys are held."""

    block_m: int
    num_warps: int
    num_stages: int


def key_pieces(keys: int) -> tuple[int, int]:
    """One or two powers of two that cover the keys of a short kernel: 77 = 64 + 16."""
    first, second, third = pieces(keys)
    return (2 * first, 0) if third else (first, second)


def chunks(problem: Problem, target: Target, tiles: int) -> int:
    wanted = ceil_div(4 * target.multiprocessors, problem.batch * problem.heads)
    return ceil_div(tiles, ceil_div(tiles, min(tiles, wanted)))


def short(kernel: str, problem: Problem, target: Target) -> ShortConfig:
    def heuristic() -> ShortConfig:
        if problem.dtype == "float32":
            return ShortConfig(32, 4, 1)
        return ShortConfig(64, 4, 2)

    key = {**forward_key(problem), "keys": sum(key_pieces(problem.keys))}
    return tables.choose(OP, kernel, key, target, ShortConfig, heuristic)


class WideConfig(NamedTuple):
    """Products [block_m, ...] x [..., block_n]; block_d of the head dim, a step or the width of a program."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def wide(kernel: str, problem: Problem, target: Target) -> WideConfig:
    def heuristic() -> WideConfig:
        if problem.dtype == "float32":
            return WideConfig(64, 64, 16, 4, 1) if kernel in ("wide-weights", "wide-gradients") else WideConfig(64, 16, 64, 4, 1)
        if kernel in ("wide-weights", "wide-gradients"):
            return WideConfig(128, 128, 64, 8, 3)
        return WideConfig(128, 64, 128, 8, 3)

    return tables.choose(OP, kernel, forward_key(problem), target, WideConfig, heuristic)
