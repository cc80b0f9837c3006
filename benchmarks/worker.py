"""One tree's side of `compare`: prepares cases and takes samples as it is told, one JSON line each way.

Runs with a tree as its working folder, so `fastldm` is that tree's.
"""

from __future__ import annotations

import json
import os
import sys

import torch

import fastldm
from benchmarks import memory, registry, timing
from benchmarks.measure import prepare
from benchmarks.providers import forget_compiled
from benchmarks.registry import Case
from fastldm.dispatch import OPS
from fastldm.testing import live_backends


class Side:
    """Answers requests: `hello`, then `prepare` and any number of `sample` for each case."""

    def __init__(self) -> None:
        self._sample: timing.Sample | None = None

    def hello(self, threads: int) -> dict:
        torch.set_num_threads(threads)
        memory.reuse()
        return {"fastldm": fastldm.__file__, "backends": {op: live_backends(op) for op in OPS}}

    def prepare(self, case: dict, provider: str) -> dict:
        """How many calls make a sample, and the seconds of one; or `refused`, or the `fault` of a result."""
        self._sample = None
        forget_compiled()
        asked = Case(**case)
        op = registry.find(asked.op)
        found = registry.providers(op, [provider])
        if not found:
            return {"refused": f"there is no {provider} for {asked.op}"}
        torch.set_grad_enabled(asked.direction != "forward")
        problem = op.problem(asked)
        ready = prepare(problem, found[0], op.judge(problem))
        answer = {"refused": ready.refused, "fault": ready.verdict.fault, "error": ready.verdict.error}
        if ready.run is None or ready.verdict.fault:
            return answer
        self._sample = timing.sampler(ready.run, asked.device)
        loops = timing.calibrate(self._sample)
        return {**answer, "loops": loops, "seconds": self._sample(loops)}

    def sample(self, loops: int) -> dict:
        return {"seconds": self._sample(loops)}


def main() -> None:
    # What libraries print must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(side, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
