"""The default cases of `run ops` and the demo networks of `run models`, for pytest-benchmark.

pytest benchmarks --benchmark-only -k "attention and fastldm-auto"
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from benchmarks import registry
from benchmarks.measure import prepare
from benchmarks.providers import forget_compiled
from benchmarks.registry import Case, Judge, Problem, Selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELECTIONS = {"ops": Selection(device=DEVICE), "models": Selection(shapes=("demo",), device=DEVICE)}


def parameters() -> Iterator:
    for group, selection in SELECTIONS.items():
        for case in registry.cases(group, selection):
            for provider in registry.find(case.op).providers():
                name = "-".join((case.op, case.shape, case.dtype, case.layout, case.direction, provider.name))
                yield pytest.param(case, provider, id=name)


@lru_cache(maxsize=1)
def problem_of(case: Case) -> tuple[Problem, Judge]:
    forget_compiled()
    op = registry.find(case.op)
    problem = op.problem(case)
    return problem, op.judge(problem)


@pytest.mark.parametrize(("case", "provider"), parameters())
def test_case(case, provider, benchmark):
    with torch.set_grad_enabled(case.direction != "forward"):
        problem, judge = problem_of(case)
        ready = prepare(problem, provider, judge)
        if ready.refused:
            pytest.skip(ready.refused)
        if provider.ours:
            assert ready.verdict.fault is None
        benchmark.group = str(case)
        benchmark.extra_info.update(error=ready.verdict.error, fault=ready.verdict.fault)
        benchmark(ready.run)
