"""Rung 4 of the proof: every launch that tables and heuristics choose, compiled for GPUs that are not here.

A process for each operation and target does it, without Triton's interpreter; Triton keeps what it compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fastldm.kernels.common.target import KNOWN

OPS = ("attention", "group_norm", "vq")
# Bytes a thread: eight of 255 registers, which one version of the compiler holds and the next does not. A
# tile that is too large costs hundreds.
MOST_SPILLED = 32


@pytest.mark.parametrize("capability", KNOWN)
@pytest.mark.parametrize("op", OPS)
def test_every_launch_compiles_and_fits(op, capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fastldm.testing.aot", op, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert compiled
    shared_memory = KNOWN[capability].shared_memory
    assert [one for one in compiled if one["shared"] > shared_memory] == []
    assert [one for one in compiled if one["spilled"] > MOST_SPILLED and not one["may_spill"]] == []
    if op == "attention" and capability == 90:
        slow = [one["name"] for one in compiled if not one["wgmma"]]
        products = ("forward_kernel", "key_kernel", "query_kernel")
        assert [name for name in slow if name.endswith(products) and "float32" not in name] == []
