"""Which kernels a call takes, in which tiles.

The heuristics below were chosen without a GPU at hand: by count, and by what the compiler makes of them
(registers, spills, shared memory, tensor core instructions). What a GPU says replaces them: tables, written
by `python -m benchmarks tune`.

- A program of 8 warps by 128 rows gives two warp groups of Hopper 64 rows each, and every row to one warp, so
  that a softmax needs no exchange between warps.
- Registers of a thread, of 255: accumulators of 128 rows by 8 warps take half a register a column, so 64 for
  a head dim of 128; scores another 32 or 64 for 64 or 128 keys a step; in the backward there are two of each.
- Shared memory of a block, 227 kB on sm_90 and sm_100, 163 on sm_80, 99 on sm_86, sm_89 and sm_120: the
  resident tile, and the others of a step by the number of stages.
- mma.sync (sm_80 to sm_89, sm_120) has operands in registers, which wgmma and tcgen05 read from shared
  memory: so steps are smaller there.
- Where more than a few registers spill: `cases.may_spill`.
- float32 is computed on the FP32 pipes, operands and results in registers: tiles are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from ..common import tables
from ..common.launch import ceil_div, next_power_of_two
from ..common.target import Target
from .problem import Problem, pieces

OP = "attention"


class TileConfig(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class ShortConfig(NamedTuple):
    """BLOCK_M queries a step; all keys are held."""

    block_m: int
    num_warps: int
    num_stages: int


class WideConfig(NamedTuple):
    """A tile of the weights; of the head dim a step where weights are made, else the part of a program."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


KERNELS = {
    **dict.fromkeys(("forward", "backward-statistics", "backward-keys", "backward-queries"), TileConfig),
    **dict.fromkeys(("short-forward", "short-backward"), ShortConfig),
    **dict.fromkeys(
        ("wide-weights", "wide-values", "wide-gradients", "wide-product", "wide-transposed"), WideConfig
    ),
}


def registers_hold_operands(target: Target) -> bool:
    """mma.sync, in place of wgmma (sm_90) or tcgen05 (sm_100 and its kin)."""
    return target.capability < 90 or target.capability >= 120


def is_wide(problem: Problem) -> bool:
    return problem.head_dim > 256


def is_short(problem: Problem, direction: str, target: Target) -> bool:
    """Whether k and v (and in the backward their gradients) of a head stay on chip."""
    if problem.keys > 128:
        return False
    width = sum(pieces(problem.head_dim))
    if problem.dtype == "float32":
        held = next_power_of_two(problem.keys) * width
        return held <= (4096 if direction == "forward" else 1024)
    return width <= (128 if direction == "backward" and registers_hold_operands(target) else 160)


def key_of(kernel: str, problem: Problem, target: Target) -> dict:
    """What a configuration is chosen by."""
    key = {"head_dim": problem.head_dim, "dtype": problem.dtype}
    if KERNELS[kernel] is ShortConfig:
        key["keys"] = next_power_of_two(max(16, problem.keys))
    if KERNELS[kernel] is TileConfig:
        key["full_mask"] = problem.mask_kind == "full"
        length = problem.keys if kernel == "backward-keys" else problem.queries
        programs = ceil_div(length, 128) * problem.batch * problem.heads
        key["small"] = 2 * programs <= target.multiprocessors
    return key


def choose(kernel: str, problem: Problem, target: Target) -> TileConfig | ShortConfig | WideConfig:
    key = key_of(kernel, problem, target)
    return tables.choose(
        OP,
        kernel,
        key,
        target,
        KERNELS[kernel],
        lambda: heuristic(kernel, key, target),
        lambda: candidates(kernel, key, target),
    )


def heuristic(kernel: str, key: dict, target: Target) -> TileConfig | ShortConfig | WideConfig:
    config = _large(kernel, key, target)
    if key.get("small", False) and config.num_warps == 8 and key["dtype"] != "float32":
        # Half of the GPU would have nothing to do: twice the programs of half the rows and warps.
        if kernel == "backward-keys":
            block_m = config.block_m if key["head_dim"] <= 128 else min(32, config.block_m)
            return config._replace(block_m=block_m, block_n=config.block_n // 2, num_warps=4)
        tight = registers_hold_operands(target) or key["head_dim"] > 128
        block_n = max(16, config.block_n // 2) if tight else config.block_n
        return config._replace(block_m=config.block_m // 2, block_n=block_n, num_warps=4)
    return config


def _large(kernel: str, key: dict, target: Target) -> TileConfig | ShortConfig | WideConfig:
    width = sum(pieces(key["head_dim"]))
    if key["dtype"] == "float32":
        return _float32(kernel, width)
    by_registers = registers_hold_operands(target)
    if key.get("full_mask", False) and kernel != "backward-statistics":
        # Every score has an address of its mask, of two registers.
        return _full_mask(kernel, width, by_registers)
    if kernel == "forward":
        if by_registers:
            if width > 128:
                return TileConfig(64, 32, 4, 1) if width == 256 else TileConfig(128, 32, 8, 2)
            return TileConfig(128, 128 if 16 < width <= 48 else 64, 8, 3)
        if width <= 96:
            return TileConfig(128, 128, 8, 3)
        if width == 256:
            return TileConfig(128, 32 if target.capability >= 100 else 64, 8, 2)
        if width > 160:
            return TileConfig(128, 64, 8, 3)
        return TileConfig(128, 64, 8, 3) if width == 112 else TileConfig(128, 128, 8, 2)
    if kernel == "backward-statistics":
        if width > 256:
            return TileConfig(32, 16, 4, 1)
        return TileConfig(16, 16, 4, 1) if width > 80 else TileConfig(32, 32, 4, 1)
    if kernel == "backward-keys":
        if by_registers:
            if width > 112:
                return TileConfig(32, 64, 4, 1 if width == 256 else 2)
            return TileConfig(64 if width <= 64 else 32, 128, 8, 2)
        return TileConfig(
            64 if width <= 96 or (width in (144, 160) and target.capability == 90) else 32, 128, 8, 2
        )
    if kernel == "backward-queries":
        if by_registers:
            if width > 128:
                return TileConfig(64, 16, 4, 1)
            return TileConfig(128, 64 if width <= 64 else 32, 8, 2)
        return TileConfig(128, 64 if width <= 208 else 32, 8, 2)
    if kernel == "short-forward":
        return ShortConfig(64, 4, 2)
    if kernel == "short-backward":
        if by_registers:
            return ShortConfig(64 if width <= 32 else 32, 8, 2 if width <= 64 else 1)
        if width > 128 and key["keys"] > 64 and target.capability >= 100:
            return ShortConfig(16, 8, 1)
        return ShortConfig(64, 8, 2)
    if kernel in ("wide-weights", "wide-gradients"):
        return WideConfig(128, 64 if by_registers and kernel == "wide-gradients" else 128, 64, 8, 3)
    return WideConfig(128, 64, 128, 8, 3)


def _full_mask(kernel: str, width: int, by_registers: bool) -> TileConfig:
    if kernel == "backward-keys":
        if by_registers and width > 48:
            return TileConfig(16, 64, 4, 1)
        return TileConfig(16 if 96 < width <= 128 else 32, 128, 8, 2)
    return TileConfig(64, 16, 4, 1) if by_registers and width > 64 else TileConfig(128, 32, 8, 2)


def _float32(kernel: str, width: int) -> TileConfig | ShortConfig | WideConfig:
    if KERNELS[kernel] is ShortConfig:
        return ShortConfig(32, 8 if kernel == "short-backward" else 4, 1)
    if KERNELS[kernel] is WideConfig:
        made = kernel in ("wide-weights", "wide-gradients")
        return WideConfig(64, 64, 16, 4, 1) if made else WideConfig(64, 16, 64, 4, 1)
    if kernel == "backward-statistics":
        return TileConfig(32, 32, 8, 1) if width <= 48 else TileConfig(16, 16, 8, 1)
    if width <= 64:
        return TileConfig(32, 32, 8, 1)
    return TileConfig(16, 32 if width <= 128 else 16, 4, 1)


def passes(kernel: str, problem: Problem, target: Target) -> tuple[tuple[bool, bool], ...]:
    """(dk, dv) that one program holds together, per launch."""
    together = 128
    if kernel == "short-backward":
        together = 64 if registers_hold_operands(target) else 80
    return ((True, True),) if sum(pieces(problem.head_dim)) <= together else ((True, False), (False, True))


def key_pieces(keys: int) -> tuple[int, int]:
    """One or two powers of two that cover the keys of the short forward: 77 = 64 + 16."""
    first, second, third = pieces(keys)
    return (2 * first, 0) if third else (first, second)


def splits(problem: Problem, target: Target, config: TileConfig) -> int:
    """Parts of the keys: while programs are fewer than multiprocessors, of 512 keys or more."""
    programs = ceil_div(problem.queries, config.block_m) * problem.batch * problem.heads
    return max(1, min(target.multiprocessors // programs, problem.keys // 512, 16))


def chunks(kernel: str, problem: Problem, target: Target, tiles: int) -> int:
    """Parts of the queries of a head, none without a tile: as many programs as run at a time.

    In the backward, of 8 warps with many registers, that is one a multiprocessor; each writes partial sums.
    """
    programs = target.multiprocessors * (4 if kernel == "short-forward" else 1)
    wanted = ceil_div(programs, problem.batch * problem.heads)
    return ceil_div(tiles, ceil_div(tiles, min(tiles, wanted)))


def candidates(kernel: str, key: dict, target: Target) -> Iterator[TileConfig | ShortConfig | WideConfig]:
    """What to measure: the heuristic's choice first, then what is near it."""
    first = heuristic(kernel, key, target)
    yield first
    for values in product(*(_near(name, value) for name, value in zip(first._fields, first))):
        config = type(first)(*values)
        if config != first and _sensible(config, key["dtype"]):
            yield config


def _near(name: str, value: int) -> tuple[int, ...]:
    if name == "num_warps":
        return (4, 8)
    if name == "num_stages":
        return (1, 2, 3, 4)
    least, most = (16, 128) if name != "block_d" else (16, 256)
    return tuple(n for n in (value // 2, value, 2 * value) if least <= n <= most)


def _sensible(config: NamedTuple, dtype: str) -> bool:
    """Rows enough for the warps; and where products are not asynchronous, no stages."""
    rows = max(config.block_m, getattr(config, "block_n", 0))
    return rows >= 16 * config.num_warps // 2 and not (dtype == "float32" and config.num_stages > 1)
