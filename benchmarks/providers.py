"""Who does an operation: fastldm on each of its backends. The rivals stand with each operation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.registry import Case, Function, Problem, Provider
from fastldm import dispatch, ops

AUTO = "fastldm-auto"


def ours(op: str, function: Callable[[Problem, Function], Function]) -> list[Provider]:
    """fastldm's operation `op` with "auto" and on every backend but the reference, which is the truth.

    One that is not live here refuses, with its reason. `function` makes a provider's function of the
    operation with its backend chosen.
    """
    names = ["auto", *(name for name in dispatch.BACKENDS if name != "reference")]

    def build(name: str, problem: Problem) -> Function:
        return function(problem, partial(getattr(ops, op), backend=name))

    def refuse(name: str, case: Case) -> str | None:
        found = None if name == "auto" else dispatch.find(name, op)
        return found if isinstance(found, str) else None

    return [
        Provider(f"fastldm-{name}", partial(build, name), ours=True, refuse=partial(refuse, name))
        for name in names
    ]


def installed(*modules: str) -> Callable[[Case], str | None]:
    """A `refuse` that wants these modules."""

    def refuse(case: Case) -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else None

    return refuse


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def forget_compiled() -> None:
    """Between cases: the same function at one shape after another would soon be run without compiling."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def no_lone_backward(case: Case) -> str | None:
    """A `refuse` for compiled functions: their backward frees what the forward saved."""
    return "has no backward of its own" if case.direction == "backward" else None


def packs_here(case: Case) -> str | None:
    """A `refuse` for packed weights."""
    return None if case.device == "cpu" else "packs weights for the CPU only"


def free_memory(device: str) -> int:
    """Bytes that can be allocated on the device now; a very large number where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def too_large(size: int, device: str) -> str | None:
    """Why not to try what needs `size` bytes at once: it would take most of the memory."""
    free = free_memory(device)
    if size <= free * 0.6:
        return None
    return f"needs {size / 2**30:.1f} GiB at once, {free / 2**30:.1f} GiB are free"
