"""Times the configurations that the Triton kernels name as candidates, and writes their tables.

For each case the operation runs once to see which kernels choose a configuration, under which keys
(`kernels/common/tables.py`). Then each candidate of each is checked against the reference and timed, the
other kernels left as they are. Of a key that several cases share, the configuration wins that is best over
all of them, by the geometric mean of its time over the best time of each case.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import torch
import triton
from fastldm.kernels.common import tables
from fastldm.kernels.common.target import target_of

from benchmarks import machine, registry, report, timing
from benchmarks.measure import prepare
from benchmarks.registry import Case
from fastldm.errors import InputError
from fastldm.io import atomic_write

_PROVIDER = "fastldm-triton"
_SAMPLES = 5

Times = dict[tuple, float]
"""{configuration: seconds of one call} of one case."""


def run(cases: Sequence[Case], folder: Path | None = None) -> int:
    """Tunes the kernels that `cases` need and writes their tables to `folder`, by default into `kernels/`.

    Raises InputError where Triton's kernels do not run on the device of the cases.
    """
    found: dict[tuple[str, str, tuple], list[Times]] = defaultdict(list)
    for case in cases:
        for (op, kernel, key), times in tune_case(case).items():
            found[op, kernel, key].append(times)
            best = min(times, key=times.__getitem__)
            print(f"{case} {kernel}: {report.duration(times[best])} by {best}, of {len(times)}", flush=True)
        _write(found, torch.device(cases[0].device), folder)
    tables.entries.cache_clear()
    return 0


def tune_case(case: Case) -> dict[tuple[str, str, tuple], Times]:
    """Seconds of every candidate of every kernel that the case runs; {(op, kernel, frozen key): Times}."""
    op = registry.find(case.op)
    (provider,) = registry.providers(op, [_PROVIDER])
    with torch.set_grad_enabled(case.direction != "forward"):
        problem = op.problem(case)
        judge = op.judge(problem)
        with tables.watching() as choices:
            first = prepare(problem, provider, judge)
        if first.run is None or first.verdict.fault:
            raise InputError(f"{case}: {first.refused or first.verdict.fault}")
        found = {}
        for choice in choices:
            key = (choice.op, choice.kernel, tables.frozen(choice.key))
            if key not in found:
                candidates = dict.fromkeys((choice.chosen, *choice.candidates))
                timed = {
                    config: _time(lambda: prepare(problem, provider, judge), case, choice, config)
                    for config in candidates
                }
                found[key] = {config: seconds for config, seconds in timed.items() if seconds is not None}
    return found


def _time(prepared: Callable, case: Case, choice: tables.Choice, config: tuple) -> float | None:
    """Seconds of a call with `config`; None where it is wrong or does not fit the GPU."""
    with tables.forcing(choice.op, choice.kernel, config):
        ready = prepared()
        if ready.run is None or ready.verdict.fault:
            return None
        sample = timing.sampler(ready.run, case.device)
        loops = timing.calibrate(sample)
        return timing.statistics_of([sample(loops) / loops for _ in range(_SAMPLES)]).median


def best_of(cases: Sequence[Mapping[Hashable, float]]) -> Hashable:
    """The configuration that is best over all cases, of those that every case can run.

    `cases`: {configuration: seconds of one call} of each.
    """
    common = set.intersection(*(set(times) for times in cases))

    def cost(config: Hashable) -> float:
        return sum(math.log(times[config] / min(times.values())) for times in cases)

    # In the order of the candidates, so that the heuristic's choice wins a tie.
    return min((config for config in cases[0] if config in common), key=cost)


def _write(found: dict, device: torch.device, folder: Path | None) -> None:
    """One table for each operation, keys measured earlier and not now included."""
    capability = target_of(device).capability
    for op in dict.fromkeys(op for op, _, _ in found):
        path = tables.table_path(op, capability)
        known = dict(tables.entries(op, capability)) if path.is_file() else {}
        for (name, kernel, key), cases in found.items():
            if name == op:
                known[kernel, key] = best_of(cases)._asdict()
        document = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "triton": triton.__version__,
            "git": machine.revision()["sha"],
            "entries": [
                {"kernel": kernel, "key": dict(key), "config": config}
                for (kernel, key), config in sorted(known.items(), key=str)
            ],
        }
        path = path if folder is None else folder / path.name.replace("sm_", f"{op}-sm_")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(document, indent=1) + "\n")
