"""How group norm is cut into programs, from the sizes alone or from a measured table.

The floor is memory traffic: bytes read and written over the bandwidth (H200: 4.8 TB/s on paper, about 4.0 to
be had). What the numbers below aim at:

- 16-byte accesses: 8 elements of 16 bits (4 of 32) a thread, along the pixels or along the channels;
- enough bytes on their way: 4.8 TB/s times about 700 ns is 3.4 MB, 25 KB per multiprocessor, so 16 elements a
  thread and two or more programs of 8 warps on each;
- few idle lanes: channels are padded to a power of two, so neighbouring groups go together where that fits
  better (3 groups of 10 fill 30 of 32 lanes, one group 10 of 16);
- few launches: what one program can hold or keep in its L1 cache is done in one;
- otherwise eight programs for each multiprocessor, so that the last ones to end leave little idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from ..common.launch import ceil_div, next_power_of_two
from ..common.tables import choose
from ..common.target import Target
from .problem import Problem


class Config(NamedTuple):
    """`way`: "resident", "sweep" or "split". `groups`: neighbouring groups of one program. `block_pixels`:
    of a tile, unless resident. `chunks`: of the pixels, if split (no more than there are tiles)."""

    way: str
    groups: int
    block_pixels: int
    chunks: int
    num_warps: int


# Lanes that a program of 16 warps keeps in its registers without spilling, and lanes of a tile in a loop.
RESIDENT_LANES = 16384
SWEEP_LANES = {"forward": 16384, "backward": 8192}
SPLIT_LANES = {"forward": 4096, "backward": 2048}
# Bytes of a slab that a multiprocessor reads twice itself rather than a second kernel read it again: about
# what the L1 cache keeps, and at some 90 GB/s per multiprocessor no more time than a launch takes.
SWEEP_BYTES = 128 << 10
# With the channels last, a pixel's channels in one program: at least a sector of memory, better two.
ROW_BYTES = 64


def choose_forward(problem: Problem, target: Target) -> Config:
    return _choose(problem, target, "forward")


def choose_backward(problem: Problem, target: Target) -> Config:
    return _choose(problem, target, "backward")


def _choose(problem: Problem, target: Target, direction: str) -> Config:
    return choose(
        "group_norm",
        direction,
        key(problem),
        target,
        Config,
        lambda: heuristic(problem, target, direction),
        lambda: candidates(direction, problem, target),
    )


def key(problem: Problem) -> dict[str, int | bool]:
    """What a table tells apart; batch and pixels up to the next power of two."""
    return {
        "channels_per_group": problem.channels_per_group,
        "num_groups": problem.num_groups,
        "pixels": next_power_of_two(problem.pixels),
        "batch": next_power_of_two(problem.batch),
        "channels_last": problem.channels_last,
        "itemsize": problem.itemsize,
    }


@lru_cache(maxsize=4096)
def heuristic(problem: Problem, target: Target, direction: str) -> Config:
    return (
        _resident(problem, target, direction)
        or _sweep(problem, direction)
        or _split(problem, target, direction)
    )


def _resident(problem: Problem, target: Target, direction: str) -> Config | None:
    pixels = next_power_of_two(problem.pixels)
    groups = _groups_of_a_row(problem, ROW_BYTES // 2)
    lanes = problem.block_channels(groups) * pixels
    # Where the pixels are in whole vectors of 16 bits, the forward has registers left for twice as many.
    in_vectors = not problem.channels_last and problem.itemsize == 2 and problem.pixels % 8 == 0
    twice = direction == "forward" and in_vectors
    if lanes > RESIDENT_LANES * (1 + twice):
        return None
    # Tiny slabs go together, as long as every multiprocessor still has several programs.
    while (
        2 * groups <= problem.num_groups
        and problem.block_channels(2 * groups) * pixels <= 2048
        and problem.batch * problem.blocks(2 * groups) >= 8 * target.multiprocessors
    ):
        groups *= 2
    lanes = problem.block_channels(groups) * pixels
    per_warp = 32 * 32 if direction == "forward" else 32 * 16
    return Config("resident", groups, pixels, 1, min(16, max(1, lanes // per_warp)))


def _sweep(problem: Problem, direction: str) -> Config | None:
    groups = _groups_of_a_row(problem, ROW_BYTES)
    slab = groups * problem.channels_per_group * problem.pixels * problem.itemsize
    if slab > SWEEP_BYTES:
        return None
    lanes = SWEEP_LANES[direction]
    if direction == "backward" and problem.channels_last:
        # A vector of channels brings a vector of each parameter with it.
        lanes //= 2
    return Config("sweep", groups, _block_pixels(problem, groups, lanes), 1, 16)


def _split(problem: Problem, target: Target, direction: str) -> Config:
    groups = _groups_that_fill(problem, target)
    block_pixels = _block_pixels(problem, groups, SPLIT_LANES[direction])
    programs = problem.batch * problem.blocks(groups)
    wanted = 8 * target.multiprocessors // programs
    chunks = max(2, min(wanted, _most_chunks(problem), ceil_div(problem.pixels, block_pixels)))
    return Config("split", groups, block_pixels, chunks, 8)


def _most_chunks(problem: Problem) -> int:
    """Each program of a forward reads the partial sums of all chunks, 12 bytes a group: no more of them than
    a fourth of what it reads of x."""
    row = problem.pixels * problem.channels_per_group * problem.itemsize
    return max(2, int((row / (4 * 12)) ** 0.5))


def _block_pixels(problem: Problem, groups: int, lanes: int) -> int:
    return min(next_power_of_two(problem.pixels), max(1, lanes // problem.block_channels(groups)))


def _groups_of_a_row(problem: Problem, least: int) -> int:
    """With the channels last, so many that a pixel's channels are `least` bytes; else one."""
    if not problem.channels_last:
        return 1
    return min(problem.num_groups, ceil_div(least, problem.channels_per_group * problem.itemsize))


def _groups_that_fill(problem: Problem, target: Target) -> int:
    """The number of groups that leaves fewest lanes idle within 64 channels (channels last: 128, with rows of
    at least 64 bytes that vectors divide), among those that give every multiprocessor two programs; the
    smaller one on a tie."""
    limit = 128 if problem.channels_last else 64
    least = _groups_of_a_row(problem, ROW_BYTES)

    def cost(groups: int) -> float:
        lanes = problem.blocks(groups) * problem.block_channels(groups)
        vector = gcd(groups * problem.channels_per_group * problem.itemsize, 16)
        narrow = problem.channels_last and vector < 16
        programs = problem.batch * problem.blocks(groups) * _most_chunks(problem)
        empty = max(1.0, 2 * target.multiprocessors / programs)
        return lanes / problem.channels * empty * (1.0 if not narrow else 1.0 + 2.0 / vector)

    fitting = [g for g in range(least, problem.num_groups + 1) if problem.block_channels(g) <= limit]
    return min(fitting or [least], key=cost)


def candidates(direction: str, problem: Problem, target: Target) -> Iterator[Config]:
    """What is worth measuring: the heuristic's choice, and each way with more or less of everything."""
    seen = set()
    for config in _candidates(direction, problem, target):
        if config not in seen:
            seen.add(config)
            yield config


def _candidates(direction: str, problem: Problem, target: Target) -> Iterator[Config]:
    yield heuristic(problem, target, direction)
    resident = _resident(problem, target, direction)
    if resident is not None:
        for num_warps in (1, 2, 4, 8, 16):
            lanes = problem.block_channels(resident.groups) * resident.block_pixels
            if 4 <= lanes // (32 * num_warps) <= (64 if direction == "forward" else 32):
                yield resident._replace(num_warps=num_warps)
    split = _split(problem, target, direction)
    for groups in {split.groups, _groups_of_a_row(problem, ROW_BYTES)}:
        for lanes in (2048, 4096, 8192):
            block_pixels = _block_pixels(problem, groups, lanes)
            for num_warps in (4, 8, 16):
                if lanes // (32 * num_warps) > 32:
                    continue
                yield Config("sweep", groups, block_pixels, 1, num_warps)
                for chunks in {split.chunks // 2, split.chunks, 2 * split.chunks}:
                    if chunks >= 2:
                        yield Config("split", groups, block_pixels, chunks, num_warps)
