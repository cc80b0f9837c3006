"""One case from check to rows: each provider is checked, then those that may be are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from benchmarks import floors, memory, registry, timing
from benchmarks.checks import runnable
from benchmarks.providers import AUTO, forget_compiled
from benchmarks.registry import Case, Judge, Problem, Provider, Verdict, Work
from fastldm.errors import UnsupportedError

_FLOOR = "floor"


@dataclass
class Row:
    """What one provider did in one case. Times are seconds of one call.

    A provider that did not run has `refused`; one whose result is wrong has `fault`, and no time if it is
    ours. `rate` is in FLOP/s or bytes/s beside `floor_rate`, what the machine does in the same rounds: a
    matrix product, or one copy of the tensor. `ratio`: how many times faster than the fastest rival.
    """

    op: str
    shape: str
    dims: dict
    dtype: str
    layout: str
    direction: str
    device: str
    threads: int
    provider: str
    ours: bool
    refused: str | None = None
    fault: str | None = None
    error: float | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    loops: int | None = None
    samples: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None
    floor: str | None = None
    floor_seconds: float | None = None
    floor_rate: float | None = None
    rate: float | None = None
    best_rival: str | None = None
    ratio: float | None = None
    slower_than_torch: bool | None = None

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """A provider after its first call: what to time, unless it `refused`, and the verdict on its result."""

    run: Callable[[], tuple[Tensor, ...]] | None
    refused: str | None = None
    verdict: Verdict = field(default_factory=Verdict)


def prepare(problem: Problem, provider: Provider, judge: Judge) -> Prepared:
    """Builds the provider's function, calls it once and has the result judged. Rivals may fail in any way."""
    refused = provider.refuse(problem.case)
    if refused:
        return Prepared(None, refused)
    try:
        run = runnable(provider.build(problem), problem)
        return Prepared(run, None, judge(run()))
    except UnsupportedError as error:
        return Prepared(None, str(error))
    except Exception as error:
        message = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return Prepared(None, None, Verdict(None, message)) if provider.ours else Prepared(None, message)


def measure(case: Case, providers: Iterable[Provider], rounds: int | None = None) -> list[Row]:
    """One row for each provider. `rounds` None: as many as fit some twenty seconds."""
    op = registry.find(case.op)
    providers = list(providers)
    forget_compiled()
    with torch.set_grad_enabled(case.direction != "forward"):
        problem = op.problem(case)
        judge = op.judge(problem)
        ready = {provider.name: prepare(problem, provider, judge) for provider in providers}
        rows = [_row(problem, provider, ready[provider.name]) for provider in providers]
        timed = {row.provider: ready[row.provider].run for row in rows if _may_be_timed(row)}
        for row in rows:
            if row.provider in timed:
                row.peak_extra_bytes = memory.peak_extra(timed[row.provider], case.device)
        work = op.work(problem)
        floor = floors.floor(work, case)
        _time(rows, {**timed, _FLOOR: floor.run}, work, floor, rounds)
    _compare(rows, op.torch)
    return rows


def _may_be_timed(row: Row) -> bool:
    """A rival's wrong result is marked; ours is not worth a time."""
    return row.refused is None and not (row.ours and row.fault)


def _row(problem: Problem, provider: Provider, ready: Prepared) -> Row:
    case = problem.case
    return Row(
        **asdict(case),
        dims={name: list(x.shape) for name, x in zip(problem.names, problem.inputs)},
        threads=torch.get_num_threads(),
        provider=provider.name,
        ours=provider.ours,
        refused=ready.refused,
        fault=ready.verdict.fault,
        error=ready.verdict.error,
    )


def _time(rows: list[Row], runs: dict, work: Work, floor: floors.Floor, rounds: int | None) -> None:
    """Fills in times and rates, those of the floor measured in the same rounds."""
    samples = {}
    for name, run in runs.items():
        sample = timing.sampler(run, rows[0].device)
        samples[name] = (sample, timing.calibrate(sample))
    if rounds is None:
        rounds = timing.rounds_for(sum(sample(loops) for sample, loops in samples.values()))
    seconds = timing.interleave(samples, rounds)
    floor_seconds = timing.statistics_of(seconds[_FLOOR]).median
    for row in rows:
        row.floor, row.floor_seconds = work.floor, floor_seconds
        row.floor_rate = floor.amount / floor_seconds
        if row.provider in seconds:
            row.samples = seconds[row.provider]
            row.loops = samples[row.provider][1]
            row.seconds, row.low, row.high = timing.statistics_of(row.samples)
            row.rate = work.amount / row.seconds


def _compare(rows: list[Row], torch_rival: str) -> None:
    """Fills in the ratio of ours to the fastest rival, right or wrong, and how "auto" stands to PyTorch."""
    times = {row.provider: row.seconds for row in rows if not row.ours and row.seconds is not None}
    for row in rows:
        if not row.ours or row.seconds is None:
            continue
        if times:
            row.best_rival = min(times, key=times.__getitem__)
            row.ratio = times[row.best_rival] / row.seconds
        if row.provider == AUTO and torch_rival in times:
            row.slower_than_torch = falls_behind(row.seconds, times[torch_rival])


def falls_behind(seconds: float, peer: float) -> bool:
    """Slower by more than 3% or 15 microseconds, whichever is larger: the promise of "auto"."""
    return seconds - peer > max(0.03 * peer, 15e-6)
