"""For which calls a CUDA C++ kernel was measured to be the fastest that there is.

Measurements are in `csrc/cuda/tables/<op>-sm_<capability>.json`, written by `python -m benchmarks`:

    {"device": "NVIDIA H200", "torch": "2.15.0", "git": "...",
     "entries": [{"direction": "forward", "key": {"head_dim": 40, ...}}, ...]}

An entry says that for such calls the kernel was faster than Triton and PyTorch on that device. Without one
"auto" leaves the call to them.
"""

from __future__ import annotations

import json
from functools import cache

import torch

from fastldm.native.build import sources_folder
from fastldm.native.cuda.support import capability_of


def objection(op: str, direction: str, key: dict[str, str | int | bool], device: torch.device) -> str | None:
    """None where the table of this GPU has the call; else in one line that it has not."""
    capability = capability_of(device)
    if (direction, frozenset(key.items())) in entries(op, capability):
        return None
    return f"not measured to be the fastest for such a call on sm_{capability}"


@cache
def entries(op: str, capability: int) -> frozenset[tuple[str, frozenset]]:
    """The (direction, items of the key) that the table holds; empty where there is none."""
    path = sources_folder() / "cuda" / "tables" / f"{op}-sm_{capability}.json"
    if not path.is_file():
        return frozenset()
    table = json.loads(path.read_text(encoding="utf-8"))
    return frozenset((entry["direction"], frozenset(entry["key"].items())) for entry in table["entries"])
