"""Which configuration a kernel runs in: forced, else measured, else by its heuristic.

Measured configurations are in `kernels/<op>/tables/sm_<capability>-triton-<major>.<minor>.json`, written by
`python -m benchmarks tune`:

    {"device": "NVIDIA H200", "triton": "3.6.0", "git": "...",
     "entries": [{"kernel": "forward", "key": {"head_dim": 40, ...}, "config": {"block_m": 128, ...}}, ...]}

A table holds for the Triton that it was measured with and for later ones, until a later one has a table: the
best configuration differs from release to release, and by a factor of two has been seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import triton

from .target import Target

Config = TypeVar("Config", bound=NamedTuple)
Key = Mapping[str, str | int | bool]

FOLDER = Path(__file__).resolve().parents[1]
_NAME = re.compile(r"sm_(\d+)-triton-(\d+)\.(\d+)\.json")


class Choice(NamedTuple):
    """A call of `choose`: what was chosen, and what else is worth measuring."""

    op: str
    kernel: str
    key: dict[str, str | int | bool]
    chosen: NamedTuple
    candidates: tuple[NamedTuple, ...]


# For the whole process, as the backward of CUDA tensors runs in a thread of PyTorch's own: {(op, kernel): the
# configuration to use instead}, and who lists the calls of `choose`.
_forced: dict[tuple[str, str], NamedTuple] = {}
_watchers: list[list[Choice]] = []


def choose(
    op: str,
    kernel: str,
    key: Key,
    target: Target,
    make: type[Config],
    heuristic: Callable[[], Config],
    candidates: Callable[[], Iterable[Config]],
) -> Config:
    """The configuration of `kernel` of `op` for what `key` says of the problem, on `target`.

    `candidates` gives what `python -m benchmarks tune` times for such a problem.
    """
    config = _choose(op, kernel, key, target, make, heuristic)
    for calls in _watchers:
        calls.append(Choice(op, kernel, dict(key), config, tuple(dict.fromkeys(candidates()))))
    return config


def _choose(op, kernel, key, target, make, heuristic):
    if (op, kernel) in _forced:
        return _forced[op, kernel]
    measured = entries(op, target.capability).get((kernel, frozen(key)))
    return heuristic() if measured is None else make(**measured)


def frozen(key: Key) -> tuple:
    return tuple(sorted(key.items()))


def table_path(op: str, capability: int) -> Path:
    """Where a table measured with this Triton belongs."""
    major, minor = _version(triton.__version__)
    return FOLDER / op / "tables" / f"sm_{capability}-triton-{major}.{minor}.json"


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@cache
def entries(op: str, capability: int) -> dict[tuple[str, tuple], dict]:
    """{(kernel, frozen key): configuration} of the table in force; empty where there is none."""
    found = {}
    for path in (FOLDER / op / "tables").glob("*.json"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) == capability:
            found[int(match[2]), int(match[3])] = path
    usable = [version for version in found if version <= _version(triton.__version__)]
    if not usable:
        return {}
    table = json.loads(found[max(usable)].read_text(encoding="utf-8"))
    return {(e["kernel"], frozen(e["key"])): e["config"] for e in table["entries"]}


@contextmanager
def forcing(op: str, kernel: str, config: NamedTuple) -> Iterator[None]:
    """`choose` returns `config` for this kernel, in every thread: for tuning and for tests."""
    before = dict(_forced)
    _forced[op, kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def watching() -> Iterator[list[Choice]]:
    """Lists every call of `choose`, in any thread."""
    calls: list[Choice] = []
    _watchers.append(calls)
    try:
        yield calls
    finally:
        _watchers[:] = [other for other in _watchers if other is not calls]
