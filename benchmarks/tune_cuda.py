"""Times the CUDA C++ kernels against Triton and PyTorch, and writes for which calls they are the fastest.

For each case "auto" runs once to see under which keys it looks for a CUDA kernel
(`fastldm/native/cuda/tables.py`). Then the backends are checked against the reference and timed in turns. Of
a key that several cases share, the backend wins that is best over all of them, by the rule of `tune.best_of`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import machine, registry, report, timing
from benchmarks.measure import prepare
from benchmarks.providers import AUTO
from benchmarks.registry import Case, Judge, Problem
from benchmarks.tune import best_of
from fastldm import dispatch
from fastldm.errors import InputError
from fastldm.io import atomic_write
from fastldm.native.cuda import tables
from fastldm.native.cuda.support import capability_of

# The first of equals wins: the kernels of csrc/cuda have to be faster.
_BACKENDS = ("torch", "triton", "cuda")
_ROUNDS = 5

Key = tuple[str, str, tuple]
"""(operation, direction, sorted items of the key)."""


def run(cases: Sequence[Case], folder: Path | None = None) -> int:
    """Writes the tables of the operations of `cases` to `folder`, by default into `csrc/cuda/tables/`.

    A case in the direction "forward" measures the forward, any other the backward alone. Raises InputError
    where the CUDA C++ kernels do not run.
    """
    for op in dict.fromkeys(case.op for case in cases):
        reason = dispatch.find("cuda", op)
        if isinstance(reason, str):
            raise InputError(f"the CUDA C++ kernels of {op} do not run here: {reason}")
    found: dict[Key, list[dict[str, float]]] = defaultdict(list)
    for case in dict.fromkeys(map(_alone, cases)):
        for key, times in tune_case(case).items():
            found[key].append(times)
            said = ", ".join(f"{name} {report.duration(seconds)}" for name, seconds in times.items())
            print(f"{case}: {said}", flush=True)
        _write(found, torch.device(case.device), folder)
    tables.entries.cache_clear()
    return 0


def _alone(case: Case) -> Case:
    return case if case.direction == "forward" else replace(case, direction="backward")


def tune_case(case: Case) -> dict[Key, dict[str, float]]:
    """{key: {backend: seconds of a call}} of what the case measures; empty where CUDA kernels refuse it."""
    op = registry.find(case.op)
    with torch.set_grad_enabled(case.direction != "forward"):
        problem = op.problem(case)
        judge = op.judge(problem)
        with tables.watching() as lookups:
            first = prepare(problem, registry.providers(op, [AUTO])[0], judge)
        if first.run is None or first.verdict.fault:
            raise InputError(f"{case}: {first.refused or first.verdict.fault}")
        keys = {
            (found.op, found.direction, tuple(sorted(found.key.items())))
            for found in lookups
            if found.direction == case.direction
        }
        times = _times(problem, judge) if keys else {}
    return dict.fromkeys(keys, times)


def _times(problem: Problem, judge: Judge) -> dict[str, float]:
    """Seconds of a call of each backend that does the case and does it right."""
    case = problem.case
    op = registry.find(case.op)
    samples = {}
    for name in _BACKENDS:
        ready = prepare(problem, registry.providers(op, [f"fastldm-{name}"])[0], judge)
        if ready.verdict.fault:
            print(f"{case}: {name} is WRONG: {ready.verdict.fault}", flush=True)
        elif ready.run is not None:
            sample = timing.sampler(ready.run, case.device)
            samples[name] = (sample, timing.calibrate(sample))
    seconds = timing.interleave(samples, _ROUNDS)
    return {name: timing.statistics_of(values).median for name, values in seconds.items()}


def _write(found: dict[Key, list[dict[str, float]]], device: torch.device, folder: Path | None) -> None:
    """One table for each operation; keys measured earlier and not now stay as they were."""
    capability = capability_of(device)
    for op in dict.fromkeys(op for op, _, _ in found):
        known = set(tables.entries(op, capability))
        for (name, direction, key), cases in found.items():
            if name == op:
                entry = (direction, frozenset(key))
                (known.add if best_of(cases) == "cuda" else known.discard)(entry)
        entries = sorted(((direction, sorted(key)) for direction, key in known), key=str)
        document = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "git": machine.revision()["sha"],
            "entries": [{"direction": direction, "key": dict(key)} for direction, key in entries],
        }
        path = tables.table_path(op, capability)
        path = path if folder is None else folder / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(document, indent=1) + "\n")
