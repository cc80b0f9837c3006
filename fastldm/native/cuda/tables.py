"""For which calls a CUDA C++ kernel was measured to be the fastest that there is.

Measurements are in `csrc/cuda/tables/<op>-sm_<capability>.json`, written by `python -m benchmarks tune`:

    {"device": "NVIDIA H200", "torch": "2.15.0", "git": "...",
     "entries": [{"direction": "forward", "key": {"head_dim": 40, ...}}, ...]}

An entry says that for such calls the kernel was faster than Triton and PyTorch on that device. Without one
"auto" leaves the call to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastldm.native.build import sources_folder
from fastldm.native.cuda.support import capability_of


class Lookup(NamedTuple):
    """A call that "auto" looked for in a table."""

    op: str
    direction: str
    key: dict[str, str | int | bool]


# Who lists the calls that are looked for; of the whole process, as the backward has a thread of its own.
_watchers: list[list[Lookup]] = []


def objection(op: str, direction: str, key: dict[str, str | int | bool], device: torch.device) -> str | None:
    """None where the table of this GPU has the call; else in one line that it has not."""
    for lookups in _watchers:
        lookups.append(Lookup(op, direction, key))
    capability = capability_of(device)
    if (direction, frozenset(key.items())) in entries(op, capability):
        return None
    return f"not measured to be the fastest for such a call on sm_{capability}"


def table_path(op: str, capability: int) -> Path:
    return sources_folder() / "cuda" / "tables" / f"{op}-sm_{capability}.json"


@cache
def entries(op: str, capability: int) -> frozenset[tuple[str, frozenset]]:
    """The (direction, items of the key) that the table holds; empty where there is none."""
    path = table_path(op, capability)
    if not path.is_file():
        return frozenset()
    table = json.loads(path.read_text(encoding="utf-8"))
    return frozenset((entry["direction"], frozenset(entry["key"].items())) for entry in table["entries"])


@contextmanager
def watching() -> Iterator[list[Lookup]]:
    """Lists every call that "auto" looks for, in any thread."""
    lookups: list[Lookup] = []
    _watchers.append(lookups)
    try:
        yield lookups
    finally:
        _watchers[:] = [other for other in _watchers if other is not lookups]
