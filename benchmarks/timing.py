"""Time: samples long enough to be measured, rounds in which everything takes its turn, robust statistics."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

Sample = Callable[[int], float]
"""Does the measured thing so many times in a row; seconds it took."""

MIN_SAMPLE = 0.01  # seconds: 1000 times what a scheduler interrupt takes
_SHORT_SAMPLE = 0.1  # seconds
_BUDGET = 20.0  # seconds of rounds for one case, unless the number of rounds is given
_FEWEST, _MOST = 5, 25


class Statistics(NamedTuple):
    """Seconds of one call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float


def sampler(run: Callable[[], object], device: str = "cpu") -> Sample:
    """A Sample of `run` by the wall clock, on a CUDA device by events on its current stream."""
    return cuda_sampler(run) if device.startswith("cuda") else wall_sampler(run)


def wall_sampler(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Sample:
    def sample(loops: int) -> float:
        start = clock()
        for _ in range(loops):
            run()
        return clock() - start

    return sample


def cuda_sampler(run: Callable[[], object]) -> Sample:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(loops: int) -> float:
        torch.cuda.synchronize()
        begin.record()
        for _ in range(loops):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return sample


def calibrate(sample: Sample, shortest: float = MIN_SAMPLE) -> int:
    """After a first call to warm up, how many calls make one sample of at least `shortest` seconds."""
    sample(1)
    loops = 1
    while (seconds := sample(loops)) < shortest:
        # Past the target by a tenth, so that one more try is mostly enough; tiny readings say little.
        wanted = math.ceil(1.1 * loops * shortest / max(seconds, 1e-7))
        loops = min(max(wanted, 2 * loops), 100 * loops)
    return loops


def rounds_for(seconds_per_round: float) -> int:
    """As many rounds as fit the budget, within limits."""
    return max(_FEWEST, min(_MOST, int(_BUDGET / max(seconds_per_round, 1e-9))))


def interleave(samples: Mapping[str, tuple[Sample, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call in each round. A round takes one sample of each, beginning with another every time.

    So whatever slows the machine down for a while falls on all of them alike. A call before each short sample
    brings back the caches and cores that the one before still holds.
    """
    names = list(samples)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _no_collection():
        for turn in range(rounds):
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                sample, loops = samples[name]
                if not seconds[name] or seconds[name][-1] * loops < _SHORT_SAMPLE:
                    sample(1)
                seconds[name].append(sample(loops) / loops)
    return seconds


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector waits."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def statistics_of(values: Sequence[float]) -> Statistics:
    """Median and quartiles (linear between the values)."""
    if len(values) == 1:
        return Statistics(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Statistics(median, low, high)
