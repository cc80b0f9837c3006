"""The GPU that a kernel is planned for."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Target(NamedTuple):
    """`capability` as in sm_90: 90. `shared_memory`: bytes that one block may use."""

    capability: int
    multiprocessors: int
    shared_memory: int


# The cards whose kernels are compiled ahead of time in the tests: A100, RTX A6000, L40S, H200, B200, RTX PRO
# 6000. Shared memory: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability",
# maximum per thread block.
KNOWN = {
    80: Target(80, 108, 163 << 10),
    86: Target(86, 84, 99 << 10),
    89: Target(89, 142, 99 << 10),
    90: Target(90, 132, 227 << 10),
    100: Target(100, 148, 227 << 10),
    120: Target(120, 188, 99 << 10),
}


def target_of(device: torch.device) -> Target:
    """Of a CUDA device; for the CPU, where only Triton's interpreter runs, and for "meta" an H200."""
    return _of_cuda(device.index) if device.type == "cuda" else KNOWN[90]


@cache
def _of_cuda(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    return Target(
        10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin
    )
